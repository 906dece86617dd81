"""Exact arithmetic on low-rank factors and matrix rows, independent of files."""
