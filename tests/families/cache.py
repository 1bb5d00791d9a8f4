"""Each family captured once per test run."""

import functools

from families.configs import build
from transformers import PreTrainedModel

from graphwright.capture import capture
from graphwright.program import Program


@functools.cache
def _captured(name: str) -> tuple[PreTrainedModel, Program]:
    model = build(name)
    return model, capture(model)


def captured(name: str) -> tuple[PreTrainedModel, Program]:
    """The tiny model of a family, and a copy of its captured program that may be edited."""
    model, program = _captured(name)
    return model, program.clone()
