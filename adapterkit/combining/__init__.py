"""Adapters from adapters: combine, compare, convert, extract."""
