"""Run a plan on threads, file by file."""
