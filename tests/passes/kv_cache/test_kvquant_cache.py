"""KVQuant caches: the formula, what each of its parts buys, chunks and ragged rows, memory."""

import pytest
import torch
from families.cache import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.kv_cache.caching import CPU, greedy, prompts, rewritten

from graphwright import calibration
from graphwright.feeding import logits_in_chunks
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import kvquant_decode, kvquant_encode, rope
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.kvquant_cache import codebook
from graphwright.recipe import Recipe


def encoded(x, center, reach, levels, outliers, bits):
    codes, ranges, *apart = kvquant_encode(x, center, reach, levels, outliers, bits)
    held = (codes, ranges if center is None else None, *apart)
    return kvquant_decode(*held, center, reach, levels, bits, x.shape[1], x.dtype)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4]), outliers=st.integers(1, 4), channels=st.booleans(), seed=st.integers(0, 99))
def test_every_entry_is_the_nearest_level_and_outliers_are_kept(bits, outliers, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, 5, 8, generator=generator)
    levels = torch.rand(2**bits, generator=generator).sort().values * 2 - 1
    tables = (torch.zeros(16), torch.full((16,), 1.5)) if channels else (None, None)
    found = encoded(x, *tables, levels, outliers, bits).transpose(1, 2).flatten(2)
    flat = x.transpose(1, 2).flatten(2)
    for row, (token, made) in enumerate(zip(flat.flatten(0, 1), found.flatten(0, 1), strict=True)):
        distance = token.abs() if channels else (token - token.median()).abs()
        apart = distance.topk(outliers).indices
        inside = torch.ones(16, dtype=torch.bool)
        inside[apart] = False
        assert torch.equal(made[apart], token[apart].half().float()), row
        low, high = token[inside].min(), token[inside].max()
        center, reach = (
            (0.0, 1.5) if channels else ((low + high).div(2).half().float(), (high - low).div(2).half().float())
        )
        plain = center + reach * levels[((token[inside, None] - center) / reach - levels).abs().argmin(1)]
        assert relative_error(made[inside], plain) < 1e-5, row


def test_a_codebook_is_better_than_uniform_levels_and_one_of_equal_values_is_no_problem():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) / 4
    levels = codebook(values, 3)
    uniform = torch.linspace(-1, 1, 8)

    def error(table):
        return float((values[:, None] - table).abs().min(1).values.square().mean())

    assert error(levels) < error(uniform) / 3
    assert error(levels) < 1.08 * 0.03454 / 16, "Lloyd and Max: 0.03454 for 8 levels of a normal distribution"
    assert codebook(torch.ones(10), 2).isfinite().all()


def test_channels_are_easier_before_their_rotation():
    """Outlier channels stay in place before rope; after it they wander over two channels."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 256, 16)
    x[..., 2] += 12
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    errors = []
    for keys in (x, rope(x, torch.arange(256)[None], inv_freq)):
        flat = keys[0, 0]
        center, reach = (flat.amax(0) + flat.amin(0)) / 2, (flat.amax(0) - flat.amin(0)) / 2
        found = encoded(keys, center, reach, codebook((flat - center) / reach, 3), 1, 3)
        errors.append(float((found - keys).norm()))
    assert errors[0] < errors[1] * 0.8


def quantized(name, **options):
    program = captured(name)[1]
    recipe = Recipe.load({"passes": ["static_cache", {"kvquant_cache": options}]})
    samples = calibration.from_tokens(torch.tensor(prompts(*[32] * 4, seed=9)))
    return PassManager(Context(CPU, calibration=samples)).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize(("name", "rotated"), [("llama", 2), ("bloom", 0)])
def test_chunks_do_not_matter_bits_do_and_memory_follows(name, rotated):
    programs = {bits: quantized(name, bits=bits) for bits in (2, 4)}
    record = programs[4].history[-1]
    assert record.notes["keys_before_rope"] == rotated
    assert programs[2].history[-1].notes["kl"] > 1.5 * record.notes["kl"] > 0
    ids = torch.tensor(prompts(11, 11))
    whole = logits_in_chunks(programs[4], ids, None, [11])
    for ends in ([1, 5, 11], range(1, 12)):
        assert relative_error(logits_in_chunks(programs[4], ids, None, list(ends)), whole) < 1e-4
    spec = next(s for s in programs[4].contract.state if s.name.endswith("key_cache_0_codes"))
    assert spec.dtype == torch.uint8
    small, large = (
        sum(t.nbytes for t in programs[4].contract.allocate({"batch": 1, "capacity": c}).values()) for c in (50, 60)
    )
    assert large - small == 10 * record.notes["cache_bytes_per_token"][1]


def test_ragged_prompts_generate_what_they_generate_alone():
    program = quantized("qwen2", bits=3)
    asked = prompts(6, 1, 13)
    assert greedy(program, asked, 8) == [greedy(program, [prompt], 8)[0] for prompt in asked]


def test_the_first_token_is_exact():
    program = quantized("llama", bits=2)
    one = torch.tensor(prompts(1, 1))
    expected = logits_in_chunks(rewritten("llama", "static_cache"), one, None, [1])
    assert relative_error(logits_in_chunks(program, one, None, [1]), expected) < 1e-5
