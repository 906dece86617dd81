"""A checkpoint: its tensors, where modules land in it, and how its weights are stored."""
