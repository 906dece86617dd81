"""Merge plans: plain data, validated before anything is written."""
