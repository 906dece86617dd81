"""Requests to the Hub with limits on time and size, tokens masked, and adapterkit's own errors."""
