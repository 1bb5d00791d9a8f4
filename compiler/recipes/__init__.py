"""Recipe presets shipped with Graphwright."""
