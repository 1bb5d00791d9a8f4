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

Values that are the first channels of the keys, as after `latent_attention`, have no cache of their own.
"""

import torch
from torch import Tensor, fx

from graphwright.contract import Dim, InputSpec, StateSpec
from graphwright.errors import PassError
from graphwright.feeding import logits_in_chunks, token_inputs
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
    after = ("float_dtype", "merged_linear", "pruned", "fewer_layers", "scaled_rope", "latent_attention")
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
        ends = sorted({length // 2, length - 2, length - 1, length} - {0, -1})
        actual = logits_in_chunks(after, ids, mask, ends)
        return relative_error(actual[mask.bool()], expected[mask.bool()])


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
        shared = _shared_channels(node)
        caches = [(1, self.inputs[f"key_cache_{index}"])]
        caches += [] if shared else [(2, self.inputs[f"value_cache_{index}"])]
        window = _ring_size(self.editor.program, node)
        held = [self._ring(node, *c, window) if window else self._contiguous(node, *c) for c in caches]
        if shared:
            held.append(self.editor.call(aten.slice.Tensor, held[0], 3, 0, shared, before=node))
        key_positions = self._ring_positions(window)[0] if window else self.key_positions
        self.windows += bool(window)
        args = [node.args[0], *held, self.positions, key_positions, *node.args[5:]]
        new = self.editor.call(attention, *args, before=node, **node.kwargs)
        self.editor.replace(node, new, f"ring of {window}" if window else "contiguous")

    def _contiguous(self, node: fx.Node, which: int, cache: fx.Node) -> fx.Node:
        self.editor.call(kv_cache_update, cache, node.args[which], self.positions, before=node)
        return self.editor.call(aten.slice.Tensor, cache, 2, 0, self.keys, before=node)

    def _ring(self, node: fx.Node, which: int, cache: fx.Node, window: int) -> fx.Node:
        _, slots = self._ring_positions(window)
        old = self.editor.call(aten.slice.Tensor, cache, 2, 0, window, before=node)
        joined = self.editor.call(aten.cat.default, [old, node.args[which]], 2, before=node)
        self.editor.call(kv_cache_update, cache, node.args[which], slots, before=node)
        return joined

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


def _shared_channels(node: fx.Node) -> int:
    """How many of the keys' first channels are the values; 0 where values are a tensor of their own."""
    key, value = node.args[1], node.args[2]
    if value.target is not aten.slice.Tensor or value.args[0] is not key or tuple(value.args[1:3]) != (3, 0):
        return 0
    return int(value.meta["val"].shape[3])


def _cache_specs(program: Program, index: int, node: fx.Node) -> list[StateSpec]:
    window = _ring_size(program, node)
    specs = []
    for which, name in ((1, "key_cache"), (2, "value_cache"))[: 1 if _shared_channels(node) else 2]:
        value: Tensor = node.args[which].meta["val"]
        slots: int | str = window + 1 if window else "capacity"
        shape = ("batch", int(value.shape[1]), slots, int(value.shape[3]))
        specs.append(StateSpec(f"{name}_{index}", value.dtype, shape))
    return specs
