"""Bytes on disk: safetensors, JSON, strangers' files opened safely, and outputs that appear whole or not at all."""
