"""A plan run on threads, file by file."""
