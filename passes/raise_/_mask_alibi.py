"""ALiBi recognised: a bias that falls by a fixed slope per head with each key further away.

    slopes(probe, leaf, leaves, trials)       # Alibi(slopes=tensor([0.25, 0.0625]), counted=True)

Softmax does not see what is the same for all keys of a row, so slope * key position is enough. Positions are those of
the sequence, or, as in BLOOM, they count the keys that are not padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.passes.raise_._mask_probe import Probe, Trial, ancestors
from graphwright.passes.raise_._mask_terms import Leaf


@dataclass(frozen=True)
class Alibi:
    """Slopes [H], and whether positions count only what is not padding."""

    slopes: Tensor
    counted: bool


def find_alibi(probe: Probe, node: fx.Node, masks: tuple[Leaf, ...], trials: Iterable[Trial]) -> Alibi | None:
    """Slopes that reproduce the bias `node` at every visible key of every trial; None if there are none."""
    first = probe.first()
    (value,) = probe.values([node], first)
    if value.dim() != 4 or not value.is_floating_point() or value.shape[-1] < 2:
        return None
    slopes = (value[0, :, -1, 1] - value[0, :, -1, 0]).float()
    if slopes.shape[0] != int(probe.query.meta["val"].shape[1]):
        return None
    tolerance = _rounding([node])
    trials = list(trials)
    for counted in (False, True):
        if all(_fits(probe, node, masks, trial, slopes, counted, tolerance) for trial in trials):
            return Alibi(slopes, counted)
    return None


def _fits(
    probe: Probe, node: fx.Node, masks: tuple[Leaf, ...], trial: Trial, slopes: Tensor, counted: bool, tolerance: float
) -> bool:
    case = probe.case(masks, trial)
    (value,) = probe.values([node], trial)
    positions = torch.arange(case.allowed.shape[2])[None]
    if counted:
        if case.keys is None:
            return False
        positions = case.keys.long().cumsum(1) - 1
    seen = case.allowed if case.queries is None else case.allowed & case.queries[:, :, None]
    seen = seen if case.keys is None else seen & case.keys[:, None, :]
    left = value.double() - slopes.double()[:, None, None] * positions[:, None, None, :]
    left, seen = left.expand(len(seen), -1, seen.shape[1], -1), seen[:, None].expand(-1, left.shape[1], -1, -1)
    high, low = (left.masked_fill(~seen, fill) for fill in (float("-inf"), float("inf")))
    spread = (high.amax(-1) - low.amin(-1))[seen.any(-1)]
    return bool((spread <= tolerance * value[value.isfinite()].abs().max()).all())


def _rounding(nodes: Iterable[fx.Node]) -> float:
    """The relative rounding error of the least precise dtype on the way to these nodes."""
    values = [n.meta.get("val") for n in ancestors(nodes)]
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return 4 * max(torch.finfo(dtype).eps for dtype in dtypes)
