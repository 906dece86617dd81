"""Run a plan: completely, or one file at a time in any process.

`run` makes all files with a scheduler, in a workspace that becomes the output. `run_file` makes a single file and
returns everything that `finish` needs, so any number of processes can make files in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapterkit.errors import UsageError
from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import staged
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.finished_file import FileDone
from adapterkit.merging.receipts.receipt import check_receipt
from adapterkit.merging.receipts.resume import clear_records, job_of, record_done, resume_hint, reuse_finished
from adapterkit.merging.run.budget import check_device, check_space
from adapterkit.merging.run.builder import Job
from adapterkit.merging.run.finish import Merged, finish_job
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run.scheduler import Scheduler
from adapterkit.merging.run_options import RunOptions


@dataclass(frozen=True, slots=True)
class TensorMerged:
    """An output tensor is finished, number `done` of `total`."""

    name: str
    done: int
    total: int


def check_options(plan: MergePlan, options: RunOptions) -> None:
    """Raise UsageError for options that have no effect on this plan."""
    if plan.restores:
        for name, default in asdict(RunOptions(options.threads, options.device)).items():
            if getattr(options, name) != default:
                raise UsageError(f"unexpected option `{name}`: unmerging takes only `threads` and `device`")
    options.check(quantized=bool(plan.schemes), resumable=plan.undoable and plan.calibration is None)


def check_run(plan: MergePlan, options: RunOptions) -> None:
    """Check options, output and receipt before anything is written.

    Raises UsageError for options that do not fit the plan, OutputExistsError if the output may not be written, and
    FormatError if the receipt could not be read back.
    """
    check_options(plan, options)
    check_device(plan, options)
    receipt = plan.undoable and options.receipt
    plan.destination(receipt).check()
    if receipt:
        check_receipt(plan)


def run(plan: MergePlan, options: RunOptions | None = None) -> Generator[TensorMerged | Merged, None, None]:
    """Run `plan`, yielding an event for each tensor and the result last. A failure leaves nothing behind.

    With `resume`, files that an interrupted run of this plan finished are reused, and saved again if this run fails.
    Raises NoSpaceError if the disk is too small, before or while writing, FitError if factors are not finite or results
    exceed their dtype, LossError if quantization erases the update, and the errors of `check_run`.
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
        files = _Files(job, inputs, resumable)
        for number, name in enumerate(files.scheduler.run(), files.reused_edits + 1):
            yield TensorMerged(name, number, plan.edits)
        merged = finish_job(job, files.done, inputs, files.adapters)
        if plan.base.is_directory:
            clear_records(building)
    yield replace(merged, notes=(*merged.notes, *files.scheduler.place.notes))


def run_file(plan: MergePlan, file: FilePlan, where: Path, options: RunOptions | None = None) -> FileDone:
    """Make one output file of a plan, with its sidecar, and write nothing else.

    Args:
        plan: the plan.
        file: one of its files.
        where: the folder for the file; for a base of a single file, the output file itself.
        options: options of the run, the same for all files of a plan.

    Returns:
        The record of the file, for `finish`.

    Raises:
        AdapterkitError: See `run`.
    """
    options, inputs, made = options or RunOptions(), Inputs(plan, file), list[FileDone]()
    check_device(plan, options)
    job = Job(plan, where, options)
    if job.folder != where:
        job.folder.mkdir(exist_ok=True)
    scheduler = Scheduler(job, [file], inputs, (), made.append)
    for _ in scheduler.run():
        pass
    inputs.check()
    [done] = made
    return replace(done, notes=(*done.notes, *scheduler.place.notes))


class _Files:
    """The finished files of a run, each recorded for `resume` once the adapters are hashed too."""

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
        reused = {done.name for done in self.done}
        self.reused_edits = sum(len(file.edits) for file in plan.files if file.name in reused)
        remaining = [file for file in plan.files if file.name not in reused]
        also = [] if self._hashed else list(dict.fromkeys(files))
        self.scheduler = Scheduler(job, remaining, inputs, also, self._when_done)

    @property
    def adapters(self) -> dict[Path, str]:
        """The SHA-256 of the adapters' files."""
        return self._hashed or {file: hash_.sha256.hexdigest() for file, hash_ in self.scheduler.also.items()}

    def _by_adapter(self, hashed: dict[Path, str]) -> list[dict[str, str]]:
        return [{file.name: hashed[file] for file in one.adapter.files} for one in self._job.plan.adapters]

    def _when_done(self, file: FileDone) -> None:
        with self._lock:
            self.done.append(file)
            if self._resumable and all(not hash_.left for hash_ in self.scheduler.also.values()):
                for done in self.done[self._recorded :]:
                    record_done(self._job.where, done, self._by_adapter(self.adapters))
                self._recorded = len(self.done)
