"""Where a run lives, and with which other processes it shares the work."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from adapterkit.errors import NoSpaceError, OutputExistsError, UsageError
from adapterkit.runs import checkpoints
from adapterkit.staging import check_output, partial_of, remove, staged


class StoppedError(Exception):
    """Ends a run that was asked to stop, so that its folder stays."""


def check_run(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise where `out` may not be written, a run is there that nobody said to go on with, or none is that one did."""
    check_output(out, overwrite)
    left = checkpoints.steps(partial_of(out))
    if resume and not left:
        raise UsageError(f"--resume: {partial_of(out)} holds no checkpoint to go on from; leave --resume out")
    if left and not resume and not overwrite:
        raise OutputExistsError(
            f"{out}: a run was interrupted there after step {checkpoints.number(left[-1])}. Go on with --resume, or "
            "begin anew with --overwrite."
        )


@contextmanager
def folder_for(out: Path, rank: int) -> Iterator[Path]:
    """Where the run lives; without a checkpoint nothing of it stays where it fails."""
    if rank:
        with suppress(StoppedError):
            yield partial_of(out)
        return
    try:
        with suppress(StoppedError), staged(out, directory=True, keep=True) as folder:
            try:
                yield folder
            except BaseException:
                if not checkpoints.steps(folder):
                    remove(folder)
                raise
    except NoSpaceError as error:
        if not checkpoints.steps(partial_of(out)):
            raise
        raise NoSpaceError(
            f"{out}: the disk is full. The last checkpoint is kept: free some space, and go on with --resume."
        ) from error


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
