"""Training runs from a recipe to what is left on disk: models, memory, checkpoints, results."""

from adapterkit.train.runs.run import train

__all__ = ["train"]
