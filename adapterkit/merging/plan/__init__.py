"""A merge as data, complete and checked before a byte is written."""
