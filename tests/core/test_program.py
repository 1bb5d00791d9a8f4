"""Programs: clones, text, JSON and files, costs, and the normal form."""

import json

import pytest
import torch
from families.cache import captured
from torch import nn

from graphwright import shapes
from graphwright.capture import capture
from graphwright.cost import node_costs, program_cost, roofline
from graphwright.errors import ArtifactError
from graphwright.manager import PassManager, drawn, plan_passes
from graphwright.pass_ import Context
from graphwright.program import CACHE_LINE, Program, load_weights, save_weights
from graphwright.recipe import Recipe
from graphwright.serialize import graph_to_json
from graphwright.target import Target

CPU = Target.parse("cpu")


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "deepseek_v2", "gpt_oss", "mixtral", "bert"])
@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_saved_programs_load_equal(name, recipe, tmp_path):
    if name == "bert" and recipe == "int4":
        recipe = "none"
    _, program = captured(name)
    loaded_recipe = Recipe.load(recipe)
    rewritten = PassManager(Context(CPU)).run(program, plan_passes(loaded_recipe, program))
    rewritten.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert loaded.text() == rewritten.text()
    assert loaded.contract == rewritten.contract
    assert loaded.metadata == rewritten.metadata
    sizes = {"batch": 2, "sequence": 5}
    for found, expected in zip(loaded(**drawn(loaded, sizes, 3)), rewritten(**drawn(rewritten, sizes, 3)), strict=True):
        assert torch.equal(found, expected)


def test_graphs_name_no_foreign_callables(tmp_path):
    _, program = captured("llama")
    node = next(program.calls())
    node.target = json.dumps
    with pytest.raises(ArtifactError, match="cannot be written to a file"):
        graph_to_json(program.graph)
    _, program = captured("llama")
    program.save(tmp_path)
    file = tmp_path / "program.json"
    file.write_text(file.read_text().replace("aten::linear.default", "os::system.default"))
    with pytest.raises(ArtifactError, match="os::system.default, which this installation does not know"):
        Program.load(tmp_path)


def test_text_is_the_same_for_two_captures():
    from families.configs import build

    assert capture(build("llama")).text() == captured("llama")[1].text()


def test_a_clone_shares_weights_and_not_the_graph():
    _, program = captured("llama")
    clone = program.clone()
    name = next(iter(program.weights()))
    assert clone.weight(name).data_ptr() == program.weight(name).data_ptr()
    before = program.text()
    for node in list(clone.calls(torch.ops.aten.linear.default)):
        node.replace_all_uses_with(node.args[0])
        clone.graph.erase_node(node)
    assert program.text() == before


def test_costs_by_hand():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 16, bias=False)

        def forward(self, x):
            return self.up(x).relu()

    program = capture(Two(), {"x": torch.randn(3, 8)})
    linear, relu = node_costs(program)
    batch = next(iter(linear.flops.free_symbols))
    assert str(batch) == "batch"
    assert linear.flops == 2 * 8 * 16 * batch
    assert linear.bytes == 4 * (8 * batch + 8 * 16 + 16 * batch)
    assert relu.flops == 16 * batch
    total = program_cost(program)
    assert total.flops == linear.flops + relu.flops
    estimate = roofline(program, Target.parse("cuda:sm_90"), {"batch": 4})
    assert estimate.flops == float(total.flops.subs({batch: 4}))
    assert estimate.seconds > 0


def test_quantization_cuts_the_bytes_of_a_decode_step():
    _, program = captured("llama")
    sizes = {"batch": 1, "sequence": 1, "keys": 8, "logits": 1}
    moved = []
    for name in ("fp32", "int8"):
        recipe = Recipe.load(name)
        rewritten = PassManager(Context(CPU)).run(program, plan_passes(recipe, program))
        moved.append(roofline(rewritten, CPU, sizes).bytes)
    assert moved[1] < 0.45 * moved[0]


def test_products_of_codes_have_the_rate_of_integers():
    _, program = captured("llama")
    dtypes = {}
    for name in ("int8", "int8-dynamic"):
        recipe = Recipe.load(name)
        rewritten = PassManager(Context(CPU)).run(program, plan_passes(recipe, program))
        dtypes[name] = {cost.dtype for cost in node_costs(rewritten) if cost.op == "quantized_linear"}
    assert dtypes == {"int8": {"float32"}, "int8-dynamic": {"int8"}}


def test_clean_leaves_one_spelling():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            y = x.to(torch.float32).contiguous().clone().view(-1, 2, 2).detach()
            return torch.nn.functional.dropout(y, 0.0), x.view(-1, 2, 2)

    program = capture(Noisy(), {"x": torch.randn(3, 4)})
    assert program.text() == (
        "%x : float32[batch, 4]\n%1 = reshape(%x, [-1, 2, 2]) : float32[batch, 2, 2]\nreturn [%1, %1]\n"
    )


def test_a_loaded_program_runs_before_its_shapes_are_known(tmp_path, monkeypatch):
    program = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    program.save(tmp_path)
    propagated = []
    propagate = shapes.propagate
    monkeypatch.setattr(shapes, "propagate", lambda *given: propagated.append(propagate(*given)))
    loaded = Program.load(tmp_path)
    x = torch.randn(5, 4)
    name = program.contract.names[0]
    assert torch.equal(loaded(**{name: x})[0], program(**{name: x})[0])
    assert not propagated
    assert loaded.text() == program.text()
    assert len(propagated) == 1


@pytest.mark.parametrize("name", ["w", "a_longer_name", "an_even_longer_name_of_a_weight"])
def test_mapped_weights_begin_a_cache_line(name, tmp_path):
    tensors = {name: torch.randn(16, 16), f"{name}.2": torch.randn(64)}
    save_weights(tensors, tmp_path / "weights.safetensors")
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.items())
    assert {tensor.data_ptr() % CACHE_LINE for tensor in loaded.values()} == {0}
