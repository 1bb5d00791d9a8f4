"""What the experts of a layer compute: the middle is compared with known activations, and the whole with the op."""

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import experts
from graphwright.ops.experts import CLAMPED_SWIGLU, activate
from graphwright.ops.gated_activation import ACTIVATIONS
from graphwright.passes.moe._evaluate import Sizes, UnknownError, constants, evaluate
from graphwright.passes.moe._products import Layer, Product, selects, source
from graphwright.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Mlp:
    """What the experts of a layer compute."""

    up: Tensor
    up_bias: fx.Node | None
    down: Tensor
    down_bias: fx.Node | None
    activation: str
    gated: bool
    interleaved: bool
    alpha: float = 1.0
    limit: float = 0.0


def understood(program: Program, layer: Layer, generator: torch.Generator) -> Mlp:
    """The meaning of a layer, checked as a whole."""
    raw, up_bias = _biased(layer.up.node)
    _, down_bias = _biased(layer.down.node)
    activation, gated, interleaved, alpha, limit = _activation(program, raw, layer.down.rows, generator)
    up, down = (outputs_first(program, p) for p in (layer.up, layer.down))
    if up.shape[0] != down.shape[0]:
        raise UnknownError(f"{up.shape[0]} weights go in and {down.shape[0]} come out")
    choices = int(layer.indices.meta["val"].shape[1])
    if choices > up.shape[0]:
        raise UnknownError(f"each token chooses {choices} of {up.shape[0]} experts")
    mlp = Mlp(up, up_bias, down, down_bias, activation, gated, interleaved, alpha, limit)
    sizes = Sizes(layer.x.meta["val"].shape)
    x = torch.randn(sizes.tokens, layer.x.meta["val"].shape[1], generator=generator).to(layer.x.meta["val"].dtype)
    indices = torch.rand(sizes.tokens, up.shape[0], generator=generator).argsort(-1)[:, :choices]
    shares = torch.rand(indices.shape, generator=generator).to(layer.weights.meta["val"].dtype)
    bound = {layer.x: x, layer.weights: shares, layer.indices: indices}
    expected = evaluate(program, [layer.total], sizes.bind(layer.total, bound))[0]
    stored = stored_tensors(program, mlp)
    found = experts.reference(x, shares, indices, *stored, activation, gated, alpha, limit)
    if relative_error(found.to(expected.dtype), expected) > EXACT_TOLERANCE[x.dtype]:
        raise UnknownError("it does something else between its products and the sum")
    return mlp


def stored_tensors(program: Program, mlp: Mlp) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    up_bias, down_bias = (None if b is None else program.weight(b) for b in (mlp.up_bias, mlp.down_bias))
    if mlp.interleaved:
        up_bias = None if up_bias is None else _separated(up_bias)
        return _separated(mlp.up), up_bias, mlp.down, down_bias
    return mlp.up, up_bias, mlp.down, down_bias


def _separated(tensor: Tensor) -> Tensor:
    """Rows gate, up, gate, up … of dimension 1 with those of the gate first."""
    return torch.cat([tensor[:, ::2], tensor[:, 1::2]], 1)


def outputs_first(program: Program, product: Product) -> Tensor:
    weight = program.weight(product.weight)
    return weight if product.outputs_first else weight.transpose(1, 2)


def _biased(product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The end of a product with its bias, and what reads the bias or None."""
    node = product
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in (aten.squeeze.dim, aten.squeeze.dims, aten.reshape.default):
            node = user
            continue
        if user.target is aten.add.Tensor:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if selects(other):
                return user, source(cast(fx.Node, other))
        break
    return node, None


def _activation(
    program: Program, raw: fx.Node, end: fx.Node, generator: torch.Generator
) -> tuple[str, bool, bool, float, float]:
    """The elementwise middle: its name, whether it is gated, whether gate and up alternate, alpha and limit."""
    value = raw.meta["val"]
    sizes = Sizes(value.shape)
    given = (torch.randn(sizes.tokens, int(value.shape[-1]), generator=generator) * 6).to(value.dtype)
    result = evaluate(program, [end], sizes.bind(end, {raw: given}))[0].reshape(sizes.tokens, -1)
    numbers = constants(end, {raw})
    plain = [(name, gated, 1.0, 0.0) for name in ACTIVATIONS for gated in (True, False)]
    clamped = [(CLAMPED_SWIGLU, True, a, b) for a in numbers | {1.0} for b in numbers]
    for (name, gated, alpha, limit), interleaved in itertools.product((*plain, *clamped), (False, True)):
        if interleaved and not gated:
            continue
        ordered = torch.cat([given[:, ::2], given[:, 1::2]], 1) if interleaved else given
        if (gated and ordered.shape[1] % 2) or (given.shape[1] // 2 if gated else given.shape[1]) != result.shape[1]:
            continue
        if relative_error(activate(ordered, name, gated, alpha, limit), result) <= EXACT_TOLERANCE[value.dtype]:
            return name, gated, interleaved, alpha, limit
    raise UnknownError("the activation between its products is none of the known ones")
