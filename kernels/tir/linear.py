"""What the kernels of linear layers share: the weight in tiles, the split over threads, and the epilogue.

The epilogue adds a bias and a residual, or computes activation(gate) * up of a merged gate-and-up projection, as the
layer stores its output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Flat, Index, Kernel, ceil_div, floats, let, loop, minimum, splat, zeros
from graphwright.kernels.tir.functions import ACTIVATIONS, clamped_swiglu
from graphwright.kernels.tir.tiles import CHUNK, ROWS, STEP
from graphwright.ops.experts import CLAMPED_SWIGLU

ROWS_PER_TASK = 128
"""Rows of activations that share one unpacking of weight tiles."""


@dataclass(frozen=True)
class Schedule:
    """How a kernel of many rows goes about its work, which changes its speed and nothing else.

    Attributes:
        rows_per_task: rows of activations that share one unpacking of weight tiles.
        row_block: rows that are multiplied at a time in vector registers.
        tile_registers: multiply in tile registers, where there are any and groups are long enough.
    """

    rows_per_task: int = ROWS_PER_TASK
    row_block: int = 4
    tile_registers: bool = True


@dataclass(frozen=True)
class Linear:
    """A linear layer to make a kernel for, or a table to look rows up in.

    Attributes:
        outputs: N, of the weight.
        inputs: K.
        format: of the weight, one of `tiles.STEP`.
        group_size: weights that share a scale, a multiple of `tiles.STEP`; K for floats.
        asymmetric: it has zero points.
        scale_dtype: of the weight's scales; empty for floats, which have none.
        bias: one is added.
        residual: a tensor of the output's shape is added.
        activation: the weight is gate and up, merged; the output is activation(gate) * up. Empty: none.
        code_group: activation codes that share a step along K, which divides `group_size` and K; 0 for whole rows.
        gated: there is a gate; else the output is activation(up).
        alpha: of the activation `clamped_swiglu`.
        limit: of the activation `clamped_swiglu`.
        halved: the weight keeps two in four, stored as [N, K / 2] and their places; then four divides K, and
            `tiles.CHUNK` divides the groups of codes.
    """

    outputs: int
    inputs: int
    format: str
    group_size: int
    asymmetric: bool = False
    scale_dtype: str = ""
    bias: bool = False
    residual: bool = False
    activation: str = ""
    code_group: int = 0
    gated: bool = True
    alpha: float = 1.0
    limit: float = 0.0
    halved: bool = False

    @property
    def stored(self) -> int:
        """Weights of a row that are stored."""
        return self.inputs // 2 if self.halved else self.inputs

    @property
    def stored_group(self) -> int:
        """Weights of a group that are stored."""
        return self.group_size // 2 if self.halved else self.group_size

    @property
    def groups(self) -> int:
        """Groups along K, the last one padded."""
        return ceil_div(self.inputs, self.group_size)

    @property
    def tiles(self) -> int:
        """Tiles of the weight."""
        return ceil_div(self.outputs, ROWS)

    @property
    def paired(self) -> bool:
        """Each output takes a row of the gate and one of up."""
        return bool(self.activation) and self.gated

    @property
    def width(self) -> int:
        """Features of the output."""
        return self.outputs // 2 if self.paired else self.outputs

    @property
    def vectors(self) -> int:
        """64-byte vectors of one group of a tile, as stored."""
        return self.stored_group // STEP[self.format]

    @property
    def chunks(self) -> int:
        """Vectors of places of a tile."""
        return ceil_div(self.inputs, CHUNK) if self.halved else 0

    @property
    def columns(self) -> int:
        """Tasks of at most two tiles."""
        return self.width // ROWS if self.paired else ceil_div(self.tiles, 2)

    def tiles_of(self, column: Any) -> list[Any]:
        """The tiles of a task: a gate and its up, or neighbours."""
        if self.paired:
            return [column, let(column + self.tiles // 2)]
        if self.tiles == 1:
            return [column]
        # An odd last tile is computed twice by its thread, into the same place.
        return [let(column * 2), let(minimum(column * 2 + 1, tirx.const(self.tiles - 1, "int64")))]


class Weight:
    """The arguments that hold a weight in tiles, in the order in which kernels take them.

    Weights of several experts lie one behind the other.
    """

    def __init__(self, k: Kernel, layer: Linear, experts: int = 1) -> None:
        coded = bool(layer.scale_dtype)
        per_vector = 4 * ROWS if coded else ROWS
        self.elements = elements = layer.groups * layer.vectors * per_vector
        """Of one tile."""
        self.stored = k.read("weight", (experts * layer.tiles, elements), "uint8" if coded else layer.format)
        self.places = k.read("places", (layer.tiles, layer.chunks * ROWS), "int32") if layer.halved else None
        groups = (experts * layer.tiles, layer.groups, ROWS)
        self._scale = k.read("scale", groups, layer.scale_dtype) if coded else None
        self.zero = k.read("zero", groups, "uint8") if layer.asymmetric else None

    def scale(self, at: Any, lane: int, lanes: int) -> Any:
        """Scales of group `at` of all tiles, in float32."""
        return floats(self._scale.vec(at * ROWS + lane, lanes), lanes)


class Epilogue:
    """The arguments that end a linear layer, and what is done with them.

    A layer of several experts has a bias for each.
    """

    def __init__(self, k: Kernel, layer: Linear, lead: Sequence[Index], experts: int = 1) -> None:
        self._layer = layer
        self._bias = k.read("bias", (experts * layer.outputs,), "float32") if layer.bias else None
        self._residual = k.read("residual", (*lead, layer.width), "float32") if layer.residual else None
        self._out = k.write("out", (*lead, layer.width), "float32")

    def finish(
        self, row: Any, tiles: list[Any], totals: list[Flat], lanes: int, step: Any = None, expert: Any = 0
    ) -> None:
        """Stores one row of some tiles, after multiplying the sums with `step` if there is one."""
        if self._layer.paired:
            self._tile(row, tiles[0], totals, lanes, step, expert)
            return
        for tile, total in zip(tiles, totals, strict=True):
            self._tile(row, tile, [total], lanes, step, expert)

    def _tile(self, row: Any, tile: Any, totals: list[Flat], lanes: int, step: Any, expert: Any) -> None:
        layer, result = self._layer, totals[0]
        first = expert * layer.outputs
        for lane in range(0, ROWS, lanes):
            values = [total.vec(lane, lanes) for total in totals]
            if step is not None:
                values = [value * splat(step, lanes) for value in values]
            if self._bias is not None and layer.outputs % ROWS == 0:
                starts = [tile, tile + layer.tiles // 2]
                biases = (self._bias.vec(first + t * ROWS + lane, lanes) for t in starts)
                values = [v + bias for v, bias in zip(values, biases, strict=False)]
            result.put(lane, _activated(layer, values, lanes), lanes)
        self._store(row, tile, result, lanes, first)

    def _store(self, row: Any, tile: Any, result: Flat, lanes: int, first: Any) -> None:
        layer = self._layer
        start = let(row * layer.width + tile * ROWS)
        if layer.width % ROWS == 0:
            for lane in range(0, ROWS, lanes):
                value = result.vec(lane, lanes)
                if self._residual is not None:
                    value = value + self._residual.vec(start + lane, lanes)
                self._out.put(start + lane, value, lanes)
            return
        with loop(minimum(layer.width - tile * ROWS, tirx.const(ROWS, "int64"))) as i:
            value = result[i]
            if self._bias is not None:
                value = value + self._bias[first + tile * ROWS + i]
            if self._residual is not None:
                value = value + self._residual[start + i]
            self._out.put(start + i, value, 1)


def _activated(layer: Linear, values: list[Any], lanes: int) -> Any:
    """The output from a row's values: one, or those of the gate and of up."""
    if not layer.activation:
        return values[0]
    if layer.activation == CLAMPED_SWIGLU:
        return clamped_swiglu(let(values[0]), values[1], layer.alpha, layer.limit, lanes)
    activated = ACTIVATIONS[layer.activation](let(values[0]), lanes)
    return activated * values[1] if layer.gated else activated


def clear(sums: Flat, elements: int, dtype: str, lanes: int) -> None:
    """Sets sums to zero."""
    for lane in range(0, elements, lanes):
        sums.put(lane, zeros(dtype, lanes), lanes)
