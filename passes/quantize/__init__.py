"""Quantization: weights become packed low-bit tensors."""
