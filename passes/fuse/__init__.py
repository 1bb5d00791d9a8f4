"""Fusion: fewer, larger operations and no work that is not asked for."""
