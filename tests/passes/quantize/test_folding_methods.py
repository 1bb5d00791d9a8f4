"""SmoothQuant, QuaRot and AWQ: they change nothing by themselves, and help where they are meant to."""

import pytest
import torch
from families.configs import build
from passes.quantize.quantizing import run

from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.numerics import relative_error
from graphwright.ops import hadamard_transform
from graphwright.passes.quantize.quarot import sylvester
from graphwright.program import Program

W8A8 = [{"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}]
STATIC, DYNAMIC = {"activations": {"static": True}}, {"activations": {}}


def with_outliers() -> Program:
    """A llama whose norms amplify three channels and whose layers expect it: the function of a plain one."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[3, 17, 40]] *= 100
                for reader in readers:
                    reader.weight[:, [3, 17, 40]] /= 100
    return capture(model)


def kl(after: Program) -> float:
    """Divergence from the original, summed over the approximate passes."""
    return sum(record.notes.get("kl", 0.0) for record in after.history)


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_smoothing_wins_back_what_outliers_cost(activations):
    program = with_outliers()
    _, plain = run([*W8A8, activations], program=program)
    _, smooth = run(["smoothquant", *W8A8, activations], program=program)
    assert kl(smooth) < 0.3 * kl(plain)


@pytest.mark.parametrize("passes", [[{"smoothquant": {"strength": 0.5}}], ["quarot"], [{"quarot": {"online": False}}]])
@pytest.mark.parametrize("prefix", [[], ["merge_linear", "static_cache", "select_logits"]], ids=["plain", "cached"])
def test_exact_passes_are_verified_in_either_order(passes, prefix):
    for order in ([*prefix, *passes], [*passes, *prefix]):
        _, after = run(order)
        (record,) = [r for r in after.history if r.name in ("smoothquant", "quarot")]
        assert record.sites > 4
        assert record.error < 2e-4


def test_rotation_spreads_outliers():
    program = with_outliers()
    passes = [{"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}, {"activations": {"format": "int4"}}]
    _, plain = run(passes, program=program)
    _, rotated = run(["quarot", *passes], program=program)
    assert kl(rotated) < 0.5 * kl(plain)


def test_a_stream_that_cannot_be_rotated_is_refused_with_the_node():
    with pytest.raises(PassError, match=r"cannot be rotated.*layer_norm"):
        run(["quarot"], "gpt2")


@pytest.mark.parametrize(("width", "block"), [(8, 8), (24, 8), (12, 4), (576, 64)])
def test_the_transform_is_its_own_inverse_and_a_matrix(width, block):
    x = torch.randn(3, width)
    turned = hadamard_transform(x, block)
    assert relative_error(turned, x @ sylvester(block, width).float()) < 1e-5
    assert relative_error(hadamard_transform(turned, block), x) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_awq_is_no_worse_than_round_to_nearest_on_its_layers(name):
    options = {"bits": 3, "group_size": 32, "head_bits": 0, "embedding_bits": 0}
    _, nearest = run([{"awq": {**options, "steps": 1, "clip_steps": 0}}], name)
    _, found = run([{"awq": options}], name)
    errors = [sum(p.history[-1].notes["layer_errors"].values()) for p in (found, nearest)]
    assert errors[0] < errors[1]
    assert found.history[-1].notes["strengths"]


def test_awq_folds_nothing_where_no_scaling_is_best():
    options = {"bits": 8, "group_size": 0, "steps": 1, "clip_steps": 0, "head_bits": 0, "embedding_bits": 0}
    before, after = run([{"awq": options}])
    _, nearest = run([{"rtn": {key: options[key] for key in ("bits", "group_size", "head_bits", "embedding_bits")}}])
    assert set(after.history[-1].notes["strengths"].values()) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(after.weights().values(), nearest.weights().values(), strict=True))
    assert before.history == after.history[: len(before.history)]


def test_groups_of_activations_must_fit():
    with pytest.raises(PassError, match="do not divide"):
        run([*W8A8, {"activations": {"group_size": 7}}])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("group_size", [0, 16])
def test_activation_formats_run(format, group_size):
    _, after = run([*W8A8, {"activations": {"format": format, "group_size": group_size}}])
    assert 0 < after.history[-1].notes["kl"] < (2.0 if format == "int4" else 0.6)
