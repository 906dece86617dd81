"""The terminal app: what there is, what it is like, and what to do with it; the work is done by the command line."""
