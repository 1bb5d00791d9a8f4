"""From Graphwright's description of a CPU to the one that TVM generates code for."""

import tvm

from graphwright.target import Target

MATTR = {
    "amx_int8": "+amx-int8",
    "amx_bf16": "+amx-bf16",
    "avx512_vnni": "+avx512vnni",
    "avx_vnni": "+avxvnni",
    "asimddp": "+dotprod",
    "i8mm": "+i8mm",
}
"""LLVM's names of the features that kernels choose between."""


def tvm_target(target: Target) -> tvm.target.Target:
    """LLVM code for exactly the features that `target` names, so that an artifact runs wherever they are."""
    attributes = [MATTR[feature] for feature in target.features if feature in MATTR]
    if target.arch == "aarch64":
        return tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", *attributes]})
    level = "x86-64"
    if {"avx2", "fma"} <= set(target.features):
        level = "x86-64-v3"
    if "avx512bw" in target.features:
        level = "x86-64-v4"
        attributes.append("-prefer-256-bit")
    return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": level, "mattr": attributes})
