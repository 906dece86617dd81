"""Results as tables, curves and pictures."""
