"""Passes that remove weights: single ones, in patterns, and whole channels, heads and layers."""
