"""Folding permutations into weights: the channels of a group, its heads, or the residual stream in another order.

    for group in channel_groups(program):
        permute(editor, group, order)            # the function stays what it was
    permute_stream(editor, residual_stream(program, PERMUTABLE), order)

A group of `graphwright.dependency` lists every constant that has a part per unit; all of them get their parts in the
new order. The residual stream is that of `graphwright.rotation`; norms over all channels do not mind their order, so
layer norms are no obstacle here. Names of modules are never read.
"""

import torch
from torch import Tensor, fx

from graphwright.dependency import Group
from graphwright.folding import Operand, value_of
from graphwright.ops import rms_norm
from graphwright.rewrite import Editor
from graphwright.rotation import Stream

PERMUTABLE = {rms_norm.target: (1,), torch.ops.aten.layer_norm.default: (2, 3)}
"""Norms that do not mind the order of channels, and their arguments that have one number per channel."""


def permute(editor: Editor, group: Group, order: Tensor) -> None:
    """Puts unit `order[i]` of a group in the place of unit i; `order` is int64 [units]."""
    for member in group.members:
        operand = member.operand
        whole = value_of(editor.program, operand)
        sources = order.new_tensor(range(whole.shape[operand.axis]))
        sources[member.places.flatten()] = member.places[order].flatten()
        _reorder(editor, operand, sources)
    editor.note(group.source, f"{group.name}: {group.units} units in another order")


def permute_stream(editor: Editor, stream: Stream, order: Tensor) -> None:
    """Puts channel `order[i]` of a stream in the place of channel i; `order` is int64 [width]."""
    for norm, weights in stream.norms.items():
        for operand in (*_affine(norm), *weights):
            _reorder(editor, operand, order)
        editor.note(norm, f"{len(weights)} layers")
    for operand in (*stream.writes, *stream.reads):
        _reorder(editor, operand, order)


def _affine(norm: fx.Node) -> list[Operand]:
    """The gain and bias of a norm."""
    return [
        Operand(norm, position, 0)
        for position in PERMUTABLE[norm.target]
        if len(norm.args) > position and isinstance(norm.args[position], fx.Node)
    ]


def _reorder(editor: Editor, operand: Operand, sources: Tensor) -> None:
    value = value_of(editor.program, operand)
    editor.set_weight(operand.node, operand.position, value.index_select(operand.axis, sources).contiguous())
