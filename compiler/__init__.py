"""Graphwright."""
