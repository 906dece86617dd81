"""Benchmarks of adapterkit against other tools; each script runs as `python -m benchmarks.NAME`, or by its path."""
