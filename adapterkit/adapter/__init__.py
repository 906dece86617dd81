"""An adapter in memory, and the files it comes in."""
