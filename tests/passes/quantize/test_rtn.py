"""Round-to-nearest: closed forms, error bounds, odd groups, tied weights, composition with caches."""

import pytest
import torch
from families.cache import captured
from families.configs import build
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import packing
from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import quantized_embedding, quantized_linear
from graphwright.pass_ import Context
from graphwright.passes.quantize.rtn import Rtn
from graphwright.recipe import Recipe
from graphwright.rounding import quantize
from graphwright.scheme import Scheme
from graphwright.target import Target

CPU = Target.parse("cpu")


def restored(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    done = quantize(weight, Scheme(format=f"int{bits}", group_size=group, symmetric=symmetric, scale_dtype="float32"))
    return done.dense(), done.grid.scale


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    eighth=st.sampled_from([1, 2, 4, 9, 16]),
    columns=st.integers(1, 130),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_error_is_at_most_half_a_step(bits, eighth, columns, symmetric, seed):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    dense, scale = restored(weight, bits, 8 * eighth, symmetric)
    step = scale.repeat_interleave(-(-columns // scale.shape[1]) if scale.shape[1] == 1 else 8 * eighth, dim=1)
    step = step[:, :columns]
    # An asymmetric zero point is rounded too, so the ends of a range may lose another half step.
    limit = 0.5 if symmetric else 1.0
    assert ((dense - weight).abs() <= step * limit * 1.001 + 1e-6).all()


def test_zero_is_exact_and_zero_groups_survive():
    weight = torch.tensor([[0.0, 1.0, -3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for symmetric in (False, True):
        dense, _ = restored(weight, 4, 4, symmetric)
        assert (dense[weight == 0] == 0).all()


def test_a_grid_is_reproduced():
    codes = torch.randint(0, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 5).float() * 0.25
    dense, _ = restored(weight, 4, 32, False)
    assert torch.equal(dense, weight)


def test_asymmetric_is_better_on_shifted_weights():
    weight = torch.rand(16, 64) + 0.5
    errors = [float((restored(weight, 4, 32, s)[0] - weight).norm()) for s in (False, True)]
    assert errors[0] < errors[1]


def run(recipe: dict, name: str = "llama", model: torch.nn.Module | None = None):
    program = capture(model) if model is not None else captured(name)[1]
    loaded = Recipe.load(recipe)
    return program, PassManager(Context(CPU)).run(program, plan_passes(loaded, program))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "deepseek_v2", "gpt_oss"])
def test_the_packed_program_equals_the_dequantized_one(name):
    _, program = run({"passes": [{"rtn": {"bits": 4, "group_size": 24}}]}, name)
    plain = program.clone()
    for node in list(plain.calls(quantized_linear.target, quantized_embedding.target)):
        linear = node.target is quantized_linear.target
        weight, scale, zero = (plain.weight(n) if n is not None else None for n in node.args[1:4])
        format, group = (node.args[5], node.args[6]) if linear else (node.args[4], node.args[5])
        width = node.args[0].meta["val"].shape[-1] if linear else node.args[6]
        dense = packing.dequantize(weight, scale, zero, format, group)[:, :width].contiguous()
        assert dense.shape[0] == weight.shape[0]
        assert dense.isfinite().all()
    inputs = program.contract.draw({"batch": 2, "sequence": 5})
    assert program(**inputs)[0].isfinite().all()
    left = [n.target for n in program.calls(torch.ops.aten.linear.default)]
    assert not left


def test_eight_bits_are_close():
    before, after = run({"passes": [{"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}]})
    assert max(after.history[-1].notes["layer_errors"].values()) < 0.01
    assert 0 < after.history[-1].notes["kl"] < 0.05
    assert before.text() != after.text()


def test_tied_embedding_and_head_share_one_packed_matrix():
    model = build("llama", tie_word_embeddings=True)
    _, after = run({"passes": [{"rtn": {"bits": 4, "group_size": 16}}]}, model=model)
    (head,) = [n for n in after.calls(quantized_linear.target) if n.meta["val"].shape[-1] == 128]
    (table,) = after.calls(quantized_embedding.target)
    assert head.args[1] is table.args[1]


def test_zero_bits_keep_head_and_embedding():
    _, after = run({"passes": [{"rtn": {"head_bits": 0, "embedding_bits": 0}}]})
    assert len(list(after.calls(torch.ops.aten.linear.default))) == 1
    assert not list(after.calls(quantized_embedding.target))


def test_it_composes_with_caches_in_either_order_of_the_recipe():
    rtn = {"rtn": {"bits": 4, "group_size": 16}}
    texts = []
    for passes in (["static_cache", rtn], [rtn, "static_cache"]):
        _, after = run({"passes": passes})
        inputs = {
            **after.contract.draw({"batch": 2, "sequence": 5}),
            **after.contract.allocate({"batch": 2, "capacity": 16}),
        }
        texts.append(after(**inputs)[0])
    assert relative_error(texts[0], texts[1]) < 1e-5


def test_weights_that_overflow_half_precision_scales_are_refused():
    with pytest.raises(PassError, match="Use scale_dtype: float32"):
        quantize(torch.full((1, 4), 1e9), Scheme(group_size=4, symmetric=True))


def test_text_of_a_quantized_layer():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 4)

        def forward(self, x):
            return self.up(x)

    program = capture(Layer(), {"x": torch.randn(2, 6)})
    result = Rtn(bits=4, group_size=4, head_bits=4).run(program, Context(CPU))
    assert result.program.text() == (
        "%x : float32[batch, 6]\n"
        "%1 = quantized_linear(%x, up.weight_int4, up.weight_scale, up.weight_zero_point, up.bias, int4, 4)"
        " : float32[batch, 4]\n"
        "return [%1]\n"
    )
