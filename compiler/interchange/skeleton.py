"""A model without weights, filled from a checkpoint: layers in codes become modules that multiply with codes.

    model = skeleton(LlamaForCausalLM, config, torch.float32)
    notes = fill(model, checkpoint, torch.float32, keep_codes=True)

Parameters are made on the meta device, and each gets its own tensor; buffers, such as the frequencies of rotary
embeddings, are computed as the model's class does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphwright.errors import SourceError
from graphwright.interchange.experts import NotStackableError, packed_experts
from graphwright.interchange.packed import Packed, PackedEmbedding, PackedLinear

EXPERT_DIMENSIONS = 3
"""Of a parameter [E, N, K] with the weights of all experts of a layer."""

Parts = Sequence[Sequence[Packed | Tensor]]
"""The layers of a stack of experts: for each part of its rows, by expert."""


class Checkpoint(Protocol):
    """Quantized weights by the names of the model's modules."""

    where: str
    """For people."""
    summary: str
    """How the weights are stored, in a few words."""

    @property
    def notes(self) -> list[str]:
        """What is read in another way than the checkpoint says."""
        ...

    def is_float(self, name: str) -> bool:
        """Whether there is a tensor of this full name in floating point."""
        ...

    def find(self, name: str) -> Tensor | None:
        """The values of a tensor that is not asked for in codes, or None."""
        ...

    def packed(self, name: str, kind: str, shape: tuple[int, int]) -> Packed | None:
        """The weight [N, K] of a module in codes, or None if it is stored in floating point."""
        ...

    def experts(self, name: str, shape: tuple[int, ...]) -> Parts | None:
        """The layers whose weights the parameter `name` [E, N, K] holds one behind the other, or None."""
        ...

    def unread(self) -> list[str]:
        """Names of codes that nobody asked for."""
        ...


def skeleton(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config, with parameters on the meta device and tied ones tied."""
    from accelerate import init_empty_weights  # a part of the extra that transformers belongs to

    build = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
    with init_empty_weights(include_buffers=False):
        model: nn.Module = build(config, dtype=dtype)
    model.tie_weights()
    return model


def fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, *, keep_codes: bool) -> list[str]:
    """Gives every parameter its values; returns what a user should know of the reading.

    Args:
        model: from `skeleton`; it is changed in place.
        checkpoint: where values come from.
        dtype: of floating-point parameters.
        keep_codes: put packed modules where layers are stored in codes; otherwise they are dequantized.

    Raises:
        SourceError: a parameter is missing or does not fit, or the checkpoint holds codes of no layer.
    """
    filling = _Filling(model, checkpoint, dtype, keep_codes)
    parameters = _parameters(model)
    filled = filling.experts()
    for names in parameters:
        if names[0] not in filled:
            filling.parameter(names)
    filling.refuse_gaps()
    return [*checkpoint.notes, *filling.notes]


class _Filling:
    """One `fill` in progress."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, keep_codes: bool) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.keep_codes = keep_codes
        self.notes: list[str] = []
        self.missing: list[str] = []
        self._equal: dict[tuple[torch.dtype, bytes], Tensor] = {}

    def experts(self) -> set[str]:
        """Fills modules that hold the weights of all experts of a layer; returns the names of their parameters."""
        filled: set[str] = set()
        for path, module in list(self.model.named_modules()):
            stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == EXPERT_DIMENSIONS}
            held = {name: self.checkpoint.experts(f"{path}.{name}", tuple(p.shape)) for name, p in stacks.items()}
            found = {name: parts for name, parts in held.items() if parts is not None}
            if found and not (self.keep_codes and self._keep_experts(path, module, found)):
                for name, parts in found.items():
                    self._assign([f"{path}.{name}"], _dense(parts))
            filled |= {f"{path}.{name}" for name in found}
        return filled

    def _keep_experts(self, path: str, module: nn.Module, stacks: dict[str, Parts]) -> bool:
        """Puts packed experts in the place of a module; False where they have to be dequantized, which is noted."""
        layers = [layer for parts in stacks.values() for part in parts for layer in part]
        if not any(isinstance(layer, Packed) for layer in layers):
            return False
        try:
            if not all(isinstance(layer, Packed) for layer in layers):
                raise NotStackableError("some are in codes, and others in floating point")
            for name, parts in stacks.items():
                self._refuse_order(f"{path}.{name}", parts)
            made = packed_experts(module, stacks)
        except NotStackableError as reason:
            self.notes.append(f"the experts {path} were dequantized: {reason}")
            return False
        parent, name = self._owner(path)
        setattr(parent, name, made)
        return True

    def _refuse_order(self, name: str, parts: Parts) -> None:
        """Refuses act-order: the experts of a layer read one row of inputs, in one order."""
        for expert in range(len(parts[0])):
            if any(isinstance(part[expert], Packed) and part[expert].columns is not None for part in parts):
                raise SourceError(
                    f"{name} of expert {expert} has its columns in the order of its own activations (act-order), and "
                    "experts that keep their codes read their input in one order",
                    where=self.checkpoint.where,
                    fix="Quantize it again without act-order (desc_act=False) or with static groups; or use a recipe "
                    "that rounds the weights itself, such as int4",
                )

    def parameter(self, names: list[str]) -> None:
        """Fills one parameter or buffer, which has several names where it is tied."""
        stored = [name for name in names if len(names) > 1 and self.checkpoint.is_float(name)]
        packed = self._packed(names)
        if packed is not None and stored:
            # A head with codes of its own beside a table in floating point: they are two weights.
            self._assign(stored, self.checkpoint.find(stored[0]))
            names = [name for name in names if name not in stored]
        if packed is None:
            tensor = next((t for t in map(self.checkpoint.find, names) if t is not None), None)
            if tensor is not None:
                self._assign(names, tensor)
            elif not all(isinstance(self._owner(name)[0], PackedLinear) for name in names):
                self.missing.append(names[0])
            return
        plain = [name for name in names if self.keep_codes and _is_plain(self._owner(name)[0])]
        for name in plain:
            self._replace(name.removesuffix(".weight"), packed)
        others = [name for name in names if name not in plain]
        if others:
            transposed = _is_conv1d(self._owner(others[0])[0])
            self._assign(others, packed.dense().t() if transposed else packed.dense())
        if others and self.keep_codes:
            kind = type(self._owner(others[0])[0]).__name__
            self.notes.append(f"{others[0]} was dequantized: a {kind} does more than look up or multiply")

    def refuse_gaps(self) -> None:
        """Refuses a checkpoint that lacks parameters, or holds codes that no layer wanted."""
        where = self.checkpoint.where
        stacks = [name for name in self.missing if self._dimensions(name) >= EXPERT_DIMENSIONS]
        if stacks:
            raise SourceError(
                f"{stacks[0]} holds the weights of all experts of a layer, and the checkpoint has none of them under a "
                "name that the installed transformers knows",
                where=where,
                fix="Give the model in floating point and quantize it here: graphwright's gptq, awq and rtn round "
                "every expert",
            )
        if self.missing:
            raise SourceError(
                f"The checkpoint lacks {len(self.missing)} weights of {type(self.model).__name__}, the first is "
                f"{self.missing[0]}",
                where=where,
                fix="Download it again; or its config.json belongs to another model",
            )
        unread = self.checkpoint.unread()
        if unread:
            raise SourceError(
                f"The checkpoint holds {len(unread)} tensors of codes for which {type(self.model).__name__} has no "
                f"layer, the first is {unread[0]}",
                where=where,
                fix="Its config.json belongs to another model, or the installed transformers builds these layers in "
                "another way",
            )

    def _dimensions(self, name: str) -> int:
        """Of the parameter of this name; 0 for the bias of a layer that was replaced, which has none."""
        module, part = self._owner(name)
        held = getattr(module, part)
        return 0 if held is None else int(held.dim())

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, part = name.rpartition(".")
        return self.model.get_submodule(path), part

    def _packed(self, names: list[str]) -> Packed | None:
        for name in names:
            module, part = self._owner(name)
            if part != "weight" or not (isinstance(module, (nn.Linear, nn.Embedding)) or _is_conv1d(module)):
                continue
            rows, width = (int(size) for size in getattr(module, part).shape)
            shape = (width, rows) if _is_conv1d(module) else (rows, width)
            kind = "Embedding" if isinstance(module, nn.Embedding) else "Linear"
            found = self.checkpoint.packed(name.removesuffix(".weight"), kind, shape)
            if found is not None:
                return self._shared(found)
        return None

    def _shared(self, packed: Packed) -> Packed:
        """With one tensor for equal orders and scales of inputs, so that layers which read alike are seen to."""
        rounding = packed.rounding
        if rounding is not None and rounding.scale is not None:
            rounding = replace(rounding, scale=self._one(rounding.scale))
        return replace(
            packed, columns=packed.columns if packed.columns is None else self._one(packed.columns), rounding=rounding
        )

    def _one(self, tensor: Tensor) -> Tensor:
        return self._equal.setdefault((tensor.dtype, tensor.numpy().tobytes()), tensor)

    def _replace(self, path: str, packed: Packed) -> None:
        """Puts a packed module where a plain one stood."""
        parent, name = self._owner(path)
        module = getattr(parent, name)
        if isinstance(module, nn.Embedding):
            setattr(parent, name, PackedEmbedding(packed, self.dtype))
            return
        bias = self.checkpoint.find(f"{path}.bias")
        if module.bias is None and bias is not None and bool(bias.any()):
            raise self._wrong(f"{path}.bias holds values, and the model's layer adds none")
        if module.bias is not None and bias is None:
            self.missing.append(f"{path}.bias")
        if bias is not None and tuple(bias.shape) != (packed.shape[0],):
            raise self._wrong(f"{path}.bias has the shape {list(bias.shape)} and should have [{packed.shape[0]}]")
        kept = None if module.bias is None or bias is None else bias.to(self.dtype)
        setattr(parent, name, PackedLinear(packed, kept))

    def _assign(self, names: list[str], tensor: Tensor) -> None:
        """Makes one tensor the values of a parameter or buffer under each of its names."""
        module, part = self._owner(names[0])
        if isinstance(module, PackedLinear):
            return
        held = getattr(module, part)
        if tuple(held.shape) != tuple(tensor.shape):
            raise self._wrong(f"{names[0]} has the shape {list(tensor.shape)} and should have {list(held.shape)}")
        value = tensor.to(self.dtype) if held.is_floating_point() else tensor.to(held.dtype)
        value = value.contiguous()
        parameter = nn.Parameter(value, requires_grad=False) if isinstance(held, nn.Parameter) else None
        for name in names:
            module, part = self._owner(name)
            if parameter is not None:
                module._parameters[part] = parameter
            else:
                module._buffers[part] = value

    def _wrong(self, problem: str) -> SourceError:
        return SourceError(problem, where=self.checkpoint.where, fix="Download it again, or quantize the model again")


def _parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter and persistent buffer; a tied one has several."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _dense(parts: Parts) -> Tensor:
    """The weights [E, N, K] of a stack of experts."""
    rows = zip(*parts, strict=True)
    return torch.stack([torch.cat([one.dense() if isinstance(one, Packed) else one for one in row]) for row in rows])


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does nothing but multiply with its weight, or look up its rows."""
    forward = type(module).forward
    known = forward in (nn.Linear.forward, nn.Embedding.forward) and getattr(module, "max_norm", None) is None
    # Falcon writes the product of a linear layer out.
    return known or type(module).__name__ == "FalconLinear" or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
