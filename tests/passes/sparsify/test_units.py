"""Structured pruning: dependency groups of every causal family, exact where the removed units are zero."""

import pytest
import torch
from families.configs import FAMILIES
from passes.quantize.quantizing import batches, run

from graphwright.capture import capture
from graphwright.dependency import channel_groups, cut, head_groups, settle, split_merged
from graphwright.errors import PassError
from graphwright.numerics import outputs_error
from graphwright.ops import attention
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.structure import linears

CAUSAL = [name for name, family in FAMILIES.items() if family.causal]

NO_CHANNELS = {"mixtral", "gpt_oss"}
"""Their MLPs are experts, of which each tensor holds many."""


def zeroed(program: Program, kind: str) -> tuple[Program, Program, int]:
    """A program with every second unit zero, the same with those cut, and the number of groups."""
    before = program.clone()
    with Editor(before, "split") as editor:
        split_merged(editor)
    after = before.clone()
    # Clones share modules' tensors: zeros go into copies of the weights.
    for one in (before, after):
        for group in _groups(one, kind):
            keep = keep_of(group.units)
            for member in group.members:
                read = member.operand.node.args[member.operand.position]
                if member.operand.node.target is attention.target:
                    continue
                tensor = one.weight(read).clone()
                tensor.index_fill_(member.operand.axis, member.places[~keep].flatten(), 0.0)
                with Editor(one, "zero") as editor:
                    new = editor.weight(f"{read.target}_zeroed", tensor, member.operand.node)
                    member.operand.node.update_arg(member.operand.position, new)
    groups = _groups(after, kind)
    with Editor(after, "cut") as editor:
        for group in groups:
            cut(editor, group, keep_of(group.units))
        after.graph.eliminate_dead_code()
        settle(after)
    return before, after, len(groups)


def keep_of(units: int) -> torch.Tensor:
    keep = torch.ones(units, dtype=torch.bool)
    keep[1::2] = False
    return keep


def _groups(program: Program, kind: str) -> list:
    return channel_groups(program) if kind == "channels" else head_groups(program)[0]


@pytest.mark.parametrize("kind", ["channels", "heads"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cutting_units_that_are_zero_changes_nothing(name, kind, tmp_path):
    _, program = run([], name, calibration=[])
    before, after, count = zeroed(program, kind)
    if kind == "channels" and name in NO_CHANNELS:
        assert count == 0
        return
    assert count >= 2 or name in {"qwen3_moe", "deepseek_v2", "deepseek_v3"}
    inputs = before.contract.draw({"batch": 2, "sequence": 7}, seed=1)
    assert outputs_error(after(**inputs), before(**inputs), inputs) < 1e-5
    one = before.contract.draw({"batch": 1, "sequence": 1}, seed=1)
    assert outputs_error(after(**one), before(**one), one) < 1e-5
    assert sum(t.numel() for t in after.weights().values()) < sum(t.numel() for t in before.weights().values())
    after.save(tmp_path)
    assert torch.equal(Program.load(tmp_path)(**inputs)[0], after(**inputs)[0])


@pytest.mark.parametrize("score", ["magnitude", "wanda", "taylor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_channels_are_cut_and_everything_composes_behind(name, score):
    pruning = {"prune_channels": {"ratio": 0.25, "score": score}}
    _, after = run(["static_cache", pruning, {"rtn": {"bits": 8}}, "merge_linear"], name, calibration=batches(2))
    names = [record.name for record in after.history]
    assert names.index("prune_channels") < names.index("merge_linear") < names.index("rtn")
    record = next(r for r in after.history if r.name == "prune_channels")
    width = 96 if name == "llama" else 256
    assert list(record.notes["removed"].values()) == [[width // 4, width]] * 2


@pytest.mark.parametrize("score", ["magnitude", "wanda", "taylor"])
def test_the_least_important_channel_goes(score):
    _, program = run([])
    program = program.clone()
    group = channel_groups(program)[0]
    with Editor(program, "zero") as editor:
        for member in group.members:
            read = member.operand.node.args[member.operand.position]
            tensor = program.weight(read).clone()
            tensor.index_fill_(member.operand.axis, torch.arange(5, 13), 1e-6)
            member.operand.node.update_arg(member.operand.position, editor.weight("w", tensor, member.operand.node))
    before = program.clone()
    _, after = run([{"prune_channels": {"ratio": 0.1, "score": score, "multiple": 1}}], program=program)
    kept = next(t for n, t in after.weights().items() if t.shape == (64, 87))
    old = before.weight(channel_groups(before)[0].members[0].operand.node.args[1])
    assert torch.isin(kept[0], torch.cat([old[0, :5], old[0, 13:]])).sum() >= 86


def test_heads_go_with_their_group():
    _, after = run([{"prune_heads": {"ratio": 0.5}}, "static_cache"])
    for node in after.calls(attention.target):
        assert node.args[0].meta["val"].shape[1] == 2
        assert node.args[1].meta["val"].shape[1] == 1


def test_all_query_heads_of_one_key_go_one_by_one():
    _, after = run([{"prune_heads": {"ratio": 0.25}}, "static_cache"], "falcon")
    for node in after.calls(attention.target):
        assert [node.args[place].meta["val"].shape[1] for place in range(3)] == [3, 1, 1]


class Twice(torch.nn.Module):
    """Two MLPs that share the weight that reads their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = (torch.nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.one(x)))
        return x + self.down(torch.relu(self.two(x)))


def test_tied_weights_stay_tied():
    program = capture(Twice(), {"x": torch.randn(2, 16)})
    pruning = {"prune_channels": {"ratio": 0.5, "score": "magnitude"}}
    with pytest.raises(PassError, match="No channels can be cut: down.weight: the weight down.weight is tied"):
        run([pruning], program=program, calibration=[])


def test_a_layer_is_never_cut_away():
    _, after = run([{"prune_heads": {"ratio": 0.99}}, {"prune_channels": {"ratio": 0.99, "multiple": 1}}])
    assert all(node.args[1].meta["val"].shape[1] == 1 for node in after.calls(attention.target))
    assert sum(1 in after.weight(w).shape for _, w in linears(after)) == 6
    _, single = run([{"prune_heads": {"ratio": 0.99}}], program=after)
    with pytest.raises(PassError, match="No groups of heads can be cut: .* belongs to one head alone"):
        run([{"prune_heads": {"ratio": 0.5}}], program=single)


def test_bad_input_is_refused():
    with pytest.raises(PassError, match="0.3 removes none of 2 groups of heads.*nearest ratio that is legal is 0.5"):
        run([{"prune_heads": {"ratio": 0.3}}])
    with pytest.raises(PassError, match="No channels can be cut"):
        run(["prune_channels"], "mixtral")
    _, cached = run(["static_cache"])
    with pytest.raises(PassError, match="prune_heads would undo static_cache"):
        run(["prune_heads"], program=cached)
