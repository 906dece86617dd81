"""Merge adapters into a model in memory, and remove them bit for bit."""
