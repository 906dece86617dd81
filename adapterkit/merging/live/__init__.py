"""Adapters merged into a model in memory, and removed again bit for bit."""
