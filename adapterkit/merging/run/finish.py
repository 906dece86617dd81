"""The end of a run: every file is there and is the plan's; what belongs beside the weights is written, last of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.display import Displayed
from adapterkit.errors import FitError
from adapterkit.files.hub_cache import check_blob_hash
from adapterkit.files.opening import sha256_of
from adapterkit.merging.companions import finish_merge
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.types import Hashes, MergePlan
from adapterkit.merging.receipts.done import FileDone, fingerprint_of
from adapterkit.merging.run.budget import check_loss, warnings_of
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run.making import Job
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention


@dataclass(frozen=True, slots=True, repr=False)
class Merged(Displayed):
    """The last event: what was made. `retention` by tensor covers its first rows, or all of them with a report."""

    out: Path
    bytes_written: int
    tensors: int
    hashes: Hashes
    retention: dict[str, Retention]
    place: str  # where it was computed in the end
    notes: tuple[str, ...]  # what was done otherwise than asked for
    warnings: tuple[str, ...] = ()  # where the result is hardly what was meant: little or nothing is left of the update

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
    """Finish what `run_file` made of a plan in `where`: write index, config, receipt and card.

    Args:
        plan: the plan that every file was made of.
        done: what `run_file` returned for each of its files, in any order.
        where: where the files were made.
        options: those that the files were made with.

    Returns:
        The output and its hashes, as the last event of `run`.

    Raises:
        FitError: where a file is missing, or was made of another plan or with other options.
        ChangedError: where an input has changed since the plan was made.
        LossError: where quantizing leaves little of the update.
    """
    job, made = Job(plan, where, options or RunOptions()), list(done)
    sources = {file.name: file.source for file in plan.files}
    inputs = Inputs(plan, linked=[sources[one.name] for one in made if one.linked and one.name in sources])
    adapters = {file: sha256_of(file) for one in plan.adapters for file in one.adapter.files}
    return finish_job(job, made, inputs, adapters)


def finish_job(job: Job, done: Iterable[FileDone], inputs: Inputs, adapters: Mapping[Path, str]) -> Merged:
    """The same, where the `inputs` were watched from the beginning and the adapters' files are hashed already."""
    plan, made = job.plan, _all_of(job, done)
    retention = dict(sorted(item for one in made for item in one.retention.items()))
    unchanged = sorted(name for one in made for name in one.unchanged)
    if not job.options.accept_loss:
        check_loss(plan, retention)
    hashes = _hashes(plan, made, adapters)
    warnings = warnings_of(plan, retention, unchanged)
    told = replace(plan, notes=plan.notes + warnings)
    if plan.write_companions is not None:
        plan.write_companions(told, job.folder, hashes)
    else:
        finish_merge(told, job.folder, hashes, job.receipt)
    inputs.check()
    notes = tuple(note for one in made for note in one.notes)
    places = ", ".join(dict.fromkeys(one.device for one in made if one.device)) or "the CPU"
    return Merged(plan.out, plan.bytes_to_write, plan.edits, hashes, retention, places, notes, warnings)


def _all_of(job: Job, done: Iterable[FileDone]) -> list[FileDone]:
    """What was made of each file of the plan, in its order. Raises FitError unless that is all, and nothing else."""
    made = {one.name: one for one in done}
    for file in job.plan.files:
        path = job.path_of(file)
        if file.name not in made or not path.is_file() or path.stat().st_size != file.size:
            raise FitError(f"{path}: is not made yet: run_file makes it, and returns what finish needs")
        if made[file.name].fingerprint != fingerprint_of(job.plan, file, job.options):
            raise FitError(f"{path}: was made of another plan, or with other options: make it again by run_file")
    found = [made.pop(file.name) for file in job.plan.files]
    if made:
        raise FitError(f"{next(iter(made))}: is no file of this plan, which makes {', '.join(f.name for f in found)}")
    return found


def _hashes(plan: MergePlan, made: list[FileDone], adapters: Mapping[Path, str]) -> Hashes:
    """The hashes of it all, where files of the Hub cache have those that name them."""
    sources = {file.name: file.source for file in plan.files}
    for file, sha256 in [*((sources[one.name], one.before) for one in made), *adapters.items()]:
        check_blob_hash(file, sha256)
    base = {sources[one.name].name: one.before for one in made}
    given = tuple({file.name: adapters[file] for file in one.adapter.files} for one in plan.adapters)
    return Hashes(base, given, {one.name: one.after for one in made if one.after is not None})
