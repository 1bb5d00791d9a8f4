"""As many threads for TVM's kernels as torch uses, on whatever cores the process may run."""

import os
import threading

import torch
import tvm_ffi

SHARE_ALL_CORES = -3
"""TVM's mode in which the system schedules threads; its default ties the calling thread to the first core."""

# A worker without work gives way so many times before it sleeps, 300000 by default, and does so even when the process
# ends: on a machine that has other things to do, that is a time slice each, and minutes until the process is gone.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")

_configured = threading.local()


def follow_torch() -> None:
    """Sizes the pool of the calling thread, which TVM would otherwise give half of the cores."""
    wanted = torch.get_num_threads()
    if getattr(_configured, "threads", 0) != wanted:
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        tvm_ffi.get_global_func("runtime.config_threadpool")(SHARE_ALL_CORES, wanted, cores)
        _configured.threads = wanted
