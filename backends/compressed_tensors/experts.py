"""Experts in codes, written as directories hold them: every expert by itself, under the family's own names.

`transformers` reads the experts of a directory into floating point, by one scheme for all of them and without zero
points; what it would read wrongly is refused here. How it calls what becomes a part of a stack is found by letting it
save stacks that hold numbers in place of rows.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import ops
from graphwright.backends.compressed_tensors.layers import Held, Written, write_weight
from graphwright.errors import BackendError
from graphwright.interchange.skeleton import skeleton
from graphwright.match import argument
from graphwright.program import Program

TARGETS = r"re:.*\.experts\.\d+\..*"
"""The layers of experts, where their scheme is not that of all others."""

READ_ALIKE = "transformers reads all experts of a directory by one scheme, with symmetric codes"


def empty_model(class_name: str, config: dict[str, Any]) -> nn.Module:
    """The model of transformers that is written, without weights."""
    model_class = getattr(importlib.import_module("transformers"), class_name)
    return skeleton(model_class, model_class.config_class.from_dict(config), torch.float32)


def buffers(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """What the model keeps beside its parameters and the program reads, such as a router's correction of scores."""
    parameters, weights = dict(model.named_parameters()), program.weights()
    return {name: weights[name] for name in model.state_dict() if name not in parameters and name in weights}


def stacks_in_codes(program: Program) -> dict[str, int]:
    """The parameters [E, N, K] that codes of experts stand for, and how many parts their rows have: gate and up."""
    found: dict[str, int] = {}
    for node in program.calls(ops.quantized_experts.target):
        gated = bool(argument(node, "gated"))
        found |= {_parameter(node, "up"): 1 + gated, _parameter(node, "down"): 1}
    return found


def write_experts(program: Program, names: Mapping[str, list[list[str]]], dtype: torch.dtype) -> list[Written]:
    """The layers of all experts.

    Args:
        program: holds their codes.
        names: for each parameter, for each part of its rows, the names of the layers by expert.
        dtype: of scales.

    Raises:
        BackendError: they are stored in a way that the readers do not know.
    """
    found: list[Written] = []
    for node in program.calls(ops.quantized_experts.target):
        for stack in ("up", "down"):
            parameter = _parameter(node, stack)
            if argument(node, f"{stack}_bias") is not None:
                raise BackendError(f"The experts {parameter} add biases, which are not written")
            if argument(node, f"{stack}_zero_point") is not None:
                raise BackendError(
                    f"The experts {parameter} have zero points: {READ_ALIKE}", fix="Use the recipe int4-sym, or int8"
                )
            found += _written(program, node, stack, names[parameter], dtype)
    if len({repr(one.scheme) for one in found}) > 1:
        raise BackendError(
            f"The experts are stored in several ways: {READ_ALIKE}",
            fix="Quantize them alike, without the option layers for some of them",
        )
    return found


def stored_names(
    model: nn.Module, parameters: Iterable[str], stacks: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, list[list[str]]]]:
    """What directories call parameters: of each parameter, and as `write_experts` takes it of each stack.

    Args:
        model: of transformers, without weights.
        parameters: names of parameters and buffers.
        stacks: from `stacks_in_codes`.

    Raises:
        BackendError: stacks have no names expert by expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    counts = {name: int(model.get_parameter(name).shape[0]) for name in stacks}
    wanted: dict[int, tuple[str, int, int]] = {}
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys([*parameters, *stacks]):
        places = [(name, part, e) for e in range(counts.get(name, 1)) for part in range(stacks.get(name, 1))]
        numbers = torch.arange(len(wanted), len(wanted) + len(places), dtype=torch.float64)
        wanted |= dict(zip(numbers.long().tolist(), places, strict=True))
        state[name] = numbers.reshape(counts[name], stacks[name], 1) if name in stacks else numbers
    plain: dict[str, str] = {}
    split = {name: [[""] * counts[name] for _ in range(parts)] for name, parts in stacks.items()}
    for stored, numbers in revert_weight_conversion(model, state).items():
        if numbers.numel() != 1:
            raise BackendError(
                f"The experts {stored} have no names one by one in {type(model).__name__}, so they are not written",
                fix="Compile the model instead, or export it to onnx",
            )
        name, part, expert = wanted[int(numbers)]
        if name in stacks:
            split[name][part][expert] = stored.removesuffix(".weight")
        else:
            plain[name] = stored
    return plain, split


def _parameter(node: fx.Node, stack: str) -> str:
    return str(argument(node, stack).target).removesuffix(f"_{argument(node, 'format')}")


def _written(
    program: Program, node: fx.Node, stack: str, names: list[list[str]], dtype: torch.dtype
) -> Iterable[Written]:
    codes, scale = (program.weight(argument(node, part)) for part in (stack, f"{stack}_scale"))
    format, group_size = str(argument(node, "format")), int(argument(node, f"{stack}_group_size"))
    # The first product reads tokens, and the second what the first gives: half of its rows where it is gated.
    rows = argument(node, "up").meta["val"].shape[1] // (2 if argument(node, "gated") else 1)
    width = int(argument(node, "x").meta["val"].shape[-1] if stack == "up" else rows)
    for part, layers in enumerate(names):
        for expert, name in enumerate(layers):
            own = slice(part * codes.shape[1] // len(names), (part + 1) * codes.shape[1] // len(names))
            held = Held(codes[expert, own], scale[expert, own], None, format, group_size, width)
            yield write_weight(name, held, None, dtype)
