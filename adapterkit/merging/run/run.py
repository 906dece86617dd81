"""A plan run: all of it, or one file of it in any process.

`run` makes all files by a scheduler, in a workspace that becomes the output. `run_file` makes one, and what it returns
is all that `finish` needs of it, so that files can be made in any order by any number of processes.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import staged
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.done import FileDone
from adapterkit.merging.receipts.receipt import check_receipt
from adapterkit.merging.receipts.resume import clear_records, job_of, record_done, resume_hint, reuse_finished
from adapterkit.merging.run.budget import check_device, check_space
from adapterkit.merging.run.finish import Merged, finish_job
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run.making import FileMaking, Job
from adapterkit.merging.run.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class TensorMerged:
    """One output tensor is done: the `done`-th of `total`."""

    name: str
    done: int
    total: int


def check_options(plan: MergePlan, options: RunOptions) -> None:
    """Raise UsageError for options that do nothing for this plan."""
    options.check(quantized=bool(plan.schemes), resumable=plan.undoable and plan.calibration is None)


def check_run(plan: MergePlan, options: RunOptions) -> None:
    """Refuse what cannot work before anything is written.

    Raises UsageError for options that do not fit the plan, OutputExistsError where the output may not be written, and
    FormatError where the receipt could not be read back.
    """
    check_options(plan, options)
    check_device(plan, options)
    receipt = plan.undoable and options.receipt
    plan.destination(receipt).check()
    if receipt:
        check_receipt(plan)


def run(plan: MergePlan, options: RunOptions | None = None) -> Generator[TensorMerged | Merged, None, None]:
    """Run `plan`, yielding an event for each tensor and the result last; nothing is left behind on failure.

    With `resume` files are taken over that a run of this plan had finished when it was interrupted, and are left there
    if this one fails.
    Raises NoSpaceError where the disk is too small, before or while writing, FitError where factors are not finite or
    results exceed their dtype, LossError where quantizing leaves little of the update, and what `check_run` raises.
    """
    options = options or RunOptions()
    check_run(plan, options)
    check_space(plan, options.link)
    if plan.calibration is not None:
        from adapterkit.merging.calibration import calibrated

        with calibrated(plan) as plan:
            yield from run(replace(plan, calibration=None), options)
        return
    inputs, receipt = Inputs(plan), plan.undoable and options.receipt
    resumable = receipt and plan.base.is_directory
    job_name = job_of(plan, options) if resumable else None
    hint = resume_hint if options.resume else lambda _: ""
    with staged(plan.destination(receipt), job=job_name, resume=options.resume, resume_hint=hint) as building:
        job = Job(plan, building, options)
        if job.folder != building:
            job.folder.mkdir()
        making = _Making(job, inputs, resumable)
        for number, name in enumerate(making.scheduler.run(), making.taken_over + 1):
            yield TensorMerged(name, number, plan.edits)
        merged = finish_job(job, making.done, inputs, making.adapters)
        if plan.base.is_directory:
            clear_records(building)
    yield replace(merged, notes=(*merged.notes, *making.scheduler.place.notes))


def run_file(plan: MergePlan, file: FilePlan, where: Path, options: RunOptions | None = None) -> FileDone:
    """Make one output file of a plan, with its sidecar, in `where`; nothing else is written.

    Args:
        plan: what is merged.
        file: one of its files.
        where: the folder to make it in; of a base that is a single file, the file to make.
        options: how; those of all files of a plan must be the same.

    Returns:
        What `finish` needs to know of the file.

    Raises:
        AdapterkitError: See `run`.
    """
    options, inputs, made = options or RunOptions(), Inputs(plan, file), list[FileDone]()
    check_device(plan, options)
    job = Job(plan, where, options)
    if job.folder != where:
        job.folder.mkdir(exist_ok=True)

    def when_done(making: FileMaking) -> None:
        assert making.done is not None
        made.append(making.done)

    scheduler = Scheduler(job, [file], inputs, (), when_done)
    for _ in scheduler.run():
        pass
    inputs.check()
    [done] = made
    return replace(done, notes=(*done.notes, *scheduler.place.notes))


class _Making:
    """The files of a run that are done, each recorded as soon as the adapters are hashed too."""

    def __init__(self, job: Job, inputs: Inputs, resumable: bool) -> None:
        plan, options = job.plan, job.options
        self.done: list[FileDone] = []
        self._job, self._resumable, self._recorded = job, resumable, 0
        self._lock = threading.Lock()
        files = [file for one in plan.adapters for file in one.adapter.files]
        self._hashed: dict[Path, str] = {}
        if options.resume and resumable:
            self._hashed = {file: sha256_of(file) for file in files}
            self.done = reuse_finished(plan, options, job.where, self._by_adapter(self._hashed))
            self._recorded = len(self.done)
        taken = {one.name for one in self.done}
        self.taken_over = sum(len(file.edits) for file in plan.files if file.name in taken)
        left = [file for file in plan.files if file.name not in taken]
        also = [] if self._hashed else list(dict.fromkeys(files))
        self.scheduler = Scheduler(job, left, inputs, also, self._when_done)

    @property
    def adapters(self) -> dict[Path, str]:
        """The SHA-256 of the adapters' files."""
        return self._hashed or {file: hash_.sha256.hexdigest() for file, hash_ in self.scheduler.also.items()}

    def _by_adapter(self, hashed: dict[Path, str]) -> list[dict[str, str]]:
        return [{file.name: hashed[file] for file in one.adapter.files} for one in self._job.plan.adapters]

    def _when_done(self, making: FileMaking) -> None:
        assert making.done is not None
        with self._lock:
            self.done.append(making.done)
            if self._resumable and all(not hash_.left for hash_ in self.scheduler.also.values()):
                for one in self.done[self._recorded :]:
                    record_done(self._job.where, one, self._by_adapter(self.adapters))
                self._recorded = len(self.done)
