"""What a rotary table means: positions, frequencies, scaling and layout, found by evaluating it."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.evaluate import evaluate, index_domain
from graphwright.program import Program

aten = torch.ops.aten

SEQUENCE = 11
ANGLE_TOLERANCE = 1e-5
TABLE_TOLERANCE = 1e-2
"""A table may be rounded to bfloat16; a wrong frequency is off by far more within the first positions."""
ANGLE_SOURCES = {aten.cos.default: 0, aten.sin.default: 0, aten.polar.default: 1}
"""Ops whose argument, at this place, is the angle."""


@dataclass(frozen=True)
class Table:
    """A proven rotary table: cos and sin of position * frequency, times scaling."""

    positions: fx.Node
    inv_freq: Tensor
    buffer: str
    """Name of the model's own frequency buffer if it holds the same numbers, else empty."""
    scaling: float
    doubled: bool
    """Whether the table repeats its frequencies for both halves of the channels."""


class Tables:
    """Analyses tables of one program, each pair once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.domain = index_domain(program)
        self._known: dict[tuple[fx.Node, fx.Node], Table | str] = {}

    def read(self, cos: fx.Node, sin: fx.Node) -> Table | str:
        """The meaning of a pair of tables [1|B, 1, S, R] or [1|B, S, 1, R], or the reason why it is none.

        A complex table is passed as both.
        """
        if (cos, sin) not in self._known:
            self._known[cos, sin] = self._read(cos, sin)
        return self._known[cos, sin]

    def _read(self, cos: fx.Node, sin: fx.Node) -> Table | str:
        if cos not in self.domain or sin not in self.domain:
            return "the table depends on activations"
        angle = _angle(cos)
        if angle is None:
            return "no cosine is found behind the table"
        integers = [n for n in _ancestors(angle) if n in self.domain and _is_positions(n)]
        if not integers:
            return "no integer positions are found behind the table"
        wanted = [cos, sin, angle, _unrounded(cos), _unrounded(sin), *integers]
        c, s, angles, *exact = evaluate(self.program, wanted, batch=2, sequence=SEQUENCE)
        candidates = exact[2:]
        scaling = _radius(*_parts(*exact[:2]))
        c, s = _parts(c, s)
        length = angles.shape[-2]
        c, s, angles = (v.float().reshape(-1, length, v.shape[-1])[0] for v in (c, s, angles))
        for node, candidate in zip(integers, candidates, strict=True):
            found = self._fit(node, candidate[0], angles, c, s, scaling) if candidate.shape[-1] == length else None
            if found is not None:
                return found
        return "the table is not cos and sin of position * frequency"

    def _fit(
        self, node: fx.Node, positions: Tensor, angles: Tensor, c: Tensor, s: Tensor, scaling: float
    ) -> Table | None:
        ones = (positions == 1).nonzero()
        if ones.numel() == 0:
            return None
        inv_freq = angles[int(ones[0])]
        if (angles - positions[:, None].float() * inv_freq).abs().max() > ANGLE_TOLERANCE:
            return None
        width = inv_freq.shape[0]
        if width % 2 == 0 and torch.equal(inv_freq[: width // 2], inv_freq[width // 2 :]):
            inv_freq = inv_freq[: width // 2]
        doubled = c.shape[1] == 2 * inv_freq.shape[0]
        layout = torch.cat([inv_freq, inv_freq]) if doubled else inv_freq
        if c.shape[1] != layout.shape[0]:
            return None
        want = positions[:, None].float() * layout
        off = torch.maximum((c - want.cos() * scaling).abs().max(), (s - want.sin() * scaling).abs().max())
        if off > TABLE_TOLERANCE:
            return None
        return Table(node, inv_freq, self._buffer(inv_freq), _round(scaling), doubled)

    def _buffer(self, inv_freq: Tensor) -> str:
        for name, tensor in self.program.weights().items():
            if tensor.shape == inv_freq.shape and tensor.dtype == torch.float32 and torch.equal(tensor, inv_freq):
                return name
        return ""


def _unrounded(table: fx.Node) -> fx.Node:
    """The table before it was cast to the dtype of a narrow model."""
    wide = (torch.float32, torch.complex64)
    return next((n for n in _ancestors(table) if getattr(n.meta["val"], "dtype", None) in wide), table)


def _parts(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (cos.real, cos.imag) if cos.is_complex() else (cos, sin)


def _radius(cos: Tensor, sin: Tensor) -> float:
    return float((cos.float().square() + sin.float().square()).sqrt().mean())


def _round(scaling: float) -> float:
    return 1.0 if abs(scaling - 1.0) < 1e-6 else scaling


def _is_positions(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2


def _angle(table: fx.Node) -> fx.Node | None:
    for node in _ancestors(table):
        if node.target in ANGLE_SOURCES:
            angle = node.args[ANGLE_SOURCES[node.target]]
            return angle if isinstance(angle, fx.Node) else None
    return None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and what it depends on, nearest first."""
    found, queue = [node], [node]
    while queue:
        for source in queue.pop(0).all_input_nodes:
            if source not in found:
                found.append(source)
                queue.append(source)
    return found
