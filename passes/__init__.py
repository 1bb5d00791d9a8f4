"""The passes of Graphwright: one technique a file, found by file name."""
