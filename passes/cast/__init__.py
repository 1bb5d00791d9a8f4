"""Precision: weights and activations in another floating-point dtype."""
