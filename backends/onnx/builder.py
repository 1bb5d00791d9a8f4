"""Writing ONNX nodes: calls, constants and weights of one graph, over `onnx_ir`.

builder = Builder()
y = builder("Mul", x, builder.scalar(2.0, x.dtype))
y.shape, y.dtype                     # known at once where onnx_ir can tell, else after shape inference
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.bool: ir.DataType.BOOL,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}
"""ONNX's name for each dtype that a program may hold."""


class Builder:
    """Collects the nodes and initializers of one graph."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self.domains: set[str] = {""}
        self.scope = ""
        """Node of the program that is being translated; the names of what it becomes begin with it."""
        self._numbers = itertools.count()

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """A new node; its value, or a tuple of them if `outputs` is not one. Attributes of None are left out."""
        given = {key: value for key, value in attributes.items() if value is not None}
        self.domains.add(domain)
        name = f"{self.scope}/{op_type}_{next(self._numbers)}"
        if outputs == 1:
            return self._tape.op(op_type, inputs, given, domain=domain, name=name)
        return tuple(self._tape.op_multi_out(op_type, inputs, given, num_outputs=outputs, domain=domain, name=name))

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A constant of any shape; equal ones are one."""
        array = np.asarray(value, dtype=dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(array, dtype=dtype, name=f"constant_{len(self._constants)}")
            self._constants[key] = self._tape.initializer(tensor)
        return self._constants[key]

    def scalar(self, value: float, dtype: ir.DataType | None) -> ir.Value:
        """A constant without dimensions."""
        return self.constant(value, dtype or ir.DataType.FLOAT)

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant vector of int64, as shapes and axes are."""
        return self.constant(list(values), ir.DataType.INT64)

    def weight(self, name: str, tensor: Tensor, dtype: ir.DataType | None = None) -> ir.Value:
        """A weight under a name of its own, which shares memory with `tensor`; the same name is the same weight.

        With `dtype` the bytes of `tensor` are what that type of half a byte packs, two along the last dimension.
        """
        if name not in self._weights:
            dense = tensor.detach().contiguous()
            if dtype is None:
                stored: Any = tensor_adapters.TorchTensor(dense, name=name)
            else:
                shape = ir.Shape([*dense.shape[:-1], dense.shape[-1] * 2])
                stored = ir.PackedTensor(dense.numpy(), dtype, shape=shape, name=name)
            self._weights[name] = self._tape.initializer(stored)
        return self._weights[name]

    def graph(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], opset: int) -> ir.Graph:
        """The graph of everything written so far."""
        imports = {domain: opset if domain == "" else 1 for domain in sorted(self.domains)}
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=imports,
            name=name,
        )
