"""Where a run lives, and with which other processes it shares the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from adapterkit.errors import OutputExistsError, UsageError
from adapterkit.files import system
from adapterkit.files.staging import Destination, staged, work_left
from adapterkit.hub import place_of
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs import checkpoints

JOB = "train"


class StoppedError(Exception):
    """Ends a run that was asked to stop, so that its folder stays."""


def check_run(recipe: Recipe, out: Path, rank: int, resume: bool, overwrite: bool) -> Destination:
    """Where the run's result goes.

    Raises where that may not be written, a run is there that nobody said to go on with, or none is that one did.
    """
    models = (place_of(spec) for spec in (recipe.base, recipe.init_from) if spec)
    data = (Path(path).expanduser() for path in (recipe.data, recipe.eval_data) if path)
    place = Destination(out, (*models, *data), overwrite=overwrite)
    if rank:  # the first process looks, before it begins to write
        return place
    place.check()
    folder = work_left(out, JOB)
    left = checkpoints.steps(folder) if folder else []
    if resume and not left:
        raise UsageError(f"--resume: beside {out} is no checkpoint to go on from; leave --resume out")
    if left and not resume and not overwrite:
        raise OutputExistsError(
            f"{out}: a run was interrupted there after step {checkpoints.number(left[-1])}. Go on with --resume, or "
            "begin anew with --overwrite."
        )
    return place


@contextmanager
def folder_for(place: Destination, rank: int, resume: bool) -> Iterator[Path]:
    """Where the run lives; without a checkpoint nothing of it stays where it fails."""
    with suppress(StoppedError):
        if rank:
            yield place.out
        else:
            with staged(place, job=JOB, resume=resume, precious=True, kept=_in_words) as folder:
                yield folder


def _in_words(folder: Path) -> str:
    """What of an interrupted run is worth keeping."""
    return "the last checkpoint is kept: go on with --resume" if checkpoints.steps(folder) else ""


@contextmanager
def processes() -> Iterator[tuple[int, int, int]]:
    """This process's rank, how many there are, and its rank on this machine, as `torchrun` has set them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0"))
        dist.barrier()  # none leaves while another still speaks to it
    finally:
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held: of a GPU's memory, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_memory()
