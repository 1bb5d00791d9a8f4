"""GPTQ and AWQ of experts: each is solved on the tokens that it gets, and a rare one on those of all."""

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE
from families.plain import context
from torch.nn import functional

from graphwright.expert_quantizer import POOLED_ROWS, Routed
from graphwright.manager import PassManager, plan_passes
from graphwright.match import argument
from graphwright.ops import experts, quantized_experts
from graphwright.packing import dequantize
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rewrite import run_nodes

TOKENS = torch.randint(3, VOCAB_SIZE, (6, 40), generator=torch.Generator().manual_seed(1))


def run(program: Program, *passes) -> Program:
    asked = context()
    asked.calibration = [{"input_ids": row[None]} for row in TOKENS]
    return PassManager(asked).run(program, plan_passes(Recipe.load({"passes": [*passes]}), program))


def observed(program: Program) -> list[tuple]:
    """(x, indices, up, down) of each layer on all calibration tokens; before quantization."""
    nodes = list(program.calls(experts.target))
    placeholders = {str(n.target): n for n in program.graph.nodes if n.op == "placeholder"}
    tokens = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    bound = {node: tokens[name] for name, node in placeholders.items()}
    ends = [argument(node, name) for node in nodes for name in ("x", "indices")]
    values = run_nodes(program, ends, bound)
    return [
        (*values[2 * i : 2 * i + 2], *(program.weight(argument(node, name)) for name in ("up", "down")))
        for i, node in enumerate(nodes)
    ]


def stacks(program: Program) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the packed weights of each layer stand for."""
    found = []
    for node in program.calls(quantized_experts.target):
        pair = []
        for name, width in (("up", 64), ("down", None)):
            codes, scale, zero = (
                program.weight(argument(node, f"{name}{part}")) for part in ("", "_scale", "_zero_point")
            )
            group = argument(node, f"{name}_group_size")
            dense = [
                dequantize(*parts, argument(node, "format"), group) for parts in zip(codes, scale, zero, strict=True)
            ]
            pair.append(torch.stack(dense))
            if width is None:
                pair[-1] = pair[-1][:, :, : pair[0].shape[1] // 2]
        found.append((pair[0][:, :, :64], pair[1]))
    return found


def output_errors(seen: tuple, up: torch.Tensor, down: torch.Tensor) -> list[float]:
    """Relative error of each expert's output on its own tokens."""
    x, indices, first, second = seen

    def mlp(rows: torch.Tensor, index: int, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, value = functional.linear(rows, up[index]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * value, down[index])

    errors = []
    for index in range(len(up)):
        rows = x[(indices == index).any(1)]
        expected = mlp(rows, index, first, second)
        errors.append(float((mlp(rows, index, up, down) - expected).norm() / expected.norm()))
    return errors


def test_calibrated_experts_lose_less_on_their_tokens():
    _, program = captured("mixtral")
    seen = observed(run(program.clone(), "experts"))[0]
    kept = {"self_attn": {"keep": True}}  # so that the first layer of experts sees the same tokens
    options = {"bits": 3, "group_size": 32, "head_bits": 0, "embedding_bits": 0, "layers": kept}
    errors = {}
    for name, extra in (("rtn", {}), ("gptq", {"expert_tokens": 8})):
        errors[name] = output_errors(seen, *stacks(run(program.clone(), "experts", {name: {**options, **extra}}))[0])
    assert sum(errors["gptq"]) < 0.85 * sum(errors["rtn"])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_whole_program_loses_less(method):
    options = {"bits": 3, "group_size": 32, "head_bits": 0, "embedding_bits": 0}
    _, program = captured("mixtral")
    losses = {}
    for name in ("rtn", method):
        losses[name] = run(program.clone(), "experts", {name: options}).history[-1].notes["kl"]
    assert losses[method] < losses["rtn"]


def test_rare_experts_are_solved_on_the_tokens_of_all():
    _, program = captured("mixtral")
    options = {"bits": 4, "group_size": 32, "head_bits": 0}
    few = run(program.clone(), "experts", {"gptq": {**options, "expert_tokens": 0}})
    assert few.history[-1].notes["experts_rounded_on_tokens_of_all"] == {}
    many = run(program.clone(), "experts", {"gptq": {**options, "expert_tokens": 100_000}})
    pooled = many.history[-1].notes["experts_rounded_on_tokens_of_all"]
    assert [len(found) for found in pooled.values()] == [4, 4]


def test_routed_tokens():
    seen = Routed()
    x, indices = torch.arange(12.0).view(6, 2), torch.tensor([[0, 1], [1, 2], [0, -1], [2, 0], [1, 0], [-1, -1]])
    seen.add(x, x[:4], indices[:4].float())
    seen.add(x, x[4:], indices[4:].float())
    assert seen.of(0).tolist() == x[[0, 2, 3, 4]].tolist()
    assert seen.of(3).shape == (0, 2)
    assert seen.usage(4).tolist() == [4, 3, 2, 0]
    assert seen.pooled(POOLED_ROWS).shape == (6, 2)
    assert seen.pooled(4).tolist() == x[::2].tolist()
