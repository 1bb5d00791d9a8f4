"""How two results are compared: the one home of error measures and tolerances."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

EXACT_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,  # a rewritten graph sums in another order, through every layer of the model
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}
"""Largest relative error that an exact rewrite may cause, by the dtype of the outputs."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Max |a - e| / max(|e|, rms(e)); NaN and infinity in the same place agree, elsewhere they are infinite error.

    >>> relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))  # doctest: +ELLIPSIS
    0.1000...
    """
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    if not (a.isfinite() | same).all() or not (e.isfinite() | same).all():
        return float("inf")
    scale = e[e.isfinite()].square().mean().sqrt() if e.isfinite().any() else torch.tensor(1.0)
    error = torch.where(same, 0.0, (a - e).abs() / torch.maximum(e.abs(), scale.clamp_min(1e-30)))
    return float(error.nan_to_num(nan=0.0).max())


def mean_kl(logits: Tensor, reference: Tensor) -> float:
    """Mean over tokens of KL(reference || logits) in nats, from [..., vocabulary] logits."""
    expected = functional.log_softmax(reference.float(), -1)
    actual = functional.log_softmax(logits.float(), -1)
    return float(functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1).mean())


def outputs_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> float:
    """Largest relative error over all outputs, at the places that an attention mask does not pad."""
    mask = inputs.get("attention_mask")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not isinstance(a, Tensor):
            continue
        if mask is not None and a.dim() == 3 and a.shape[:2] == mask.shape:
            a, e = a[mask.bool()], e[mask.bool()]
        worst = max(worst, relative_error(a, e))
    return worst


def tolerance(outputs: tuple[Tensor, ...]) -> float:
    """The tolerance for outputs of these dtypes."""
    return max((EXACT_TOLERANCE.get(out.dtype, 0.0) for out in outputs if isinstance(out, Tensor)), default=0.0)
