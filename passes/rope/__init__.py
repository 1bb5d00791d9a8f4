"""Longer contexts for models with rotary position embeddings."""
