"""Set up a run's folder and its distributed processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from adapterkit.errors import OutputExistsError, UsageError
from adapterkit.files import os_calls
from adapterkit.files.staging import Destination, staged, unfinished_work
from adapterkit.hub import input_path
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs import checkpoints

JOB = "train"


class StoppedError(Exception):
    """Ends a stopped run without removing its folder."""


def check_run(recipe: Recipe, out: Path, rank: int, resume: bool, overwrite: bool) -> Destination:
    """The checked destination of the run.

    Raises:
        OutputExistsError: An interrupted run is there, and neither `resume` nor `overwrite` is given.
        UsageError: `resume` is given, and there is no checkpoint.
    """
    models = (input_path(spec) for spec in (recipe.base, recipe.init_from) if spec)
    data = (Path(path).expanduser() for path in (recipe.data, recipe.eval_data) if path)
    place = Destination(out, (*models, *data), overwrite=overwrite)
    if rank:  # the first process checks, before it writes
        return place
    place.check()
    folder = unfinished_work(out, JOB)
    left = checkpoints.steps(folder) if folder else []
    if resume and not left:
        raise UsageError(f"`resume=True`: no checkpoint beside {out}", hint="omit `resume=True` to start a new run")
    if left and not resume and not overwrite:
        raise OutputExistsError(
            f"{out}: a run was interrupted after step {checkpoints.number(left[-1])}",
            hint="continue it with `resume=True`, or start again with `overwrite=True`",
        )
    return place


@contextmanager
def folder_for(place: Destination, rank: int, resume: bool) -> Iterator[Path]:
    """The folder of the run; a run that fails before its first checkpoint leaves nothing."""
    with suppress(StoppedError):
        if rank:
            yield place.out
        else:
            with staged(place, job=JOB, resume=resume, precious=True, resume_hint=_resume_hint) as folder:
                yield folder


def _resume_hint(folder: Path) -> str:
    """The message about a failed run that has a checkpoint."""
    return "the last checkpoint is saved: continue with `resume=True`" if checkpoints.steps(folder) else ""


@contextmanager
def processes() -> Iterator[tuple[int, int, int]]:
    """The rank of this process, the number of processes, and the rank on this machine, as set by `torchrun`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0"))
        dist.barrier()  # no process leaves while another still communicates
    finally:
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return os_calls.peak_memory()
