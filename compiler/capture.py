"""Capture: a model becomes a program, through torch.export with a symbolic batch and sequence.

    program = capture(model)                                        a Hugging Face model: inputs are known
    program = capture(module, {"x": torch.randn(2, 16)})             any module: example inputs
    program = capture(module, {"x": x}, dims={"x": {0: "batch"}})    and which dimensions are symbolic

A loop over experts, which no export can follow, is replaced for the time of the capture where it is recognised; nothing
else is touched. Where export fails, the error names the operation, the line of the model that called it, and
what to try.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import clean
from graphwright.contract import Contract, Dim, InputSpec, Role
from graphwright.errors import CaptureError, GraphwrightError
from graphwright.expert_loops import unrolled
from graphwright.program import Metadata, Program
from graphwright.serialize import set_attribute
from graphwright.tracer import import_tracer

DimNames = Mapping[str, Mapping[int, str]]

TOKEN_INPUTS: dict[str, Role] = {
    "input_ids": "token",
    "attention_mask": "attention_mask",
    "decoder_input_ids": "token",
}
"""What a language model is called with, in this order, as far as its forward takes it."""

MAX_BATCH = 1024
EXAMPLE_BATCH, EXAMPLE_SEQUENCE = 2, 12


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    dims: DimNames | None = None,
    metadata: Metadata | None = None,
) -> Program:
    """Captures `model` as a program.

    Args:
        model: any module; it is put in eval mode for the capture and not changed otherwise.
        example_inputs: keyword inputs by name, or a tuple for the first parameters of `forward`. May be left out for
            a Hugging Face language model. Values that are not tensors are fixed at what they are.
        dims: the symbolic dimensions, as {input: {axis: name}}; equal names are the same size. Left out: axis 0
            of every tensor is `batch`, and axis 1 of integer matrices is `sequence`.
        metadata: what is known of the model; read from a Hugging Face configuration by default.

    Raises:
        CaptureError: the model cannot be exported, or holds weights that are not finite.
    """
    known = metadata or read_metadata(model)
    inputs = _named_inputs(model, example_inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CaptureError(
            "There is nothing to capture: no example input is a tensor",
            fix="Pass example_inputs={'name': tensor, …} for the parameters of forward",
        )
    check_weights(model)
    dims = dims if dims is not None else _default_dims(tensors)
    contract = _contract(tensors, dims, known)
    training = model.training
    model.eval()
    try:
        exported = _export(model, inputs, contract)
    finally:
        model.train(training)
    module = _flatten(exported, tensors)
    contract = contract.with_(outputs=_output_names(exported))
    return finish(module, contract, known.with_(parameter_bytes=_parameter_bytes(model)))


def finish(module: fx.GraphModule, contract: Contract, metadata: Metadata) -> Program:
    """Cleans a flat functional graph and makes a program of it."""
    clean.refresh(module)
    clean.clean(module)
    return Program(module, contract, metadata)


def read_metadata(model: nn.Module) -> Metadata:
    """Metadata from a Hugging Face configuration; a plain module has only its class name."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return Metadata(name=type(model).__name__)
    config = config.get_text_config()
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and not config.is_encoder_decoder
    return Metadata(
        name=getattr(config, "name_or_path", "") or type(model).__name__,
        family=config.model_type,
        causal=causal,
        vocab_size=config.vocab_size,
        context_length=int(
            getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", 0) or 2048
        ),
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,)),
        pad_token_id=getattr(config, "pad_token_id", None),
    )


def check_weights(model: nn.Module) -> None:
    """Refuses weights that are not finite, or not loaded at all.

    Raises:
        CaptureError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            raise CaptureError(
                f"Weight {name} is on the meta device, it has no values",
                fix="Load the model's weights first",
            )
        # A sum is finite only if every term is, and needs no copy of the tensor; it can still overflow.
        if tensor.sum().isfinite():
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise CaptureError(
                f"Weight {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}",
                fix="The checkpoint is damaged or was saved from a diverged run: load another",
            )


def _named_inputs(model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters)
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        return dict(zip(parameters, given, strict=False))
    if getattr(model, "config", None) is None:
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs are not known",
            fix="Pass example_inputs={'name': tensor, …} for the parameters of forward",
        )
    shape = (EXAMPLE_BATCH, EXAMPLE_SEQUENCE)
    makers = {"attention_mask": torch.ones}
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    names = [n for n in TOKEN_INPUTS if n in parameters and (decoder or n != "decoder_input_ids")]
    inputs: dict[str, Any] = {n: makers.get(n, torch.zeros)(shape, dtype=torch.int64) for n in names}
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def _default_dims(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    dims: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        dims[name] = {0: "batch"} if tensor.dim() else {}
        if tensor.dim() == 2 and not tensor.is_floating_point():
            dims[name][1] = "target_sequence" if name.startswith("decoder_") else "sequence"
    return dims


def _contract(tensors: Mapping[str, Tensor], dims: DimNames, metadata: Metadata) -> Contract:
    specs = []
    for name, tensor in tensors.items():
        axes = dims.get(name, {})
        shape = tuple(axes.get(axis, int(size)) for axis, size in enumerate(tensor.shape))
        role = TOKEN_INPUTS.get(name, "tensor")
        specs.append(InputSpec(name, tensor.dtype, shape, role, metadata.vocab_size if role == "token" else 0))
    names = dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str))
    longest = metadata.context_length or 1 << 20
    ranges = tuple(Dim(n, 1, longest if "sequence" in n else MAX_BATCH) for n in names)
    return Contract(tuple(specs), (), ranges)


def _export(model: nn.Module, inputs: Mapping[str, Any], contract: Contract) -> torch.export.ExportedProgram:
    symbols = {d.name: torch.export.Dim(d.name, min=d.min, max=d.max) for d in contract.dims}
    by_name = {spec.name: spec for spec in contract.inputs}
    dynamic = {
        name: {a: symbols[d] for a, d in enumerate(by_name[name].shape) if isinstance(d, str)}
        if name in by_name
        else None
        for name in inputs
    }

    import_tracer()

    def export() -> torch.export.ExportedProgram:
        # Without no_grad, rotary code arrives as a nested graph that rules cannot see into.
        with torch.no_grad():
            exported = torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
            return exported.run_decompositions({}) if any(map(_mutates, exported.graph.nodes)) else exported

    try:
        with unrolled(model, stacked=False):
            return export()
    except GraphwrightError:
        raise
    except Exception as error:
        if not _data_dependent(str(error)):
            raise _capture_error(model, error) from error
    try:
        with unrolled(model, stacked=True):
            return export()
    except Exception as error:
        raise _capture_error(model, error) from error


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Names the operation, the line of the model, and the way out, from what torch.export says."""
    message = str(error)
    stack = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', message)
    frames = [(f, n, fn) for f, n, fn in stack if "/torch/" not in f] or _frames(error)
    where = f"{frames[-1][0]}, line {frames[-1][1]}, in {frames[-1][2]}" if frames else ""
    operation = _source_line(frames[-1]) if frames else ""
    first = message.strip().splitlines()[0] if message.strip() else type(error).__name__
    doing = f" at `{operation}`" if operation else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured{doing}: {type(error).__name__}: {first}",
        where=where,
        fix=_advice(message),
    )


def _frames(error: BaseException) -> list[tuple[str, str, str]]:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.endswith("graphwright/capture.py"):
            frames.append((file, str(trace.tb_lineno), trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    return frames


def _source_line(frame: tuple[str, str, str]) -> str:
    try:
        with open(frame[0]) as file:
            return file.readlines()[int(frame[1]) - 1].strip()
    except (OSError, IndexError):
        return ""


def _advice(message: str) -> str:
    if "Constraints violated" in message or "specialized" in message or "not be dynamic" in message:
        return (
            "The model fixes a size that was asked to be symbolic, often by a Python loop over it: capture with dims "
            "that leave this axis out, at the size you need"
        )
    if _data_dependent(message):
        return "A branch or shape depends on tensor values: replace it with torch.where or a fixed size"
    return "Check that the model runs on the example inputs, and that its forward uses torch operations only"


def _data_dependent(message: str) -> bool:
    return any(word in message for word in ("data-dependent", "unbacked", "GuardOnDataDependent", "DataDependent"))


def _flatten(exported: torch.export.ExportedProgram, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A flat graph: weights as get_attr, placeholders for the tensor inputs, a tuple as output."""
    unlifted = exported.module(check_guards=False)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(unlifted.graph, copied)
    for source, node in copied.items():
        node.meta = dict(source.meta)
    graph.output(tuple(output) if isinstance(output, (list, tuple)) else (output,))
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target) not in tensors:
            if node.users:
                raise CaptureError(f"The fixed input {node.target} was not folded into the graph")
            graph.erase_node(node)
    _drop_fixed_outputs(graph)
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = unlifted
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                set_attribute(root, str(node.target), value.detach())
            else:
                raise CaptureError(
                    f"The graph holds a nested {type(value).__name__}",
                    where=str(node.target),
                    fix="Capture a model without higher-order control flow (cond, while_loop, checkpoint)",
                )
    return fx.GraphModule(root, graph)


def _drop_fixed_outputs(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = (tuple(value for value in output.args[0] if isinstance(value, fx.Node)),)


def _output_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The names of a ModelOutput's or dict's tensors; `output_0` … for anything else."""
    spec = exported.call_spec.out_spec
    kept = [i for i, s in enumerate(exported.graph_signature.user_outputs) if isinstance(s, str)]
    keys = spec.context if isinstance(spec.context, (list, tuple)) else None
    if keys and len(keys) == spec.num_leaves and all(isinstance(key, str) for key in keys):
        return tuple(keys[i] for i in kept)
    return tuple(f"output_{i}" for i in range(len(kept)))


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


__all__ = ["capture", "check_weights", "finish", "read_metadata"]
