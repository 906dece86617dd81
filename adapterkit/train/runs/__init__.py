"""Training runs, from a recipe to the files of the result: models, memory, checkpoints, evaluation."""

from adapterkit.train.runs.run import train

__all__ = ["train"]
