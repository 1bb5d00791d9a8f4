"""Other attentions: fewer key-value heads, and masks that let a query see fewer keys."""
