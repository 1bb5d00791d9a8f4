"""Cache insertion: a cache-free causal program becomes one that serves prefill and decode (Pope et al. 2022).

    before                                            after
    k, v = heads(x)              [B, Hkv, S, D]       k, v = heads(x)                       S new tokens
    y = attention(q, k, v,                            kv_cache_update(key_cache, k, positions)
                  key_positions=unpadded)             kv_cache_update(value_cache, v, positions)
                                                      y = attention(q, key_cache[:T], value_cache[:T],
                                                                    positions, key_positions)

The input `positions` [B, S] gives each new token its place in its own sequence, and -1 to padding, on either side; it
carries the lengths of ragged batches. A token lies in the slot of its position, so every causal mask follows from
positions alone. `key_positions` [T] is 0 … T-1, with T the slots that may be in use: work follows T, not capacity.

Attention with a sliding window that is shorter than the context keeps a ring of `window` slots. Its new tokens attend
to the ring as it was and to each other, and are written afterwards, so a prefill longer than the window is exact.
"""

import torch
from torch import Tensor, fx

from graphwright.contract import Dim, InputSpec, StateSpec
from graphwright.errors import PassError
from graphwright.feeding import token_inputs
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import attention, kv_cache_update
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.kv_cache._causal import position_nodes, require_causal
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract

aten = torch.ops.aten

VERIFY_LENGTH = 9


class StaticCache(Pass):
    """Contiguous key and value caches, rings for sliding windows."""

    name = "static_cache"
    kind = "structural"
    paper = Paper("Efficiently Scaling Transformer Inference", "Pope et al.", 2022, "2211.05102")
    requires = ("attention", "mask", "grouped_heads", "rope")
    provides = ("kv_cache",)
    after = ("float_dtype", "merged_linear", "pruned", "fewer_layers", "scaled_rope")
    conflicts = ("kv_cache",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Inserts the caches.

        Raises:
            PassError: the program is not a causal language model, or an attention's mask cannot follow a cache.
        """
        layers = list(program.calls(attention.target))
        require_causal(program, layers)
        positions = position_nodes(program)
        state = [spec for index, node in enumerate(layers) for spec in _cache_specs(program, index, node)]
        longest = program.metadata.context_length
        inputs = extend_contract(
            program,
            inputs=(
                InputSpec("positions", torch.int64, ("batch", "sequence"), "position", longest),
                InputSpec("key_positions", torch.int64, ("keys",), "key_position", longest),
            ),
            state=tuple(state),
            dims=(Dim("keys", 1, longest), Dim("capacity", 2, longest + 1)),
        )
        with Editor(program, self.name) as editor:
            insertion = _Insertion(editor, inputs)
            for node, offset in positions:
                insertion.replace_positions(node, offset)
            for index, node in enumerate(layers):
                insertion.cache(index, node)
            insertion.rebase_sizes()
        if "attention_mask" in inputs:
            if inputs["attention_mask"].users:
                user = next(iter(inputs["attention_mask"].users))
                raise PassError("The attention mask is used outside of attention and positions", where=describe(user))
            extend_contract(program, drop=("attention_mask",))
        return PassResult(program, editor.sites, notes={"layers": len(layers), "windows": insertion.windows})

    def verify(self, before: Program, after: Program, context: Context) -> float:
        """Compares a ragged prefill in two chunks and two decode steps with the whole cache-free forward."""
        token = before.contract.input("token")
        generator = context.generator()
        length = min(VERIFY_LENGTH, before.contract.dim("sequence").max)
        ids = torch.randint(0, max(token.high, 2) if token else 2, (2, length), generator=generator)
        lengths = torch.tensor([length, max(1, length - 3)])
        mask = (torch.arange(length)[None] < lengths[:, None]).long()
        expected = before(**token_inputs(before, ids, mask))[0]
        actual = _in_chunks(after, ids, mask, (length // 2, length - 2, length - 1, length))
        return relative_error(actual[mask.bool()], expected[mask.bool()])


def _in_chunks(program: Program, ids: Tensor, mask: Tensor, ends: tuple[int, ...]) -> Tensor:
    everything = token_inputs(program, ids, mask)
    state = {spec.name: everything[spec.name] for spec in program.contract.state}
    parts, start = [], 0
    for end in sorted(set(ends) - {0}):
        chunk = {
            "input_ids": ids[:, start:end],
            "positions": everything["positions"][:, start:end],
            "key_positions": torch.arange(end),
        }
        parts.append(program(**chunk, **state)[0])
        start = end
    return torch.cat(parts, dim=1)


class _Insertion:
    """The edit in progress: the editor, the placeholders, and what several layers share."""

    def __init__(self, editor: Editor, inputs: dict[str, fx.Node]) -> None:
        self.editor = editor
        self.inputs = inputs
        self.windows = 0
        self.positions = inputs["positions"]
        self._start = next(n for n in editor.program.graph.nodes if n.op != "placeholder")
        self._rings: dict[int, tuple[fx.Node, fx.Node]] = {}
        key_positions = inputs["key_positions"]
        self.keys = self._call(aten.sym_size.int, key_positions, 0)
        self.key_positions = self._call(aten.unsqueeze.default, key_positions, 0)

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self.editor.call(target, *args, before=self._start, **kwargs)

    def replace_positions(self, node: fx.Node, offset: int) -> None:
        """Lets what read a position expression read the input instead; padding reads position 0."""
        real = self._call(aten.clamp.default, self.positions, 0)
        self.editor.replace(node, self._call(aten.add.Tensor, real, offset) if offset else real, "positions")

    def rebase_sizes(self) -> None:
        """Batch and sequence are the sizes of the tokens, not of a mask that goes away."""
        mask, tokens = self.inputs.get("attention_mask"), self.inputs["input_ids"]
        for user in list(mask.users) if mask is not None else []:
            if user.target is aten.sym_size.int:
                size = self._call(aten.sym_size.int, tokens, user.args[1])
                user.replace_all_uses_with(size)

    def cache(self, index: int, node: fx.Node) -> None:
        """Puts caches between one attention and its keys and values."""
        key_cache, value_cache = self.inputs[f"key_cache_{index}"], self.inputs[f"value_cache_{index}"]
        window = _ring_size(self.editor.program, node)
        if window:
            key, value, key_positions = self._ring(node, key_cache, value_cache, window)
        else:
            key, value = (self._contiguous(node, i, c) for i, c in ((1, key_cache), (2, value_cache)))
            key_positions = self.key_positions
        args = [node.args[0], key, value, self.positions, key_positions, *node.args[5:]]
        new = self.editor.call(attention, *args, before=node, **node.kwargs)
        self.editor.replace(node, new, f"ring of {window}" if window else "contiguous")

    def _contiguous(self, node: fx.Node, which: int, cache: fx.Node) -> fx.Node:
        self.editor.call(kv_cache_update, cache, node.args[which], self.positions, before=node)
        return self.editor.call(aten.slice.Tensor, cache, 2, 0, self.keys, before=node)

    def _ring(
        self, node: fx.Node, key_cache: fx.Node, value_cache: fx.Node, window: int
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        self.windows += 1
        key_positions, slots = self._ring_positions(window)
        joined = []
        for cache, new in ((key_cache, node.args[1]), (value_cache, node.args[2])):
            old = self.editor.call(aten.slice.Tensor, cache, 2, 0, window, before=node)
            joined.append(self.editor.call(aten.cat.default, [old, new], 2, before=node))
            self.editor.call(kv_cache_update, cache, new, slots, before=node)
        return joined[0], joined[1], key_positions

    def _ring_positions(self, window: int) -> tuple[fx.Node, fx.Node]:
        """Positions of [ring before this call, new tokens], and the slots of the new tokens.

        Slot s holds the last position before the new tokens that is s modulo the ring's size. Of the new tokens
        only the last `window` are written, so that no two want one slot.
        """
        if window not in self._rings:
            call, positions = self._call, self.positions
            far = call(aten.where.ScalarOther, call(aten.ge.Scalar, positions, 0), positions, 1 << 40)
            past = call(aten.sub.Tensor, call(aten.amin.default, far, [1], True), 1)
            last = call(aten.amax.default, positions, [1], True)
            slot = call(aten.unsqueeze.default, call(aten.arange.default, window), 0)
            age = call(aten.remainder.Scalar, call(aten.sub.Tensor, past, slot), window)
            held = call(aten.clamp.default, call(aten.sub.Tensor, past, age), -1)
            recent = call(aten.gt.Tensor, positions, call(aten.sub.Tensor, last, window))
            wrapped = call(aten.remainder.Scalar, positions, window)
            written = call(aten.logical_and.default, recent, call(aten.ge.Scalar, positions, 0))
            slots = call(aten.where.ScalarOther, written, wrapped, -1)
            self._rings[window] = (call(aten.cat.default, [held, positions], 1), slots)
        return self._rings[window]


def _ring_size(program: Program, node: fx.Node) -> int:
    """The window of an attention if it is shorter than the context and all that is seen, else 0."""
    window: int = argument(node, "window")
    return window if 0 < window < program.metadata.context_length and not argument(node, "anchors") else 0


def _cache_specs(program: Program, index: int, node: fx.Node) -> list[StateSpec]:
    window = _ring_size(program, node)
    specs = []
    for which, name in ((1, "key_cache"), (2, "value_cache")):
        value: Tensor = node.args[which].meta["val"]
        slots: int | str = window + 1 if window else "capacity"
        shape = ("batch", int(value.shape[1]), slots, int(value.shape[3]))
        specs.append(StateSpec(f"{name}_{index}", value.dtype, shape))
    return specs
