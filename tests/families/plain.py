"""Plain modules with hand-written attention, as people write them, and the raising of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphwright import clean, registry
from graphwright.capture import capture
from graphwright.pass_ import Context, PassResult
from graphwright.program import Metadata, Program
from graphwright.target import Target

ATTENTION_PASSES = ("raise_attention", "raise_grouped_heads", "raise_mask")
WIDTH, HEADS, HEAD_DIM, BUFFER = 32, 4, 8, 64
CONTEXT = BUFFER - 1  # torch.export refuses a slice of a buffer that may be the whole of it


def context() -> Context:
    """A context for passes that ask for little."""
    return Context(target=Target.parse("cpu"))


def run_passes(program: Program, names: Sequence[str] = ATTENTION_PASSES) -> tuple[Program, dict[str, PassResult]]:
    """The program after the passes, cleaned after each as the pass manager does, and what they report."""
    results = {}
    for name in names:
        results[name] = registry.pass_class(name)().run(program, context())
        program = results[name].program
        clean.refresh(program.module)
        clean.clean(program.module)
    return program, results


def capture_plain(module: nn.Module, *, mask: bool = False) -> Program:
    """A plain module of x [batch, sequence, WIDTH] and maybe an attention mask, captured."""
    inputs = {"x": torch.randn(2, 9, WIDTH)}
    dims = {"x": {0: "batch", 1: "sequence"}}
    if mask:
        inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
        dims["attention_mask"] = dims["x"]
    return capture(module, inputs, dims=dims, metadata=Metadata(context_length=CONTEXT))


class Smallest(nn.Module):
    """A written-out attention over heads that are given, for golden texts."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for part in (k, v))
        steps = torch.arange(q.shape[2])
        hidden = (steps[None] > steps[:, None]) | (attention_mask[:, None, None, :] == 0)
        return (q @ k.transpose(-1, -2) * 0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def capture_smallest() -> Program:
    """`Smallest`, captured."""
    inputs = {name: torch.randn(2, heads, 9, 4) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    dims = {name: {0: "batch", 2: "sequence"} for name in inputs}
    inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
    dims["attention_mask"] = {0: "batch", 1: "sequence"}
    return capture(Smallest(), inputs, dims=dims, metadata=Metadata(context_length=CONTEXT))


class Plain(nn.Module):
    """Query, key, value and output projections around `attend`, which a subclass writes."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(WIDTH, self.kv_heads * HEAD_DIM, bias=False)
        self.v = nn.Linear(WIDTH, self.kv_heads * HEAD_DIM, bias=False)
        for linear in (self.q, self.k, self.v):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator) * 0.4
        self.register_buffer("tril", torch.ones(1, 1, BUFFER, BUFFER).tril())
        self.register_buffer("random", torch.randn(1, HEADS, BUFFER, BUFFER, generator=generator))
        self.eval()

    def heads(self, x: Tensor, linear: nn.Linear) -> Tensor:
        return linear(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.heads(x, self.q), self.heads(x, self.k), self.heads(x, self.v), x)
        return y.transpose(1, 2).reshape(x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class Fused(Plain):
    """scaled_dot_product_attention with a mask that a subclass writes."""

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        return functional.scaled_dot_product_attention(q, k, v, self.mask(steps[:, None], steps[None, :]))


class Causal(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class EnableGqa(Plain):
    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RepeatInterleave(Plain):
    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class RepeatKv(Plain):
    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for p in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class RepeatEarly(Plain):
    """Copies before the heads change places, as Falcon makes them."""

    kv_heads = 2

    def heads(self, x: Tensor, linear: nn.Linear) -> Tensor:
        parts = linear(x).view(*x.shape[:2], -1, HEAD_DIM)
        if parts.shape[2] != HEADS:
            parts = parts[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3)
        return parts.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class MultiQuery(Plain):
    kv_heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = (part.expand(-1, HEADS, -1, -1) for part in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class TiledHeads(Plain):
    """Heads 0 1 0 1, which is not how grouped heads lie."""

    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = (part.repeat(1, 2, 1, 1) for part in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class OnlyKeysRepeated(Plain):
    kv_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat(1, 2, 1, 1)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class NanoGpt(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.tril[:, :, :length, :length] == 0, float("-inf"))
        return functional.softmax(scores, dim=-1) @ v


class WhereNumber(Plain):
    """Scores replaced by the smallest number, as GPT-2 did it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], HEAD_DIM**0.5)
        smallest = torch.full([], torch.finfo(scores.dtype).min)
        scores = torch.where(self.tril[:, :, :length, :length].bool(), scores, smallest)
        return scores.softmax(-1) @ v


class Additive(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(HEAD_DIM) + mask
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


class MergedHeads(Plain):
    """Batch and heads merged, the query scaled before."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = (part.reshape(batch * HEADS, length, HEAD_DIM) for part in (q, k, v))
        scores = torch.bmm(q * HEAD_DIM**-0.5, k.transpose(1, 2)).view(batch, HEADS, length, length)
        steps = torch.arange(length)
        scores = scores.masked_fill(steps[None] > steps[:, None], float("-inf")).view(batch * HEADS, length, length)
        return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, length, HEAD_DIM)


class SingleHead(Plain):
    """Three dimensions and no heads."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.bmm(self.q(x) * 0.25, self.k(x).transpose(1, 2))
        scores = scores + torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e9
        return torch.bmm(scores.softmax(-1), self.v(x))


class SoftcapSinks(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 2.0) * 2.0
        scores = scores + torch.full((x.shape[1], x.shape[1]), -1e30).triu(1)
        sinks = self.random[0, :, 0, 0].reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        scores = torch.cat([scores, sinks], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return scores.softmax(-1)[..., :-1] @ v


class Prefix(Fused):
    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys <= queries) | (keys < 3)


class Chunked(Fused):
    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys <= queries) & (keys // 6 == queries // 6)


class LongWindow(Fused):
    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys <= queries) & (keys > queries - 40)


class BothWays(Fused):
    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys - queries).abs() < 4


class Dilated(Fused):
    """Every other key: a mask of no kind that is known."""

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys <= queries) & ((queries - keys) % 2 == 0)


class Alibi(Plain):
    """Slopes times the distance from the last key, as MPT writes it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        length = x.shape[1]
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.1])[None, :, None, None]
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + torch.arange(1 - length, 1)[None, None, None] * slopes
        scores = scores.masked_fill(torch.ones(length, length).tril().bool().logical_not(), -1e30)
        return scores.softmax(-1) @ v


class SymmetricDistance(Plain):
    """A bias that falls to both sides is not ALiBi when nothing is causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        bias = -(steps[None] - steps[:, None]).abs() * torch.tensor([0.5, 0.25, 0.125, 0.1])[:, None, None]
        return functional.scaled_dot_product_attention(q, k, v, bias[None])


class CausalAtFirst(NanoGpt):
    """Causal up to length 50, and not beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.tril[:, :, 50:, 10] = 0


class RandomBias(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        bias = self.random[:, :, : x.shape[1], : x.shape[1]]
        return functional.scaled_dot_product_attention(q, k, v, bias)


class RandomBiasAndMask(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        bias = self.random[:, :, : x.shape[1], : x.shape[1]]
        bias = bias.masked_fill(self.tril[:, :, : x.shape[1], : x.shape[1]] == 0, float("-inf"))
        return functional.scaled_dot_product_attention(q, k, v, bias)


class TokenMask(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        keep = (x[:, :, 0] > 0) | (torch.arange(x.shape[1]) == 0)
        return functional.scaled_dot_product_attention(q, k, v, keep[:, None, None, :])


class PaddedBothWays(Plain):
    """Padding by hand, on keys and queries, beside a causal mask."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (self.heads(x, linear) for linear in (self.q, self.k, self.v))
        real = attention_mask.bool()
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = causal & real[:, None, None, :] & real[:, None, :, None]
        return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)


class OtherDimension(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-2) @ v


class ActiveDropout(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return functional.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1, training=True) @ v


class ActiveFusedDropout(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class MaskedByZero(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        return scores.masked_fill(self.tril[:, :, : x.shape[1], : x.shape[1]] == 0, 0.0).softmax(-1) @ v


class MaskBeforeSoftcap(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) + self.random[:, :, : x.shape[1], : x.shape[1]]
        return (torch.tanh(scores / 3.0) * 3.0).softmax(-1) @ v


class WeightsReturned(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights = (self.heads(x, self.q) @ self.heads(x, self.k).transpose(-1, -2)).softmax(-1)
        return weights @ self.heads(x, self.v), weights
