"""Exporting a tiny family's program and feeding both it and the exported model."""

import functools
from pathlib import Path

import numpy as np
import torch
from families.cache import captured
from families.configs import FAMILIES, VOCAB_SIZE

from graphwright.backends.onnx.model import build, save
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.runtime import Session
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.explicit_cache import empty_past
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CAUSAL = [name for name, family in FAMILIES.items() if family.causal]

WEIGHTS = {
    "fp32": [],
    "int8": [{"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}],
    "int4": [{"rtn": {"bits": 4, "group_size": 32}}],
    "int4-symmetric": [{"rtn": {"bits": 4, "group_size": 16, "symmetric": True}}],
    "int8-grouped": [{"rtn": {"bits": 8, "group_size": 32, "head_bits": 4, "embedding_bits": 0}}],
    "fp8-e4m3-activations": [{"rtn": {"bits": 8}}, {"activations": {"format": "fp8_e4m3"}}],
    "fp8-e5m2-activations": [{"rtn": {"bits": 8}}, {"activations": {"format": "fp8_e5m2"}}],
    "int4-hqq": [{"hqq": {"bits": 4, "group_size": 32}}],
    "int4-rotated": ["quarot", {"rtn": {"bits": 4, "group_size": 32}}],
    "svd": [{"svd": {"ratio": 0.2}}, {"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}],
    "int8-dynamic": [{"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}, "activations"],
}
"""Passes in front of the caches, by a short name."""

DECOMPOSED = {
    "int3": [{"rtn": {"bits": 3, "group_size": 32}}],
    "int2": [{"rtn": {"bits": 2, "group_size": 16, "symmetric": True}}],
    "nf4": [{"nf4": {"group_size": 32}}],
    "mxfp4": ["mxfp4"],
    "fp8-e4m3": ["fp8"],
    "fp8-e5m2": [{"fp8": {"format": "fp8_e5m2"}}],
    "sparse-2:4": [{"magnitude": {"pattern": "2:4"}}, "compress_sparse"],
    "sparse-2:4-int8": [
        {"magnitude": {"pattern": "2:4"}},
        {"rtn": {"bits": 8, "group_size": 32, "symmetric": True}},
        "compress_sparse",
    ],
    "sparse": [{"magnitude": {"ratio": 0.8}}, "compress_sparse"],
    "spqr": ["spqr"],
}
"""The same, with weights that no profile has a form for."""


@functools.cache
def rewritten(name: str, weights: str = "fp32") -> Program:
    _, program = captured(name)
    recipe = Recipe.load({"passes": ["merge_linear", *(WEIGHTS | DECOMPOSED)[weights], "explicit_cache"]})
    return PassManager(Context(Target.parse("cpu")), verify=False).run(program, plan_passes(recipe, program))


def exported(program: Program, directory: Path, **options: object) -> Session:
    save(build(program, OnnxOptions(**options)), directory)
    return Session(directory, threads=1)


def distance(program: Program, session: Session, mask: torch.Tensor, ends: tuple[int, ...]) -> float:
    """Largest relative error of logits and caches over calls that end before each of `ends`."""
    batch = mask.shape[0]
    ids = torch.randint(3, VOCAB_SIZE, mask.shape, generator=torch.Generator().manual_seed(5))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past, held = empty_past(program, batch), session.empty_past(batch)
    worst, start = 0.0, 0
    for end in ends:
        step = {"input_ids": ids[:, start:end], "key_mask": mask[:, :end], "positions": places[:, start:end]}
        logits, *present = program(**{k: v for k, v in step.items() if k in program.contract.names}, **past)
        found, held = session.step(ids[:, start:end].numpy(), mask[:, :end].numpy(), held)
        kept = mask[:, start:end].bool()
        worst = max(worst, relative_error(torch.from_numpy(found)[kept], logits[kept]))
        past = dict(zip(past, present, strict=True))
        seen = mask[:, None, :end, None].numpy()  # what lies in the slots of padding is nobody's business
        for mine, theirs in zip(past.values(), held.values(), strict=True):
            assert theirs.shape == tuple(mine.shape)
            worst = max(worst, relative_error(torch.from_numpy(theirs * seen), mine * torch.from_numpy(seen)))
        start = end
    return worst


def greedy(program: Program, prompt: list[int], count: int) -> list[int]:
    """The program's own likeliest tokens."""
    ids, past, tokens = torch.tensor([prompt]), empty_past(program, 1), []
    for _ in range(count):
        length = len(prompt) + len(tokens)
        places = torch.arange(length - ids.shape[1], length)[None]
        step = {"input_ids": ids, "key_mask": torch.ones(1, length, dtype=torch.int64), "positions": places}
        logits, *present = program(**{k: v for k, v in step.items() if k in program.contract.names}, **past)
        past = dict(zip(past, present, strict=True))
        tokens.append(int(np.argmax(logits[0, -1].numpy())))
        ids = torch.tensor([[tokens[-1]]])
    return tokens
