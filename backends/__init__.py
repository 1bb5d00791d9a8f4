"""The backends of Graphwright: each turns a rewritten program into something that runs."""
