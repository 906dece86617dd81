"""Finish a run: check that every file is there and belongs to the plan, then write the files beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import FitError
from adapterkit.files.hub_cache import check_blob_hash
from adapterkit.files.opening import sha256_of
from adapterkit.merging.companions import finish_merge
from adapterkit.merging.plan.types import Hashes, MergePlan
from adapterkit.merging.receipts.finished_file import FileDone, fingerprint_of
from adapterkit.merging.run.budget import check_loss, warnings_of
from adapterkit.merging.run.builder import Job
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run_options import RunOptions
from adapterkit.reprs import Displayed
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention


@dataclass(frozen=True, slots=True, repr=False)
class Merged(Displayed):
    """The last event: the result. `retention` is measured on each tensor's first rows, or on all with `report`."""

    out: Path
    bytes_written: int
    tensors: int
    hashes: Hashes
    retention: dict[str, Retention]
    place: str  # the last device used
    notes: tuple[str, ...]  # deviations from the requested options
    warnings: tuple[str, ...] = ()  # about updates that are zero or lost to rounding

    def brief(self) -> str:
        return f"{self.out}, {counted(self.tensors, 'tensor')} computed, {size(self.bytes_written)}"

    def lines(self) -> list[str]:
        wrote = f"wrote     {self.out}: {size(self.bytes_written)}"
        return [
            f"computed  {counted(self.tensors, 'tensor')} on {self.place}",
            wrote,
            *(f"note      {note}" for note in self.notes),
            *(f"warning   {warning}" for warning in self.warnings),
        ]


def finish(plan: MergePlan, done: Iterable[FileDone], where: Path, options: RunOptions | None = None) -> Merged:
    """Finish the files that `run_file` made in `where`: write index, config, receipt and card.

    Args:
        plan: the plan of every file.
        done: the results of `run_file`, in any order.
        where: the folder or file that they were made in.
        options: the options that they were made with.

    Returns:
        The output and its hashes, as the last event of `run`.

    Raises:
        FitError: if a file is missing, or was made from another plan or with other options.
        ChangedError: if an input has changed since the plan was made.
        LossError: if quantization erases more than half of the update.
    """
    job, made = Job(plan, where, options or RunOptions()), list(done)
    sources = {file.name: file.source for file in plan.files}
    inputs = Inputs(plan, linked=[sources[one.name] for one in made if one.linked and one.name in sources])
    adapters = {file: sha256_of(file) for one in plan.adapters for file in one.adapter.files}
    return finish_job(job, made, inputs, adapters)


def finish_job(job: Job, done: Iterable[FileDone], inputs: Inputs, adapters: Mapping[Path, str]) -> Merged:
    """Finish a job, given its checked `inputs` and the SHA-256 of the adapters' files."""
    plan, made = job.plan, _all_of(job, done)
    retention = dict(sorted(item for one in made for item in one.retention.items()))
    unchanged = sorted(name for one in made for name in one.unchanged)
    if not job.options.accept_loss:
        check_loss(plan, retention)
    hashes = _hashes(plan, made, adapters)
    warnings = warnings_of(plan, retention, unchanged)
    with_warnings = replace(plan, notes=plan.notes + warnings)
    if plan.write_companions is not None:
        plan.write_companions(with_warnings, job.folder, hashes)
    else:
        finish_merge(with_warnings, job.folder, hashes, job.receipt)
    inputs.check()
    notes = tuple(note for one in made for note in one.notes)
    places = ", ".join(dict.fromkeys(one.device for one in made if one.device)) or "the CPU"
    return Merged(plan.out, plan.bytes_to_write, plan.edits, hashes, retention, places, notes, warnings)


def _all_of(job: Job, done: Iterable[FileDone]) -> list[FileDone]:
    """The records of the plan's files, in its order. Raises FitError if one is missing, foreign or superfluous."""
    made = {one.name: one for one in done}
    for file in job.plan.files:
        path = job.path_of(file)
        if file.name not in made or not path.is_file() or path.stat().st_size != file.size:
            raise FitError(f"{path}: missing or incomplete; make it with run_file, and give its result to finish")
        if made[file.name].fingerprint != fingerprint_of(job.plan, file, job.options):
            raise FitError(f"{path}: made from another plan or with other options; make it again with run_file")
    found = [made.pop(file.name) for file in job.plan.files]
    if made:
        raise FitError(f"{next(iter(made))}: not a file of this plan, which has {', '.join(f.name for f in found)}")
    return found


def _hashes(plan: MergePlan, made: list[FileDone], adapters: Mapping[Path, str]) -> Hashes:
    """All hashes. Raises FormatError for a corrupt file in the Hub cache."""
    sources = {file.name: file.source for file in plan.files}
    for file, sha256 in [*((sources[one.name], one.before) for one in made), *adapters.items()]:
        check_blob_hash(file, sha256)
    base = {sources[one.name].name: one.before for one in made}
    given = tuple({file.name: adapters[file] for file in one.adapter.files} for one in plan.adapters)
    return Hashes(base, given, {one.name: one.after for one in made if one.after is not None})
