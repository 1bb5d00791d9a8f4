"""Codes into caches and out of them in the interpreter, bit for bit those of the ops, in rows and in blocks."""

import pytest
import torch
from kernels.interpreted import runner

from graphwright import ops, packing
from graphwright.errors import BackendError
from graphwright.kernels.triton import cache_codes, rope
from graphwright.numerics import relative_error

TABLE = torch.tensor([[4, 0, 2], [1, 3, -1]])
SLOTS = torch.tensor([[0, 3, -1, 5, 8], [1, 2, 7, 4, -1]])
ROTATION = (torch.tensor([[0, 3, 5, 700, 8], [1, 2, 7, 4, 0]]), torch.rand(8, generator=torch.Generator()), 1.1)


def held(format: str, paged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    kind, rows = packing.FORMATS[format], (6, 3, 4) if paged else (2, 3, 10)
    return torch.zeros(*rows, 24 * kind.bits // 8, dtype=kind.storage), torch.zeros(*rows, 1)


def without_scratch(cache: torch.Tensor, paged: bool) -> torch.Tensor:
    return cache[:-1] if paged else cache[:, :, :-1]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("format", cache_codes.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_are_those_of_the_ops(format, interleaved, paged, dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 3, 24).transpose(1, 2) * torch.logspace(-3, 2, 24)).to(dtype)
    x[0, 0, 0] = 0
    rotation = (None, None) if interleaved is None else (*ROTATION, interleaved)
    rotated = x if interleaved is None else ops.rope.reference(x, *rotation)
    made, expected = held(format, paged), held(format, paged)
    cache_codes.update(runner(paged), *made, x, SLOTS, TABLE if paged else None, format, *rotation)
    for cache, part in zip(expected, ops.quantize_tokens.reference(rotated, format), strict=True):
        if paged:
            ops.paged_update.reference(cache, part, SLOTS, TABLE)
        else:
            ops.kv_cache_update.reference(cache, part, SLOTS)
    codes, wanted = (without_scratch(pair[0], paged) for pair in (made, expected))
    if format == "fp8_e4m3":
        # Zeros have a sign there.
        codes, wanted = (bits.view(torch.float8_e4m3fn).float() for bits in (codes, wanted))
    # The ops turn float16 in float16, so a channel may differ in its last bit; only e4m3 is fine enough to show it.
    turned = format == "fp8_e4m3" and dtype == torch.float16 and interleaved is not None
    assert (codes != wanted).float().mean() < (0.01 if turned else 1e-9)
    scales = (without_scratch(pair[1], paged) for pair in (made, expected))
    assert relative_error(*scales) < (2e-3 if turned else 1e-6)


@pytest.mark.parametrize("format", ["", *cache_codes.FORMATS])
def test_what_is_read_is_what_the_ops_read(format):
    torch.manual_seed(0)
    pool, scale = torch.randn(6, 3, 4, 24), None
    if format:
        pool, scale = ops.quantize_tokens.reference(pool, format)
    parts = [part for part in (pool, scale) if part is not None]
    for table in (None, TABLE[:1], TABLE):
        gathered = [p[:, :, :3] if table is None else ops.paged_read.reference(p, table, 9) for p in parts]
        expected = ops.dequantize_tokens.reference(*gathered, format, torch.float32) if format else gathered[0]
        keys = expected.shape[2]
        actual = cache_codes.read(runner(keys), pool, scale, table, keys, format, torch.float32)
        if table is TABLE:
            actual[1, :, 8:] = expected[1, :, 8:] = 0  # where there is no block
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_numbers_into_blocks(turned):
    torch.manual_seed(0)
    x, rotation = torch.randn(2, 3, 5, 24), (*ROTATION, False) if turned else (None, None)
    made, expected = torch.zeros(6, 3, 4, 24), torch.zeros(6, 3, 4, 24)
    rope.paged_update(runner(1), made, x, SLOTS, TABLE, *rotation)
    ops.paged_update.reference(expected, ops.rope.reference(x, *rotation) if turned else x, SLOTS, TABLE)
    assert relative_error(made[:-1], expected[:-1]) < 2e-5


def test_every_number_of_e4m3_and_what_lies_between():
    """Through a token whose scale is one."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].unique()
    between = (values[1:] + values[:-1]) / 2
    limit = torch.tensor(448.0)
    x = torch.cat([values, between, between.nextafter(limit), between.nextafter(-limit)])[None, None, None]
    codes, scale = torch.zeros_like(x, dtype=torch.uint8), torch.zeros(1, 1, 1, 1)
    cache_codes.update(runner(), codes, scale, x, torch.tensor([[0]]), None, "fp8_e4m3")
    assert scale.item() == 1.0
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float())


def test_other_formats_are_refused():
    codes, scale = held("int8", False)
    with pytest.raises(BackendError, match="caches in int3. There are int8, int4, fp8_e4m3"):
        cache_codes.read(runner(), codes, scale, None, 4, "int3", torch.float32)
    with pytest.raises(BackendError, match="caches in nf4"):
        cache_codes.update(runner(), codes, scale, torch.zeros(2, 3, 5, 24), SLOTS, None, "nf4")
