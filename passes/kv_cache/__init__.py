"""Cache insertion: a cache-free program becomes a prefill and decode program."""
