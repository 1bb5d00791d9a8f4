"""Kernels for GPUs compared without a GPU: ours, and public ones, compiled here for the same target and shape.

    python samples/bench/gpu_static.py                                  compare with liger-kernel and fla-core
    python samples/bench/gpu_static.py --matrix --target rocm:gfx942    every kernel of ours on a target

    pip install --no-deps liger-kernel==0.8.5 fla-core==0.6.0 && pip install einops       for the comparison

Nothing is run, so nothing here is a speed: registers, spills, instructions and load widths are read from the machine
code; bytes follow from the arguments, and the time is the model's (graphwright.kernels.triton.model). Public kernels
are compiled with the block sizes and warps that their own launchers choose for the shape on such a GPU, ours with
those that the static search chooses.
"""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphwright.kernels.triton as family_package
from graphwright.backends.triton.build import Workers, build, search
from graphwright.backends.triton.machine_code import Resources, occupied
from graphwright.kernels.triton import activation, flash_attention, norm
from graphwright.kernels.triton.device import DEVICES, Device
from graphwright.kernels.triton.launch import Config, Launch, Problem, Recorder, Work, cdiv, meta
from graphwright.kernels.triton.model import seconds

ROWS, WIDTH, GATED = 4096, 4096, 14336
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 1, 4096, 32, 8, 128


@dataclass(frozen=True)
class Peer:
    """A public kernel on one shape.

    Attributes:
        name: of the package and kernel.
        module: where it lives.
        kernel: its function.
        types: Triton types of its run-time parameters, in its order.
        constants: its other parameters.
        config: warps and stages that its launcher chooses; `None` for stages means Triton's default of 3.
        grid: number of blocks.
        work: of one block.
        aligned: integer parameters that are multiples of 16 on this shape.
        matrix: whether it multiplies matrices.
    """

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    config: Config
    grid: int
    work: Work
    aligned: tuple[str, ...] = ()
    matrix: bool = False


@dataclass(frozen=True)
class Duel:
    """One of our launches and the public kernel that does the same."""

    what: str
    ours: Callable[[Recorder], Any]
    peer: Callable[[Device], Peer]
    note: str = ""


def liger(kernel: str, file: str, types: dict[str, str], constants: dict[str, Any], width: int, moved: int) -> Peer:
    """A kernel of liger-kernel, which gives a row to a block."""
    warps = 16 if width >= 8192 else 8 if width >= 2048 else 4
    constants = {**constants, "BLOCK_SIZE": 1 << (width - 1).bit_length()}
    strides = tuple(name for name in types if "stride" in name or name == "n_cols")
    work = Work(6 * width, moved)
    return Peer(
        "liger-kernel", f"liger_kernel.ops.{file}", kernel, types, constants, Config.of(warps, 3), ROWS, work, strides
    )  # fmt: skip


def liger_rms_norm(_device: Device) -> Peer:
    types = {
        "Y_ptr": "*bf16", "Y_row_stride": "i32", "X_ptr": "*bf16", "X_row_stride": "i32", "W_ptr": "*bf16",
        "RSTD_ptr": "*fp32", "n_cols": "i32", "eps": "fp32", "offset": "fp32",
    }  # fmt: skip
    constants = {"W_row_stride": 1, "RSTD_row_stride": 1, "casting_mode": 0, "elementwise_affine": True}
    return liger("_rms_norm_forward_kernel", "rms_norm", types, constants, WIDTH, 4 * WIDTH + 4)


def liger_add_rms_norm(_device: Device) -> Peer:
    types = {
        "Y_ptr": "*bf16", "Y_row_stride": "i32", "S_ptr": "*bf16", "S_row_stride": "i32", "X_ptr": "*bf16",
        "X_row_stride": "i32", "R_ptr": "*bf16", "R_row_stride": "i32", "W_ptr": "*bf16", "RSTD_ptr": "*fp32",
        "n_cols": "i32", "eps": "fp32", "offset": "fp32",
    }  # fmt: skip
    constants = {"W_row_stride": 1, "RSTD_row_stride": 1, "casting_mode": 0}
    name = "_fused_add_rms_norm_forward_kernel"
    return liger(name, "fused_add_rms_norm", types, constants, WIDTH, 8 * WIDTH + 4)


def liger_layer_norm(_device: Device) -> Peer:
    types = {
        "Y_ptr": "*bf16", "Y_row_stride": "i32", "X_ptr": "*bf16", "X_row_stride": "i32", "W_ptr": "*bf16",
        "B_ptr": "*bf16", "Mean_ptr": "*fp32", "RSTD_ptr": "*fp32", "n_cols": "i32", "eps": "fp32",
    }  # fmt: skip
    constants = {"W_row_stride": 1, "B_row_stride": 1, "Mean_row_stride": 1, "RSTD_row_stride": 1}
    return liger("_layer_norm_forward_kernel", "layer_norm", types, constants, WIDTH, 4 * WIDTH + 8)


def liger_swiglu(_device: Device) -> Peer:
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "stride": "i32", "gate_multiplier": "fp32"}
    return liger("_swiglu_forward_kernel", "swiglu", types, {"n_cols": GATED}, GATED, 6 * GATED)


def fla_attention(device: Device) -> Peer:
    """Flash attention of fla-core, with the blocks of its launcher."""
    block_keys, block_values, warps = (64, 128, 8) if device.shared_block > 200_000 else (32, 128, 4)
    if device.shared_block < 160_000:
        block_keys, block_values, warps = 32, 64, 2
    types = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "o": "*bf16", "lse": "*fp32", "scale": "fp32", "T": "i32"}
    constants = {
        "g_cumsum": None, "sink_bias": None, "cu_seqlens": None, "chunk_indices": None, "W": None, "B": BATCH,
        "H": KV_HEADS, "HQ": HEADS, "G": HEADS // KV_HEADS, "K": HEAD_DIM, "V": HEAD_DIM, "BT": 128,
        "BS": block_keys, "BK": HEAD_DIM, "BV": block_values, "USE_G": False, "USE_SINK_BIAS": False,
        "USE_WINDOW": False, "IS_VARLEN": False,
    }  # fmt: skip
    seen = LENGTH / 2 + 128
    parts = HEAD_DIM // block_values
    flops = 2 * 128 * seen * (HEAD_DIM + block_values)
    moved = (128 + flash_attention.CACHED * seen) * (HEAD_DIM + block_values) * 2 + 4 * 128
    work = Work(flops, moved, "bfloat16", block_keys * (HEAD_DIM + block_values) * 2 * 2)
    return Peer(
        "fla-core", "fla.ops.attn.parallel", "parallel_attn_fwd_kernel", types, constants, Config.of(warps, 3),
        parts * cdiv(LENGTH, 128) * BATCH * HEADS, work, ("T",), True,
    )  # fmt: skip


def our_attention(run: Recorder) -> Any:
    query, key = (meta(torch.bfloat16, BATCH, LENGTH, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    return flash_attention.attention(run, query, key, key, None, None, None, None, None, 0.1, True)


def _rows(width: int) -> Any:
    return meta(torch.bfloat16, ROWS, width)


def _weight() -> Any:
    return meta(torch.bfloat16, WIDTH)


DUELS = (
    Duel("rms_norm 4096x4096", lambda run: norm.rms_norm(run, _rows(WIDTH), _weight(), 1e-6), liger_rms_norm,
         "the public one also stores 1 / rms for training"),
    Duel("rms_norm of a sum 4096x4096", lambda run: norm.add_rms_norm(run, _rows(WIDTH), _rows(WIDTH), _weight(), 1e-6),
         liger_add_rms_norm, "the public one also stores 1 / rms for training"),
    Duel("layer_norm 4096x4096", lambda run: norm.layer_norm(run, _rows(WIDTH), _weight(), _weight(), 1e-5),
         liger_layer_norm, "the public one also stores mean and 1 / deviation for training"),
    Duel("swiglu 4096x14336", lambda run: activation.gated_activation(run, _rows(GATED), _rows(GATED), "silu"),
         liger_swiglu),
    Duel("causal attention 32/8 heads of 128, 4096 tokens", our_attention, fla_attention,
         "the public one also stores the log-sum-exp for training"),
)  # fmt: skip


def fight(duel: Duel, device: Device, workers: Workers, width: int) -> list[dict[str, Any]]:
    """A row for ours and one for the public kernel."""
    recorder = Recorder(device)
    duel.ours(recorder)
    found = search(recorder.launches[0], device, workers, width)
    if found.binary is None:
        sys.exit(f"{duel.what}: no configuration of ours passes the gates on {device.name}: {found.refused}")
    rows = [row(duel.what, "graphwright", found.binary.resources, found.launch, found.binary.config, device)]
    peer = duel.peer(device)
    problem = Problem(
        peer.module, peer.kernel, tuple(peer.types.items()),
        (*(name for name, kind in peer.types.items() if kind.startswith("*")), *peer.aligned),
        tuple(peer.constants.items()), (peer.config,), peer.matrix,
    )  # fmt: skip
    answer = workers.compile(problem, peer.config, device)
    if "error" in answer:
        return [*rows, {"what": duel.what, "who": peer.name, "config": answer["error"]}]
    resources = Resources.from_json(answer["resources"])
    launch = Launch(None, {}, {}, (peer.config,), lambda _config: (peer.grid,), lambda _config: peer.work)
    return [*rows, row(duel.what, peer.name, resources, launch, peer.config, device)]


def row(what: str, who: str, read: Resources, launch: Launch, config: Config, device: Device) -> dict[str, Any]:
    """What is compared."""
    blocks = 1
    for size in launch.grid(config):
        blocks *= size
    return {
        "what": what,
        "who": who,
        "config": str(config),
        "registers": read.registers,
        "spills": read.spills,
        "shared": read.shared,
        "occupancy": f"{occupied(read, config, device):.0%}",
        "instructions": read.instructions,
        "matrix": " ".join(f"{n} {opcode}" for opcode, n in read.matrix.items()),
        "widest load": read.widest_load,
        "modelled MB": round(launch.work(config).bytes * blocks / 1e6, 1),
        "modelled us": round(seconds(launch, config, device, read.usage) * 1e6, 1),
    }


WITHOUT = {
    ("rocm:gfx1100", "decode_attention: int8 cache"): "codes widened for a transposed operand need too many registers",
    ("rocm:gfx1100", "flash_attention: head_dim 256 causal"): "operands lie twice in 256 registers a thread",
}
"""Kernels that pass the gates in no configuration on a target, and why; any other makes `--matrix` fail."""


def matrix(device: Device, dtype: torch.dtype, workers: Workers, width: int) -> list[dict[str, Any]]:
    """A row for every kernel and shape class of ours."""
    launches, names = [], {}
    for info in pkgutil.iter_modules(family_package.__path__):
        family = importlib.import_module(f"{family_package.__name__}.{info.name}")
        for shape, call in getattr(family, "SHAPES", {}).items():
            recorder = Recorder(device)
            call(recorder, dtype)
            launches += recorder.launches
            for launch in recorder.launches:
                names.setdefault(launch.problem().key, f"{info.name}: {shape}")
    rows = []
    for found in build(launches, device, lambda *_: None, width=width, workers=workers):
        what = names[found.problem.key]
        if found.binary is None:
            reasons = "; ".join(f"{config}: {why}" for config, why in found.refused.items())
            rows.append({"what": what, "who": found.problem.kernel, "config": f"NONE: {reasons}"})
            continue
        made = row(what, found.problem.kernel, found.binary.resources, found.launch, found.binary.config, device)
        rows.append({**made, "refused": len(found.refused)})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    columns = max(rows, key=len)
    for column in columns:
        table.add_column(column)
    for line in rows:
        table.add_row(*(str(line.get(column, "")) for column in columns))
    Console(width=200).print(table)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(DEVICES), help="may be repeated")
    parser.add_argument("--matrix", action="store_true", help="every kernel of ours instead of the comparison")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--width", type=int, default=3, help="configurations that are compiled and compared")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    everything = {}
    with Workers() as workers:
        for name in options.target or ["cuda:sm_80", "cuda:sm_90"]:
            device = DEVICES[name]
            if options.matrix:
                rows = matrix(device, getattr(torch, options.dtype), workers, options.width)
            else:
                missing = [p for p in ("liger_kernel", "fla") if importlib.util.find_spec(p) is None]
                if missing:
                    sys.exit(f"The comparison needs {' and '.join(missing)}; see the head of this file")
                rows = [line for duel in DUELS for line in fight(duel, device, workers, options.width)]
            everything[name] = rows
            if not options.json:
                show(name, rows)
    if options.json:
        print(json.dumps(everything, indent=1))
    elif not options.matrix:
        for duel in DUELS:
            if duel.note:
                Console().print(f"{duel.what}: {duel.note}.")
    holes = [(name, line["what"]) for name, rows in everything.items() for line in rows if "registers" not in line]
    unexpected = [f"{what} on {name}" for name, what in holes if (name, what) not in WITHOUT]
    if unexpected:
        sys.exit(f"No configuration passes the gates: {', '.join(unexpected)}")


if __name__ == "__main__":
    main()
