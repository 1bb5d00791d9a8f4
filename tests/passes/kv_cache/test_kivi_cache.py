"""KIVI caches: the paper's formula token by token, across flushes; ragged rows; sizes that do not divide."""

import pytest
import torch
from passes.kv_cache.caching import CPU, greedy, prompts, rewritten

from graphwright.errors import PassError
from graphwright.feeding import logits_in_chunks
from graphwright.numerics import relative_error
from graphwright.ops import kivi_read, kivi_update
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.kivi_cache import KiviCache

GROUP, RESIDUAL, WIDTH = 4, 8, 8


def plain_keys(tokens: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys [n, D] as KIVI holds them: whole residuals leave, in groups of tokens, each channel with its min and max."""
    held = tokens.clone()
    for start in range(0, len(tokens) // RESIDUAL * RESIDUAL, GROUP):
        held[start : start + GROUP] = plain_rounding(tokens[start : start + GROUP].T, bits).T
    return held


def plain_values(tokens: torch.Tensor, bits: int) -> torch.Tensor:
    """Values [n, D]: all but the last residual, in groups of channels."""
    held = tokens.clone()
    for at in range(max(0, len(tokens) - RESIDUAL)):
        held[at] = plain_rounding(tokens[at].reshape(-1, GROUP), bits).flatten()
    return held


def plain_rounding(groups: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    zero, step = low.half().float(), ((high - low) / (2**bits - 1)).half().float()
    return ((groups - zero) / step).round().clamp(0, 2**bits - 1) * step + zero


def state(capacity: int, per_channel: bool, bits: int) -> tuple[torch.Tensor, ...]:
    groups = (1, 2, -(-(capacity + 1) // GROUP), WIDTH) if per_channel else (1, 2, capacity + 1, WIDTH // GROUP)
    codes = torch.zeros(1, 2, capacity + 1, WIDTH * bits // 8, dtype=torch.uint8)
    scales = [torch.zeros(groups, dtype=torch.float16) for _ in range(2)]
    return codes, *scales, torch.zeros(1, 2, RESIDUAL + 1, WIDTH)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("chunks", [(1,) * 26, (7, 1, 1, 8, 9), (26,), (8, 8, 4, 4, 2), (25, 1)])
def test_every_length_equals_the_plain_formula(per_channel, bits, chunks):
    """Lengths below, at and above flushes: R - 1, R, R + 1, R + G."""
    torch.manual_seed(2)
    tokens = torch.randn(1, 2, 26, WIDTH) + torch.arange(WIDTH) * 3
    held = state(26, per_channel, bits)
    plain = plain_keys if per_channel else plain_values
    start = 0
    for size in chunks:
        new, positions = tokens[:, :, start : start + size], torch.arange(start, start + size)[None]
        found = kivi_read(*held, new, positions, start + size, bits, GROUP, per_channel)
        for head in range(2):
            expected = torch.cat([plain(tokens[0, head, :start], bits), new[0, head]])
            assert relative_error(found[0, head], expected) < 1e-6, start
        kivi_update(*held, new, positions, bits, GROUP, per_channel)
        start += size


def test_planted_outlier_channels_survive_in_keys_and_not_per_token():
    """The paper's reason: a channel that is large everywhere costs a token's scale, and a channel's scale nothing."""
    tokens = torch.randn(1, 2, 24, WIDTH)
    tokens[..., 3] += 40
    errors = {}
    for per_channel in (True, False):
        held = state(32, per_channel, 2)
        kivi_update(*held, tokens, torch.arange(24)[None], 2, GROUP, per_channel)
        new = torch.zeros(1, 2, 1, WIDTH)
        found = kivi_read(*held, new, torch.tensor([[24]]), 25, 2, GROUP, per_channel)[:, :, :16]
        keep = [c for c in range(GROUP) if c != 3]
        errors[per_channel] = float((found - tokens[:, :, :16])[..., keep].norm())
    assert errors[True] < errors[False] / 4


def passes(**options):
    return "static_cache", {"kivi_cache": {"group_size": GROUP, "residual": RESIDUAL, **options}}


def test_a_text_shorter_than_the_residual_is_exact():
    ids = torch.tensor(prompts(7, 7))
    found = logits_in_chunks(rewritten("llama", *passes()), ids, None, [3, 4, 7])
    assert relative_error(found, logits_in_chunks(rewritten("llama", "static_cache"), ids, None, [7])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_ragged_prompts_generate_what_they_generate_alone(name):
    program = rewritten(name, *passes())
    asked = prompts(9, 1, 21)
    together = greedy(program, asked, 12)
    assert together == [greedy(program, [prompt], 12)[0] for prompt in asked]
    assert together != greedy(rewritten(name, "static_cache"), asked, 12), "2 bits must show in tiny random models"


def test_left_padding_changes_nothing():
    program = rewritten("llama", *passes())
    (prompt,) = prompts(11)
    results = []
    for padding in (0, 3):
        held = program.contract.allocate({"batch": 1, "capacity": 20})
        ids = torch.tensor([[0] * padding + prompt])
        positions = torch.nn.functional.pad(torch.arange(11)[None], (padding, 0), value=-1)
        program(input_ids=ids, positions=positions, key_positions=torch.arange(11), **held)
        step = {"input_ids": torch.tensor([[5]]), "positions": torch.tensor([[11]]), "key_positions": torch.arange(12)}
        results.append(program(**step, **held)[0])
    assert relative_error(results[1], results[0]) < 1e-6


def test_memory_follows_the_formula_and_the_error_is_reported():
    program = rewritten("llama", *passes(), verify=True)
    record = program.history[-1]
    assert record.error > 1e-3
    per_token = 2 * 2 * 2 * 16
    assert record.notes["cache_bytes_per_token"] == [per_token * 4, per_token * (2 / 8 + 4 / GROUP)]
    small, large = (
        sum(t.nbytes for t in program.contract.allocate({"batch": 1, "capacity": c}).values()) for c in (1000, 2000)
    )
    assert large - small == 1000 * per_token * (2 / 8 + 4 / GROUP)


def test_keys_may_have_more_bits_than_values():
    """Most of the error of 2 bits is that of keys; memory and error lie between those of 2 and of 4 bits."""
    ids, chunks = torch.tensor(prompts(40, 40)), [*range(8, 40, 4), 40]
    exact = logits_in_chunks(rewritten("llama", "static_cache"), ids, None, [40])
    errors, sizes = [], []
    for options in ({}, {"key_bits": 4}, {"bits": 4}):
        program = rewritten("llama", *passes(**options))
        errors.append(relative_error(logits_in_chunks(program, ids, None, chunks), exact))
        sizes.append(sum(t.nbytes for t in program.contract.allocate({"batch": 1, "capacity": 1000}).values()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0
    assert program.history[-1].options["bits"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": 6}, "no multiple of groups of 4"),
        ({"group_size": 3, "residual": 9}, "is not cut into groups of 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(options, message):
    program = rewritten("llama", "static_cache")
    with pytest.raises(PassError, match=message):
        KiviCache(**{"group_size": GROUP, "residual": RESIDUAL, **options}).run(program, Context(CPU))


def test_a_model_of_rings_only_is_refused():
    with pytest.raises(PassError, match="KIVI has nothing to work on"):
        rewritten("mistral", *passes())
