"""What measures adapterkit, beside other tools: each script runs as `python -m benchmarks.NAME`, or by its path."""
