"""Triton kernels for NVIDIA and AMD GPUs, one family a file.

Every file holds the kernel, a function that says how it is launched for given tensors, the reference that it must
agree with, its configurations, and `SHAPES`: the shape classes that it serves, each as a call on meta tensors, from
which kernels are compiled, inspected and compared on a machine without a GPU.

The functions take a `Runner` first. What it does with a launch is its own affair: run it through Triton's
just-in-time compiler or interpreter, start a binary compiled ahead of time, or only note it down.
"""
