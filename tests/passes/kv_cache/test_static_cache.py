"""Cache insertion: chunked and ragged runs equal the whole forward; what cannot follow a cache is refused."""

import pytest
import torch
from families.cache import captured
from families.configs import build

from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")
RECIPE = Recipe(passes=["static_cache"])


def with_cache(program: Program) -> Program:
    return PassManager(Context(CPU)).run(program, plan_passes(RECIPE, program))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "bloom", "opt", "deepseek_v3"])
@pytest.mark.parametrize("chunks", [(13,), (1,) * 13, (6, 1, 6), (2, 9, 2)])
def test_any_chunking_equals_the_whole_forward(name, chunks):
    """Windows of the tiny models are 5: chunks shorter and longer than a ring are covered."""
    _, program = captured(name)
    cached = _cached(name)
    ids = torch.randint(0, 128, (2, 13), generator=torch.Generator().manual_seed(3))
    expected = logits_of(program, ids)
    state = cached.contract.allocate({"batch": 2, "capacity": 16})
    start, parts = 0, []
    for size in chunks:
        end = start + size
        step = {
            "input_ids": ids[:, start:end],
            "positions": torch.arange(start, end).expand(2, -1),
            "key_positions": torch.arange(end),
        }
        parts.append(cached(**step, **state)[0])
        start = end
    assert relative_error(torch.cat(parts, 1), expected) < 1e-4


_CACHED: dict[str, Program] = {}


def _cached(name: str) -> Program:
    if name not in _CACHED:
        _CACHED[name] = with_cache(captured(name)[1])
    return _CACHED[name]


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "opt"])
def test_left_and_right_padding_are_the_same(name):
    cached = _cached(name)
    ids = torch.randint(0, 128, (1, 6), generator=torch.Generator().manual_seed(5))
    results = []
    for before, after in ((0, 0), (3, 0), (0, 4), (2, 2)):
        padded = torch.nn.functional.pad(ids, (before, after))
        positions = torch.nn.functional.pad(torch.arange(6)[None], (before, after), value=-1)
        state = cached.contract.allocate({"batch": 1, "capacity": 16})
        logits = cached(input_ids=padded, positions=positions, key_positions=torch.arange(8), **state)[0]
        results.append(logits[:, before : before + 6])
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-5


def test_sliding_windows_keep_a_ring():
    shapes = {spec.name: spec.shape for spec in _cached("gemma3").contract.state}
    assert shapes["key_cache_0"] == ("batch", 2, 6, 16), "window 5 and the scratch slot"
    assert shapes["key_cache_2"] == ("batch", 2, "capacity", 16)


def test_padding_never_reaches_a_slot_that_is_read():
    cached = _cached("llama")
    state = cached.contract.allocate({"batch": 1, "capacity": 8})
    for tensor in state.values():
        tensor.fill_(float("nan"))
    ids, positions = torch.tensor([[7, 8, 9]]), torch.tensor([[-1, 0, 1]])
    logits = cached(input_ids=ids, positions=positions, key_positions=torch.arange(2), **state)[0]
    assert logits[:, 1:].isfinite().all()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_without_a_causal_cache_are_refused(name):
    with pytest.raises(PassError, match="causal"):
        with_cache(captured(name)[1])


def test_a_bias_over_keys_is_refused():
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(16, 8)
            self.register_buffer("bias", torch.randn(32, 32))

        def forward(self, input_ids):
            x = self.embed(input_ids)[:, None]
            length = input_ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            mask = self.bias[:length, :length].masked_fill(~causal, float("-inf"))
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, 0]

    ids = torch.zeros(2, 6, dtype=torch.int64)
    program = capture(Biased(), {"input_ids": ids}, dims={"input_ids": {0: "batch"}})
    with pytest.raises(PassError):
        with_cache(program)


def test_bfloat16_caches():
    program = capture(build("llama").bfloat16())
    cached = with_cache(program)
    assert {spec.dtype for spec in cached.contract.state} == {torch.bfloat16}
