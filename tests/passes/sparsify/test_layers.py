"""Whole layers leave the graph by block influence: exact when they add nothing, in every causal family."""

import pytest
import torch
from families.configs import FAMILIES, build
from passes.quantize.quantizing import batches, run

from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.numerics import outputs_error
from graphwright.ops import attention
from graphwright.passes.sparsify.drop_layers import layers
from graphwright.program import Program
from graphwright.rewrite import Editor

CAUSAL = [name for name, family in FAMILIES.items() if family.causal]

aten = torch.ops.aten


@pytest.mark.parametrize("name", CAUSAL)
def test_layers_are_found_and_one_that_changes_nothing_goes_first(name):
    before, _ = run([], name, calibration=[])
    raised = run([], name)[1].clone()
    found = layers(raised)
    assert len(found) == len(list(raised.calls(attention.target)))
    # What the second layer adds to the stream is multiplied by zero: then it changes nothing.
    start, end = found[1]
    with Editor(raised, "silence") as editor:
        following = end.next
        zero = editor.call(aten.mul.Tensor, end, 0.0, before=following)
        plain = editor.call(aten.add.Tensor, start, zero, before=following)
        end.replace_all_uses_with(plain, delete_user_cb=lambda user: user not in (zero, plain))
    _, after = run(["drop_layers"], program=raised, calibration=batches(2))
    record = after.history[-1]
    assert record.notes["removed"] == [1]
    assert record.notes["influence"][1] == pytest.approx(0, abs=1e-5)
    assert len(list(after.calls(attention.target))) == len(found) - 1
    inputs = before.contract.draw({"batch": 2, "sequence": 7}, seed=1)
    assert outputs_error(after(**inputs), raised(**inputs), inputs) < 1e-6


def _influence(model: torch.nn.Module, ids: dict[str, torch.Tensor]) -> list[float]:
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [layer.register_forward_hook(lambda _m, i, o: states.append((i[0], o))) for layer in model.model.layers]
    with torch.no_grad():
        model(**ids)
    for hook in hooks:
        hook.remove()
    return [1 - float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in states]


def test_influence_is_the_mean_cosine_distance_of_the_hidden_states():
    model = build("llama", num_hidden_layers=3)
    program = capture(model)
    data = batches(2)
    _, after = run(
        ["drop_layers", "merge_linear", {"rtn": {"bits": 8}}, "static_cache"], program=program, calibration=data
    )
    record = next(r for r in after.history if r.name == "drop_layers")
    wanted = [_influence(model, ids) for ids in data]
    expected = torch.tensor(wanted).mean(0).tolist()
    assert record.notes["influence"] == pytest.approx(expected, abs=1e-4)
    assert record.notes["removed"] == [min(range(3), key=expected.__getitem__)]
    assert len(list(after.calls(attention.target))) == 2


def test_a_program_with_fewer_layers_is_saved_and_loaded(tmp_path):
    _, after = run([{"drop_layers": {"count": 1}}, "static_cache"])
    assert 0 < len(after.contract.state) < len(run(["static_cache"])[1].contract.state)
    after.save(tmp_path)
    assert Program.load(tmp_path).text(shapes=False) == after.text(shapes=False)


def test_bad_counts_and_orders_are_refused():
    with pytest.raises(PassError, match="2 layers are to go and the program has 2.*nearest count that is legal is 1"):
        run([{"drop_layers": {"count": 2}}])
    _, cached = run(["static_cache"])
    with pytest.raises(PassError, match="drop_layers would undo static_cache"):
        run(["drop_layers"], program=cached)
