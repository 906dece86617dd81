"""The terminal app: browse and inspect adapters, and run commands on them as subprocesses."""
