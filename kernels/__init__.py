"""Kernels of Graphwright, one family a file, each beside its reference."""
