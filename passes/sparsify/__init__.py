"""Passes that remove single weights, patterns of weights, and whole channels, heads and layers. One technique a file."""
