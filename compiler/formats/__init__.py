"""Export formats that need no backend, one a file; see `graphwright.export_format`."""
