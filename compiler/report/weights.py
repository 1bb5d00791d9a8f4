"""What the weights of a program hold: codes, scales and zero points of quantized tensors, or plain numbers.

Which is which follows from the argument that reads a tensor, not from its name: an op whose schema has `weight`,
`scale` and `format` stores codes of that format in `weight`.
"""

import torch
from torch import Tensor, fx

from graphwright.contract import dtype_name
from graphwright.program import Program
from graphwright.report.data import WeightRow
from graphwright.text import op_name

PARTS = {"scale": "scale", "zero_point": "zero point"}


def weight_rows(program: Program) -> list[WeightRow]:
    """One row per tensor that the graph reads, in order of use."""
    users: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), []).extend((node, user) for user in node.users)
    owners: dict[tuple[int, int], str] = {}
    return [_row(name, tensor, users[name], owners) for name, tensor in program.weights().items()]


def total_by_format(rows: list[WeightRow]) -> dict[str, int]:
    """Bytes per format, the largest first; memory that two names share counts once."""
    totals: dict[str, int] = {}
    for row in rows:
        if not row["shares"]:
            totals[row["format"]] = totals.get(row["format"], 0) + row["bytes"]
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _row(
    name: str, tensor: Tensor, users: list[tuple[fx.Node, fx.Node]], owners: dict[tuple[int, int], str]
) -> WeightRow:
    part = next((p for p in (quantized_part(weight, user) for weight, user in users) if p), "")
    dtype = dtype_name(tensor.dtype)
    shares = ""
    # A meta tensor has no address; two of them are told apart by name.
    if not tensor.is_meta and tensor.numel():
        owner = owners.setdefault((tensor.data_ptr(), tensor.nbytes), name)
        shares = owner if owner != name else ""
    return WeightRow(
        name=name,
        dtype=dtype,
        format=part if part.endswith("codes") else f"{dtype} {part}".strip(),
        shape=list(tensor.shape),
        bytes=tensor.nbytes,
        readers=sorted({op_name(user.target) for _, user in users if user.op == "call_function"}),
        quantizable=tensor.is_floating_point() and not part,
        shares=shares,
    )


def quantized_part(weight: fx.Node, user: fx.Node) -> str:
    """`int4 codes`, `scale` or `zero point` where `user` reads `weight` as part of a quantized tensor; else empty."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return ""
    names = [argument.name for argument in user.target._schema.arguments]
    if not {"weight", "scale", "format"} <= set(names):
        return ""
    values = {**dict(zip(names, user.args, strict=False)), **user.kwargs}
    role = next((key for key, value in values.items() if value is weight), "")
    if role == "weight":
        return f"{values['format']} codes"
    return PARTS.get(role, "")
