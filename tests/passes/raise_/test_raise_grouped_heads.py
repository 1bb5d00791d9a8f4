"""Copies of key-value heads absorbed, and only those that lie as grouped heads do."""

import pytest
import torch
from families import plain
from families.cache import captured
from families.configs import FAMILIES
from families.plain import capture_plain, capture_smallest, run_passes

from graphwright.numerics import relative_error
from graphwright.ops import attention, rope

PASSES = ("raise_attention", "raise_grouped_heads")

KV_HEADS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral"), 2),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "gpt_oss"), 2),
    "falcon": 1,
}
"""Families with fewer key-value heads than query heads, which are 4. Falcon's grouped form needs rope raised first."""


def kv_heads(program) -> list[int]:
    return [int(node.args[1].meta["val"].shape[1]) for node in program.calls(attention.target)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_read_their_own_heads(name: str) -> None:
    _model, program = captured(name)
    program, results = run_passes(program, PASSES)
    assert set(kv_heads(program)) == {KV_HEADS.get(name, 4)}
    if name != "falcon_grouped":
        assert results["raise_grouped_heads"].near_misses == []
    again, results = run_passes(program.clone(), PASSES)
    assert results["raise_grouped_heads"].sites == []
    assert again.text() == program.text()


@pytest.mark.parametrize(
    ("name", "heads"),
    [("RepeatKv", 2), ("RepeatInterleave", 2), ("RepeatEarly", 2), ("EnableGqa", 2), ("MultiQuery", 1), ("Causal", 4)],
)
def test_copies_are_absorbed(name: str, heads: int) -> None:
    module = getattr(plain, name)()
    program, _results = run_passes(capture_plain(module), PASSES)
    assert kv_heads(program) == [heads]
    for batch, length in ((2, 9), (1, 1), (3, 40)):
        x = torch.randn(batch, length, plain.WIDTH)
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


def test_tiled_heads_are_not_grouped_heads() -> None:
    program, results = run_passes(capture_plain(plain.TiledHeads()), PASSES)
    assert kv_heads(program) == [4]
    assert results["raise_grouped_heads"].sites == []


def test_keys_repeated_unlike_values_are_a_near_miss() -> None:
    program, results = run_passes(capture_plain(plain.OnlyKeysRepeated()), PASSES)
    assert kv_heads(program) == [4]
    assert "not repeated alike" in results["raise_grouped_heads"].near_misses[0]


def test_copies_behind_rope_are_absorbed() -> None:
    class Roped(plain.RepeatEarly):
        def attend(self, q, k, v, x):
            positions, inv_freq = torch.arange(x.shape[1])[None], 10.0 ** -torch.arange(4.0)
            return super().attend(rope(q, positions, inv_freq), rope(k, positions, inv_freq), v, x)

    module = Roped()
    program, _results = run_passes(capture_plain(module), PASSES)
    assert kv_heads(program) == [2]
    x = torch.randn(2, 9, plain.WIDTH)
    assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


def test_the_grouped_form_of_falcon_copies_its_heads_before_rope() -> None:
    _model, program = captured("falcon_grouped")
    program, results = run_passes(program, ("raise_attention", "raise_rope", "raise_grouped_heads"))
    assert kv_heads(program) == [2, 2]
    assert results["raise_grouped_heads"].near_misses == []


def test_golden_text() -> None:
    program, _results = run_passes(capture_smallest(), PASSES)
    assert program.text().endswith(
        """\
%12 = logical_or(%8, %11) : bool[batch, 1, sequence, sequence]
%13 = where.Scalar(%12, -inf, 0.0) : float32[batch, 1, sequence, sequence]
%14 = attention(%q, %k, %v, None, None, %13, None, None, scale=0.5, causal=False) : float32[batch, 4, sequence, 4]
return [%14]
"""
    )
