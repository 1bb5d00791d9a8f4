"""Passes that replace a weight by a product of two thin ones. One technique a file."""
