"""Caches as inputs and outputs: what has been seen goes in as past tensors, and comes out as present tensors.

    before                                          after
    k, v = heads(x)          [B, Hkv, S, D]         present_key = cat(past_key, k)         [B, Hkv, P + S, D]
    y = attention(q, k, v,                          present_value = cat(past_value, v)
                  key_positions=unpadded)           y = attention(q, present_key, present_value,
                                                                  query_positions, key_positions)
    return logits                                   return logits, present_key, present_value

The program becomes a pure function, which is what interchange formats carry; one graph serves prefill (P = 0) and
decode. `key_mask` [B, P + S] is one for every key that is a token and zero for padding; a token's place in its
sequence is the number of tokens before it, so the masks follow from it alone. `positions` [B, S] is what rotary and
learned position embeddings read; models that have neither do not take it.

A sliding window masks keys and drops none: past and present have one length in all layers.
"""

import operator

import torch
from torch import Tensor, fx

from graphwright.contract import Dim, InputSpec
from graphwright.errors import PassError
from graphwright.feeding import token_inputs
from graphwright.numerics import relative_error
from graphwright.ops import attention
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.kv_cache._causal import position_nodes, require_causal
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract

aten = torch.ops.aten

VERIFY_LENGTH = 9


class ExplicitCache(Pass):
    """Key and value caches as past inputs and present outputs."""

    name = "explicit_cache"
    kind = "structural"
    paper = Paper("Efficiently Scaling Transformer Inference", "Pope et al.", 2022, "2211.05102")
    requires = ("attention", "mask", "grouped_heads", "rope")
    provides = ("explicit_kv_cache",)
    after = ("float_dtype", "merged_linear", "pruned", "fewer_layers", "quantized", "quantized_activations")
    conflicts = ("kv_cache", "explicit_kv_cache", "selected_logits")

    def run(self, program: Program, context: Context) -> PassResult:
        """Adds past inputs and present outputs.

        Raises:
            PassError: the program is not a causal language model, or an attention's mask cannot follow a cache.
        """
        layers = list(program.calls(attention.target))
        require_causal(program, layers)
        positions = position_nodes(program)
        longest = program.metadata.context_length
        past = [spec for index, node in enumerate(layers) for spec in _past_specs(index, node)]
        place = [InputSpec("positions", torch.int64, ("batch", "sequence"), "position", longest)] if positions else []
        mask = InputSpec("key_mask", torch.int64, ("batch", "total"), "attention_mask")
        dims = (Dim("past", 0, longest), Dim("total", 1, longest))
        inputs = extend_contract(program, inputs=(mask, *place, *past), dims=dims)
        with Editor(program, self.name) as editor:
            start = next(node for node in program.graph.nodes if node.op != "placeholder")
            _replace_positions(editor, inputs, positions, start)
            query_positions, key_positions = _masked_positions(editor, inputs, start)
            for index, node in enumerate(layers):
                key, value = (
                    editor.call(aten.cat.default, [inputs[f"past_{kind}_{index}"], node.args[which]], 2, before=node)
                    for which, kind in ((1, "key"), (2, "value"))
                )
                args = [node.args[0], key, value, query_positions, key_positions, *node.args[5:]]
                editor.replace(node, editor.call(attention, *args, before=node, **node.kwargs))
                _return_also(program, {f"present_key_{index}": key, f"present_value_{index}": value})
            _rebase_sizes(editor, inputs, start)
        if "attention_mask" in inputs:
            if inputs["attention_mask"].users:
                user = next(iter(inputs["attention_mask"].users))
                raise PassError("The attention mask is used outside of attention and positions", where=describe(user))
            extend_contract(program, drop=("attention_mask",))
        return PassResult(program, editor.sites, notes={"layers": len(layers)})

    def verify(self, before: Program, after: Program, context: Context) -> float:
        """Compares a left-padded prefill in two chunks and two decode steps with the whole cache-free forward."""
        token = before.contract.input("token")
        high = max(token.high, 2) if token else 2
        length = min(VERIFY_LENGTH, before.contract.dim("sequence").max)
        ids = torch.randint(0, high, (2, length), generator=context.generator())
        mask = torch.ones_like(ids)
        expected = before(**token_inputs(before, ids, mask))[0]
        padding = 2
        shifted = torch.nn.functional.pad(ids, (padding, 0))
        mask = torch.nn.functional.pad(mask, (padding, 0))
        ends = (padding + length // 2, padding + length - 2, padding + length - 1, padding + length)
        return relative_error(in_chunks(after, shifted, mask, ends)[:, padding:], expected)


def in_chunks(program: Program, ids: Tensor, mask: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Logits [B, T, V] of `ids` [B, T] with `mask` [B, T], fed in chunks that end before each of `ends`."""
    parts, start = [], 0
    held = empty_past(program, ids.shape[0])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for end in sorted(set(ends) - {0}):
        step = {"input_ids": ids[:, start:end], "key_mask": mask[:, :end], "positions": places[:, start:end]}
        taken = {name: tensor for name, tensor in step.items() if name in program.contract.names}
        logits, *present = program(**taken, **held)
        held = dict(zip(held, present, strict=True))
        parts.append(logits)
        start = end
    return torch.cat(parts, dim=1)


def empty_past(program: Program, batch: int) -> dict[str, Tensor]:
    """Past tensors of length zero, in the order of the present outputs."""
    specs = [spec for spec in program.contract.inputs if spec.name.startswith("past_")]
    sizes = {"batch": batch, "past": 0}
    return {
        spec.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)
        for spec in specs
    }


def _past_specs(index: int, node: fx.Node) -> list[InputSpec]:
    specs = []
    for which, kind in ((1, "key"), (2, "value")):
        value: Tensor = node.args[which].meta["val"]
        shape = ("batch", int(value.shape[1]), "past", int(value.shape[3]))
        specs.append(InputSpec(f"past_{kind}_{index}", value.dtype, shape))
    return specs


def _replace_positions(
    editor: Editor, inputs: dict[str, fx.Node], positions: list[tuple[fx.Node, int]], start: fx.Node
) -> None:
    """Lets what read a position expression read the input instead; padding may hold any number."""
    for node, offset in positions:
        real = editor.call(aten.clamp.default, inputs["positions"], 0, before=start)
        editor.replace(node, editor.call(aten.add.Tensor, real, offset, before=start) if offset else real, "positions")


def _masked_positions(editor: Editor, inputs: dict[str, fx.Node], start: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Positions of queries [B, S] and keys [B, P + S] by counting tokens; -1 for padding."""

    def call(target: object, *args: object) -> fx.Node:
        return editor.call(target, *args, before=start)

    real = call(aten.ne.Scalar, inputs["key_mask"], 0)
    counted = call(aten.sub.Tensor, call(aten.cumsum.default, real, 1), 1)
    keys = call(aten.where.ScalarOther, real, counted, -1)
    # The new tokens are the last ones: their number is the one size that this program has no other word for.
    new = call(aten.sym_size.int, inputs["input_ids"], 1)
    total = call(aten.sym_size.int, inputs["key_mask"], 1)
    first = call(operator.sub, total, new)
    return call(aten.slice.Tensor, keys, 1, first, total), keys


def _rebase_sizes(editor: Editor, inputs: dict[str, fx.Node], start: fx.Node) -> None:
    """Batch and sequence are the sizes of the tokens, not of a mask that goes away."""
    mask = inputs.get("attention_mask")
    for user in list(mask.users) if mask is not None else []:
        if user.target is aten.sym_size.int:
            size = editor.call(aten.sym_size.int, inputs["input_ids"], user.args[1], before=start)
            user.replace_all_uses_with(size)


def _return_also(program: Program, outputs: dict[str, fx.Node]) -> None:
    node = program.graph.output_node()
    node.args = ((*node.args[0], *outputs.values()),)  # type: ignore[misc]
    program.contract = program.contract.with_(outputs=(*program.contract.outputs, *outputs))
