"""The calibration walk: what it hands out equals the whole program's values; resuming, masks, caches, bad input."""

import pytest
import torch
from passes.quantize.quantizing import CPU, batches, run

from graphwright import calibration, structure
from graphwright.calibration import Channels, Hessian, Stop, walk
from graphwright.errors import PassError
from graphwright.feeding import batch_inputs
from graphwright.manager import _values
from graphwright.ops import rms_norm
from graphwright.pass_ import Context
from graphwright.passes.quantize.gptq import Gptq
from graphwright.serialize import set_attribute

PREFIX = [[], ["static_cache"], ["merge_linear", "static_cache", "select_logits"]]


def stops_of(program) -> list[Stop]:
    sources = dict.fromkeys(node.args[0] for node, _ in structure.linears(program))
    order = list(program.graph.nodes)
    return [Stop(node, node.name) for node in sorted(sources, key=order.index)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox", "deepseek_v2", "bert"])
def test_every_stop_sees_what_the_whole_program_computes(name):
    _, program = run([], name)
    stops, samples = stops_of(program), batches(3)
    expected = [_values(program, batch_inputs(program, batch)) for batch in samples]
    seen = []

    def visit(index, collected):
        rows = torch.cat([values[stops[index].node.name].flatten(0, -2) for values in expected])
        assert torch.allclose(collected.matrix, rows.T @ rows, rtol=1e-3, atol=1e-2)
        seen.append(index)
        return {}

    walk(program, samples, stops, Hessian, visit)
    assert seen == list(range(len(stops)))


@pytest.mark.parametrize("prefix", PREFIX, ids=str)
def test_later_stops_see_replaced_weights(prefix):
    _, program = run(prefix)
    linears = structure.linears(program)
    reader = {node.args[0]: (node, weight) for node, weight in linears}
    stops = stops_of(program)
    first, weight = reader[stops[0].node]
    largest = []
    for factor in (1.0, 0.0):
        found: list[torch.Tensor] = []

        def visit(index, collected, found=found, factor=factor):
            found.append(collected.largest)
            return {first: program.weight(weight) * factor} if index == 0 else {}

        walk(program, batches(2), stops, Channels, visit)
        largest.append(found)
    assert torch.equal(largest[0][0], largest[1][0])
    assert not torch.allclose(largest[0][2], largest[1][2])


def test_padding_is_left_out():
    _, program = run([])
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    counts = []

    def visit(index, collected):
        counts.append(collected.count)
        return {}

    walk(program, [{"input_ids": ids, "attention_mask": mask}], stops_of(program)[:1], Hessian, visit)
    assert counts == [20]


def test_kept_rows_are_spread_over_everything():
    channels = Channels(kept=16)
    everything = torch.arange(1000.0)[:, None].expand(1000, 3)
    for part in everything.split(37):
        channels.add(part)
    rows = channels.rows[:, 0]
    assert 16 <= len(rows) <= 32
    assert len(rows.diff().unique()) == 1
    assert rows[0] == 0
    assert rows[-1] > 930
    assert torch.allclose(channels.mean, everything.mean(0))
    assert channels.largest.tolist() == [999.0] * 3


def test_infinite_activations_name_the_layer():
    _, program = run([])
    second = list(program.calls(rms_norm.target))[1].args[1]
    set_attribute(program.module, str(second.target), torch.full_like(program.weight(second), float("inf")))
    with pytest.raises(PassError, match=r"NaN or infinite.*layers\.0\.mlp"):
        Gptq().run(program, Context(CPU, calibration=batches()))


def test_random_tokens_come_with_a_warning():
    _, program = run([])
    with pytest.warns(match="random tokens"):
        first = calibration.samples(program, Context(CPU, seed=3))
    with pytest.warns(match="random tokens"):
        second = calibration.samples(program, Context(CPU, seed=3))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


class Stopped(Exception):  # noqa: N818
    pass


def test_an_interrupted_run_goes_on_at_the_layer_it_was_at(tmp_path, monkeypatch):
    recipe = [{"gptq": {"bits": 4, "group_size": 32}}]
    _, whole = run(recipe)
    solved: list[str] = []
    solve = Gptq.solve

    def counting(self, weight, scheme, statistics):
        if len(solved) == 5 and not resumed:
            raise Stopped
        solved.append("")
        return solve(self, weight, scheme, statistics)

    monkeypatch.setattr(Gptq, "solve", counting)
    resumed = False
    with pytest.raises(PassError, match="Stopped"):
        run(recipe, checkpoint=tmp_path)
    resumed = True
    _, after = run(recipe, checkpoint=tmp_path)
    assert len(solved) == 14
    assert all(torch.equal(a, b) for a, b in zip(whole.weights().values(), after.weights().values(), strict=True))
    assert whole.history[-1].notes["layer_errors"] == after.history[-1].notes["layer_errors"]
    # Another option is another calibration.
    run([{"gptq": {"bits": 4, "group_size": 16}}], checkpoint=tmp_path)
    assert len(solved) == 28
