"""The editor's bookkeeping of weights."""

import torch
from torch import nn

from graphwright.capture import capture
from graphwright.rewrite import Editor

aten = torch.ops.aten


class Tied(nn.Module):
    """Two linear layers over one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)


def test_a_retired_call_takes_along_the_weights_that_only_it_read():
    program = capture(Tied(), (torch.randn(2, 4),))
    x = torch.randn(5, 4)
    (name,), (expected,) = program.contract.names, program(**{program.contract.names[0]: x})
    (weight,) = program.weights()
    with Editor(program, "test") as editor:
        for count, node in enumerate(list(program.calls(aten.linear.default))):
            copy = editor.weight(f"copy_{count}", program.weight(weight).clone(), before=node)
            editor.replace(node, editor.call(aten.linear.default, node.args[0], copy, before=node))
            editor.retire(node)
            # The second layer still reads the weight after the first has gone.
            assert (weight in dict(program.module.named_buffers()) | dict(program.module.named_parameters())) == (
                count == 0
            )
            assert node not in program.graph.nodes
    assert list(program.weights()) == ["copy_0", "copy_1"]
    assert torch.equal(program(**{name: x})[0], expected)
