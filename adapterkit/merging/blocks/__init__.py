"""A block of rows: read, changed, rounded once, and what undoes it."""
