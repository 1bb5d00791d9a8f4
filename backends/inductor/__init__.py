"""The Inductor backend."""
