"""Mixtures of experts: one op for the expert MLPs and one for the routing."""
