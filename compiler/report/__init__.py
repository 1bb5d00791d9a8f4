"""Reports: collected once as plain data, shown in the terminal and as one self-contained HTML page."""
