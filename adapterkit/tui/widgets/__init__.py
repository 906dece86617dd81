"""A widget a file, named for what is on the screen."""
