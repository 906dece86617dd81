"""Merge adapters into a base, on disk or in a live model; verify and undo merges."""
