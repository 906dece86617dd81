"""Requests to the Hub that end: limits of time and size, tokens masked, errors of our own."""
