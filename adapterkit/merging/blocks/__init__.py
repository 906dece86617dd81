"""Merge or restore blocks of rows: read, change, round once, and record the undo."""
