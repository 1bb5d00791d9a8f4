"""Raising: ATen subgraphs become semantic ops."""
