"""A schedule for what TVM's own operators become: producers inlined, outer loops shared between threads where long."""

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline

SMALL = 1 << 14
"""Elements that one thread writes faster than two."""


@tvm.transform.module_pass(opt_level=0, name="ScheduleLeftovers")
class ScheduleLeftovers:
    """Schedules every function that is made of blocks; hand-written kernels are not."""

    def transform_module(self, module: IRModule, _context: tvm.transform.PassContext) -> IRModule:
        """The module with scheduled functions."""
        changed: dict[Any, Any] = dict(module.functions.items())
        for variable, function in changed.items():
            if isinstance(function, tirx.PrimFunc) and isinstance(function.body, s_tir.SBlockRealize):
                changed[variable] = scheduled(function)
        return IRModule(changed, attrs=module.attrs)


def scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with its spatial loops fused and shared between threads, unless it is small."""
    schedule = s_tir.Schedule(function)
    blocks = normalize_prim_func(schedule)
    if blocks is None:
        return function
    for block in try_inline(schedule, blocks):
        kinds = block.dom_kind()
        loops = schedule.get_loops(block.block_rv)
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        if not spatial or len(kinds) != len(loops) or _elements(schedule, spatial) <= SMALL:
            continue
        schedule.reorder(*spatial, *(loop for loop in loops if loop not in spatial))
        schedule.parallel(schedule.fuse(*spatial))
    return schedule.mod["main"]


def _elements(schedule: s_tir.Schedule, loops: list[Any]) -> float:
    """Iterations of loops; infinitely many where a size is symbolic."""
    total = 1.0
    for loop in loops:
        extent = schedule.get(loop).extent
        total *= float(int(extent)) if isinstance(extent, tirx.IntImm) else float("inf")
    return total
