"""What passes share that let a query see fewer keys: a mask that attention knows how to skip, and what it costs.

    before                                            after
    y = attention(q, k, v, causal=True)               y = attention(q, k, v, causal=True, window=512, anchors=4)

Kernels skip the blocks of keys that no query of theirs sees, so that work follows the window, not the length.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import calibration
from graphwright.calibration import Stop
from graphwright.errors import PassError
from graphwright.heads import options_of
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops import attention
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class Difference:
    """How much one half of the channels differs from the other, over all that flows by."""

    def __init__(self) -> None:
        self.apart, self.whole = 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Adds a batch of rows [tokens, 2 * K], what is measured against in front."""
        expected, found = rows.chunk(2, 1)
        self.apart += float((found - expected).double().square().sum())
        self.whole += float(expected.double().square().sum())

    @property
    def error(self) -> float:
        """The relative error."""
        return (self.apart / max(self.whole, 1e-30)) ** 0.5


class LimitedAttention(Pass):
    """Base: subclasses say what a query sees."""

    kind = "approximate"
    requires = ("attention", "mask", "grouped_heads", "rope")
    after = ("float_dtype", "scaled_rope")
    # With the mask, because what requires one must see the final one: caches above all.
    provides = ("limited_attention", "mask")
    conflicts: ClassVar[tuple[str, ...]] = ("limited_attention",)
    undoes: ClassVar[tuple[str, ...]] = ("kv_cache", "explicit_kv_cache")

    layers: tuple[int, ...] = Field((), description="numbers of the attentions to limit, from 0; empty for all")

    @property
    def calibrates(self) -> bool:
        """The loss of each layer is measured."""
        return True

    @property
    def limits(self) -> Mapping[str, int]:
        """Options of the attention op."""
        raise NotImplementedError(f"pass {self.name} sets no limits")

    @property
    def seen(self) -> int:
        """How many keys a query sees at most."""
        return self.limits["window"] + self.limits.get("anchors", 0)

    def operands(self, editor: Editor, node: fx.Node) -> tuple[fx.Node, fx.Node, float]:
        """Query, key and scale of the new attention."""
        return node.args[0], node.args[1], float(argument(node, "scale"))  # type: ignore[return-value]

    def run(self, program: Program, context: Context) -> PassResult:
        """Limits every attention that has no window yet.

        Raises:
            PassError: caches have been inserted, a layer does not exist, every key of the longest text is seen anyway,
                or no attention is left.
        """
        refuse_after(self, program, self.undoes)
        chosen = self._chosen(program)
        made: dict[str, fx.Node] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for index, node in chosen.items():
                if editor.allow(node):
                    made[f"attention {index}"] = self._limit(editor, node)
            errors = self._measured(program, context, made)
        return PassResult(program, editor.sites, notes={"keys_seen": self.seen}, layer_errors=errors)

    def _chosen(self, program: Program) -> dict[int, fx.Node]:
        nodes = list(program.calls(attention.target))
        missing = [index for index in self.layers if not 0 <= index < len(nodes)]
        if missing:
            raise PassError(
                f"There is no attention {missing[0]}", where=f"option layers of pass {self.name}",
                fix=f"They have the numbers 0 to {len(nodes) - 1}" if nodes else "The program has no attention",
            )  # fmt: skip
        longest = program.metadata.context_length
        if longest and self.seen >= longest:
            raise PassError(
                f"A query would see {self.seen} keys, and the longest text has {longest} tokens: nothing would change",
                fix="Give a smaller window",
            )
        wanted = self.layers or range(len(nodes))
        chosen = {index: nodes[index] for index in wanted if not argument(nodes[index], "window")}
        if not chosen:
            raise PassError("No attention sees the whole text", fix="Leave the pass out")
        return chosen

    def _limit(self, editor: Editor, node: fx.Node) -> fx.Node:
        """Puts a limited attention in the place of another; returns both results, side by side."""
        query, key, scale = self.operands(editor, node)
        tensors = (argument(node, n) for n in ("query_positions", "key_positions", "bias", "alibi_slopes", "sinks"))
        options = options_of(node) | {"scale": scale, **self.limits}
        new = editor.call(attention, query, key, node.args[2], *tensors, before=node, **options)
        editor.replace(node, new, ", ".join(f"{name} {value}" for name, value in self.limits.items()))
        behind: Any = node.next
        return editor.call(aten.cat.default, [node, new], -1, before=behind)

    def _measured(self, program: Program, context: Context, made: Mapping[str, fx.Node]) -> dict[str, float]:
        batches: Sequence[Mapping[str, Tensor]] = calibration.samples(program, context)
        longest = max(next(iter(batch.values())).shape[-1] for batch in batches)
        if longest <= self.seen:
            warnings.warn(
                f"Pass {self.name} lets a query see {self.seen} keys and calibration text is {longest} tokens long: "
                "what it costs is not measured. Give a larger calibration_length",
                stacklevel=2,
            )
        errors: dict[str, float] = {}
        stops = [Stop(node, name) for name, node in made.items()]

        def visit(index: int, collected: Difference) -> dict[fx.Node, Tensor]:
            errors[stops[index].label] = collected.error
            return {}

        calibration.walk(program, batches, stops, Difference, visit, context.progress)
        return errors
