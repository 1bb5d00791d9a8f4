"""The choice of experts for each token: scores, top-k and the weights of the chosen ones.

Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv:1701.06538; groups and the correction bias:
DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, and DeepSeek-V3, arXiv:2412.19437; skipped choices: Lu et al. 2024,
Not All Experts are Equal, arXiv:2402.14800.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op

SCORING = ("softmax", "sigmoid")
"""How logits become scores. The softmax over the chosen logits alone (GPT-OSS) is the normalized softmax over all."""


@op
def moe_routing(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    normalize: bool = False,
    scaling: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    expert_of: Tensor | None = None,
    skip_ratio: float = 0.0,
    num_shared: int = 0,
    first_shared: int = 0,
    shared_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts per token, and adds experts that every token shares.

    With groups, only the experts of the `top_groups` best groups can be chosen. A group counts as its best expert, or,
    where there is a correction bias, as the sum of its two best.

    Args:
        logits: [M, E], floating point.
        correction_bias: [E], added to the scores for the choice only, not for the weights; or None.
        top_k: experts per token, at most E.
        scoring: a name in `SCORING`.
        normalize: divide the weights of a token by their sum.
        scaling: what weights are multiplied by in the end.
        num_groups: groups of neighbouring experts, of equal size.
        top_groups: groups that experts are chosen from.
        expert_of: int64 [E], which stored expert each one of the router is, where some were merged or removed; -1 for
            none. None: each is itself.
        skip_ratio: choices whose score is below this part of the token's best are left out: index -1, weight 0.
        num_shared: experts with neighbouring numbers that follow the chosen ones of every token.
        first_shared: the number of the first of them.
        shared_weight: their weight, [M, 1]; None: 1.

    Returns:
        weights float32 [M, J], indices int64 [M, J] with J = top_k + num_shared; the chosen ones are best first.

    Raises:
        ValueError: more experts or groups are asked for than there are, or an unknown scoring.
    """
    experts = logits.shape[-1]
    _check(experts, top_k, scoring, num_groups, top_groups)
    wide = logits.float()
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    ranked = scores if correction_bias is None else scores + correction_bias.float()
    if num_groups > 1:
        best = 1 if correction_bias is None else min(2, experts // num_groups)
        ranked = _in_best_groups(ranked, num_groups, top_groups, best)
    indices = ranked.topk(top_k, -1).indices
    weights = scores.gather(-1, indices)
    if skip_ratio > 0:
        kept = weights >= skip_ratio * weights.amax(-1, keepdim=True)
        weights, indices = weights * kept, indices.masked_fill(~kept, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if expert_of is not None:
        indices = torch.where(indices < 0, indices, expert_of[indices.clamp_min(0)])
    weights = weights * scaling
    if num_shared:
        numbers = torch.arange(first_shared, first_shared + num_shared, device=indices.device)
        shape = (*indices.shape[:-1], num_shared)
        ones = torch.ones(shape, device=weights.device)
        weights = torch.cat([weights, ones if shared_weight is None else ones * shared_weight.float()], -1)
        indices = torch.cat([indices, numbers.expand(shape)], -1)
    return weights, indices


def _in_best_groups(ranked: Tensor, num_groups: int, top_groups: int, best: int) -> Tensor:
    """Scores with those outside the best groups struck out; a group counts as the sum of its `best` scores."""
    grouped = ranked.unflatten(-1, (num_groups, -1))
    worth = grouped.topk(best, -1).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(top_groups, -1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _check(experts: int, top_k: int, scoring: str, num_groups: int, top_groups: int) -> None:
    if scoring not in SCORING:
        raise ValueError(f"scoring is {scoring!r}; it must be one of {', '.join(SCORING)}")
    if num_groups < 1 or experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(f"{experts} experts make no {num_groups} equal groups of which {top_groups} are chosen")
    available = experts // num_groups * top_groups
    if not 1 <= top_k <= available:
        raise ValueError(f"top_k is {top_k}, but there are {available} experts to choose from")


@moe_routing.fake
def _fake(logits: Tensor, _bias: Tensor | None, top_k: int, *rest, **more):  # type: ignore[no-untyped-def]
    shape = (*logits.shape[:-1], top_k + (rest[7] if len(rest) > 7 else more.get("num_shared", 0)))
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@moe_routing.cost
def _cost(logits: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=8 * logits.numel)


@moe_routing.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for tokens in (1, 7):
        logits = torch.randn(tokens, 8, dtype=dtype)
        yield Sample((logits, None, 2), note=f"softmax, {tokens} tokens")
        yield Sample((logits, None, 1, "sigmoid", True), note=f"one expert, {tokens} tokens")
        yield Sample((logits, None, 3, "softmax", True), note=f"softmax over the chosen, {tokens} tokens")
        bias = torch.randn(8)
        yield Sample((logits, bias, 2, "sigmoid", True, 1.5, 4, 2), note=f"groups and a bias, {tokens} tokens")
        stored = torch.tensor([0, 1, 2, 0, -1, 3, 4, 4])
        plain = ("softmax", True, 1.0, 1, 1)
        yield Sample((logits, None, 3, *plain, stored, 0.5), note=f"merged, removed and skipped, {tokens} tokens")
        gate = torch.rand(tokens, 1, dtype=dtype)
        yield Sample((logits, bias, 2, *plain, None, 0.0, 2, 8, gate), note=f"shared experts, {tokens} tokens")
