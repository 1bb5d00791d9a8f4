"""Medusa: further heads on the last hidden state guess the tokens behind the next one (Cai et al. 2024).

    heads = MedusaHeads.initial(program, count=3)
    train(program, heads, batches, steps=200)                  # the model stays as it is
    compiled.generate(prompt, draft=heads, draft_tokens=16)    # needs the pass tree_verification

Head k guesses the token k places behind the next: softmax(W2_k (SiLU(W1_k h) + h)), W1 zero and W2 the model's own
head at first, arXiv:2401.10774. With `shared` the heads read the model's head and train W1 alone, which is small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from graphwright import packing, structure
from graphwright.errors import GraphwrightError
from graphwright.feeding import batch_inputs
from graphwright.match import argument
from graphwright.ops import quantized_linear
from graphwright.program import Program

DISCOUNT = 0.8
"""Weight of each head's loss against that of the head before it."""


@dataclass
class MedusaHeads:
    """Trained heads.

    Attributes:
        residual: float32 [heads, d, d], W1.
        out: float32 [heads, V, d], W2; or [1, V, d], the model's head that all share.
    """

    residual: Tensor
    out: Tensor

    @staticmethod
    def initial(program: Program, count: int, *, shared: bool = False) -> "MedusaHeads":
        """Heads that guess what the model's own head does.

        Raises:
            GraphwrightError: the program has no vocabulary head, or there are fewer than 1.
        """
        if count < 1:
            raise GraphwrightError(f"{count} Medusa heads were asked for", fix="Ask for 1 or more; 3 to 5 are usual")
        weight = _head_weight(program)
        width = weight.shape[1]
        out = weight[None] if shared else weight.expand(count, -1, -1)
        return MedusaHeads(torch.zeros(count, width, width), out.clone())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [heads, n, V] of hidden states [n, d]."""
        hidden = hidden.float()
        inner = functional.silu(hidden @ self.residual.mT) + hidden
        return inner @ self.out.mT

    @property
    def count(self) -> int:
        """Number of heads."""
        return len(self.residual)

    def save(self, file: Path | str) -> None:
        """Writes a safetensors file."""
        save_file({"residual": self.residual.contiguous(), "out": self.out.contiguous()}, file)

    @staticmethod
    def load(file: Path | str) -> "MedusaHeads":
        """Reads what `save` wrote.

        Raises:
            GraphwrightError: the file holds no Medusa heads.
        """
        try:
            tensors = load_file(file)
            return MedusaHeads(tensors["residual"], tensors["out"])
        except (OSError, KeyError) as error:
            raise GraphwrightError(f"{file} holds no Medusa heads: {error}") from error


def train(
    program: Program,
    heads: MedusaHeads,
    batches: Sequence[Mapping[str, Tensor]],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> list[float]:
    """Trains the heads on what the frozen program reads; only they change.

    Args:
        program: with the output `hidden`, from the pass tree_verification.
        heads: changed in place.
        batches: token ids, see `graphwright.calibration.from_tokens`.
        steps: batches to take, in turn.
        learning_rate: of AdamW.
        progress: called now and then.

    Returns:
        The loss of every step, nats per token, weighted over heads.

    Raises:
        GraphwrightError: the program shows no hidden states, or no batch is longer than the heads reach.
    """
    usable = [batch for batch in batches if batch["input_ids"].shape[1] > heads.count + 1]
    if "hidden" not in program.contract.outputs or not usable:
        raise GraphwrightError(
            "Medusa heads learn from hidden states of texts longer than they reach",
            fix="Use a recipe with tree_verification, and batches of more tokens than there are heads",
        )
    trained = [heads.residual, heads.out] if len(heads.out) == heads.count else [heads.residual]
    for tensor in trained:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
    losses = []
    known: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for step in range(steps):
            index = step % len(usable)
            if index not in known:
                known[index] = _states(program, usable[index])
            loss = _loss(heads, *known[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            progress(f"medusa, loss {losses[-1]:.3f}", step / steps)
    finally:
        for tensor in trained:
            tensor.requires_grad_(False)
    return losses


def _states(program: Program, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, S, d] and tokens [B, S]."""
    outputs = program(**batch_inputs(program, batch))
    return outputs[program.contract.outputs.index("hidden")].float().clone(), batch["input_ids"]


def _loss(heads: MedusaHeads, hidden: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every head with the token it is to guess: head k, from 0, that of k + 2 places on."""
    length, total = ids.shape[1] - heads.count - 1, torch.zeros(())
    logits = heads(hidden[:, :length].flatten(0, 1))
    for head in range(heads.count):
        wanted = ids[:, head + 2 : head + 2 + length].flatten()
        total = total + DISCOUNT**head * functional.cross_entropy(logits[head], wanted)
    return total


def _head_weight(program: Program) -> Tensor:
    head = structure.head(program)
    if head is None:
        raise GraphwrightError("The program has no vocabulary head, so nothing can guess further tokens")
    weight = program.weight(head.args[1])
    if head.target is not quantized_linear.target:
        return weight.detach().float()
    scale, zero = (argument(head, name) for name in ("scale", "zero_point"))
    held = program.weight(scale), None if zero is None else program.weight(zero)
    return packing.dequantize(weight, *held, argument(head, "format"), argument(head, "group_size")).float()
