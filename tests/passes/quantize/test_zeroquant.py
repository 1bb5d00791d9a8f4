"""The recipe w8a8-zeroquant: group-wise weights, activations per token, everything for integer kernels."""

import torch
from families.cache import captured
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from graphwright.backend import coverage
from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.registry import backend
from graphwright.target import Target

CPU = Target.parse("cpu")


def compiled(recipe: dict | str, program: Program | None = None) -> tuple[Program, Program]:
    before = program or captured("llama")[1]
    loaded = Recipe.load(recipe)
    return before, PassManager(Context(CPU)).run(before, plan_passes(loaded, before))


def test_weights_are_grouped_and_activations_have_a_scale_per_token():
    _, after = compiled("w8a8-zeroquant")
    layers = list(after.calls(quantized_linear.target))
    assert layers
    for node in layers:
        rounding = node.args[0]
        assert rounding.target is quantize_dequantize.target
        assert rounding.args[1] is None, "measured at run time"
        assert rounding.args[2:] == ("int8", 0)
        assert node.args[3] is None
    assert {node.args[5] for node in layers} == {"int8"}
    assert 64 in {node.args[6] for node in layers}


def test_logits_keep_their_direction():
    # As models are initialised: the families of the other tests have norms that amplify rounding on purpose.
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    program = capture(LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval())
    recipe = {"passes": [{"rtn": {"bits": 8, "group_size": 64, "symmetric": True}}, "activations"]}
    before, after = compiled(recipe, program)
    inputs = before.contract.draw({"batch": 2, "sequence": 9}, seed=3)
    (expected,), (actual,) = before(**inputs)[:1], after(**inputs)[:1]
    assert functional.cosine_similarity(actual.flatten(), expected.flatten(), 0) > 0.999


def test_a_scale_per_token_beats_one_per_tensor_where_norms_differ():
    torch.manual_seed(0)
    x = torch.randn(16, 64) * torch.logspace(-2, 2, 16)[:, None]
    whole = quantize_dequantize(x, x.abs().amax() / 127, "int8", 0)
    own = quantize_dequantize(x, None, "int8", 0)
    errors = [((q - x).norm(dim=-1) / x.norm(dim=-1)).mean() for q in (own, whole)]
    assert errors[0] < 0.1 * errors[1]


def test_the_cpu_has_integer_kernels_for_it():
    _, after = compiled("w8a8-zeroquant")
    assert not coverage(after, backend("tvm"), CPU).reasons
