"""Adapters in memory, and their file formats."""
