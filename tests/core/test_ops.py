"""Every op: schema, shape function and determinism on its samples, in every dtype; numbers against independent forms."""

import pytest
import torch
from torch.nn import functional

import graphwright.ops
from graphwright.numerics import relative_error
from graphwright.op import OPS, Sample, TensorInfo
from graphwright.ops import attention, gated_activation, grouped_linear, kv_cache_update, rms_norm, rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(op, dtype, index, id=f"{name}-{str(dtype)[6:]}-{index}")
    for name, op in OPS.items()
    for dtype in DTYPES
    for index in range(len(list(op.samples_of(dtype))))
]


def sample_of(op, dtype: torch.dtype, index: int) -> Sample:
    torch.manual_seed(0)
    return list(op.samples_of(dtype))[index]


@pytest.mark.parametrize(("op", "dtype", "index"), CASES)
def test_shape_function_agrees_with_the_reference(op, dtype, index):
    sample = sample_of(op, dtype, index)
    result = op(*sample.args, **sample.kwargs)
    mode = torch._subclasses.FakeTensorMode()
    fake_args = torch.utils._pytree.tree_map(
        lambda a: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a, sample.args
    )
    with mode:
        fake = op(*fake_args, **sample.kwargs)
    if result is None:
        assert fake is None
        return
    made, expected = (r if isinstance(r, tuple) else (r,) for r in (fake, result))
    for one, other in zip(made, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), sample.note
        assert other.isfinite().all(), sample.note


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_samples_and_a_cost(op):
    samples = list(op.samples_of(torch.float32))
    assert samples, f"{op.name} has no samples"
    infos = [TensorInfo(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in samples[0].args]
    cost = op.cost_of(*infos, **samples[0].kwargs)
    assert cost.flops > 0 or cost.bytes is not None


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 80, 96])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9)])
def test_attention_equals_torch(heads, kv_heads, head_dim, queries, keys):
    torch.manual_seed(0)
    query = torch.randn(2, heads, queries, head_dim)
    key, value = (torch.randn(2, kv_heads, keys, head_dim) for _ in range(2))
    at = torch.arange(keys - queries, keys)[None]
    found = attention(query, key, value, at, None, None, None, None, 0.125, True)
    mask = torch.arange(keys)[None] <= at[0][:, None]
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.125, enable_gqa=True)
    assert relative_error(found, expected) < 1e-5


def test_attention_rows_that_see_nothing_are_zero():
    query = torch.randn(1, 2, 3, 8)
    at = torch.tensor([[-1, 0, 1]])
    result = attention(query, query, query, at, at, None, None, None, 1.0, True)
    assert (result[:, :, 0] == 0).all()
    assert (result[:, :, 1:] != 0).any()


def test_sinks_take_probability_away():
    query = torch.randn(1, 2, 4, 8)
    plain = attention(query, query, query, None, None, None, None, None, 1.0, True)
    large = torch.full((2,), 50.0)
    sunk = attention(query, query, query, None, None, None, None, large, 1.0, True)
    assert sunk.abs().max() < 1e-6 < plain.abs().max()


def test_rms_norm_equals_torch():
    x, weight = torch.randn(3, 5, 96), torch.randn(96)
    assert relative_error(rms_norm(x, weight, 1e-6), functional.rms_norm(x, (96,), weight, 1e-6)) < 1e-6
    shifted = functional.rms_norm(x, (96,), 1 + weight, 1e-6)
    assert relative_error(rms_norm(x, weight, 1e-6, True), shifted) < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_norms_and_depends_on_distance_only(interleaved):
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        q = rope(query, torch.tensor([[i]]), inv_freq, 1.0, interleaved)
        k = rope(key, torch.tensor([[j]]), inv_freq, 1.0, interleaved)
        assert relative_error(q.norm(), query.norm()) < 1e-6
        return (q * k).sum()

    assert relative_error(score(5, 3), score(105, 103)) < 1e-4
    assert relative_error(score(0, 0), (query * key).sum()) < 1e-6
    assert relative_error(score(5, 3), score(5, 4)) > 1e-3


def test_kv_cache_update_skips_padding_and_writes_in_place():
    cache = torch.zeros(1, 1, 4, 2)
    new = torch.arange(1.0, 7.0).reshape(1, 1, 3, 2)
    kv_cache_update(cache, new, torch.tensor([[2, -1, 0]]))
    assert cache[0, 0, :3].tolist() == [[5, 6], [0, 0], [1, 2]]


def test_gated_activation_is_not_symmetric():
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    assert relative_error(gated_activation(gate, up, "silu"), functional.silu(gate) * up) == 0
    assert relative_error(gated_activation(up, gate, "silu"), functional.silu(gate) * up) > 0.1


def test_grouped_linear_equals_a_loop():
    x, weight = torch.randn(6, 4), torch.randn(3, 4, 5)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]])
    assert relative_error(grouped_linear(x, weight, ends), expected) < 1e-6


def test_all_ops_are_exported():
    # Backends register ops of their own beside these.
    core = {name for name, op in OPS.items() if op.reference.__module__.startswith("graphwright.ops.")}
    assert core == set(graphwright.ops.__all__)
