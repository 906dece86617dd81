"""Exact numbers on low-rank factors and rows; knows no files."""
