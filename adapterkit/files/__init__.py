"""Bytes on disk: safetensors, JSON, safe reads of untrusted files, and all-or-nothing outputs."""
