"""The record of a finished output file: hashes, sizes, and the retention of the update."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adapterkit import __version__
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.run_options import RunOptions

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention


@dataclass(frozen=True, slots=True)
class FileDone:
    """A finished output file, flushed to disk with its sidecar. Plain data that pickles.

    Args:
        name: file name, the same in base and output.
        fingerprint: `fingerprint_of` the plan, file and options.
        size: size of the file in bytes.
        before: SHA-256 of the base's file.
        after: SHA-256 of the output, if a receipt or the check of a restored base needs it.
        sidecar: size of the sidecar in bytes; None without one.
        linked: whether the file shares the base's bytes; a hard link changes the base's status.
        device: the last device used; None if nothing was computed.
        retention: retention by tensor, of its first rows, or of all rows with `report`.
        unchanged: merged tensors that equal the base's.
        notes: deviations from the requested options.
    """

    name: str
    fingerprint: str
    size: int
    before: str
    after: str | None
    sidecar: int | None
    linked: bool
    device: str | None
    retention: dict[str, Retention]
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON facts."""
        sums = {name: [one.dot, one.delta, one.residual] for name, one in self.retention.items()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"retention": sums}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> FileDone:
        """Read a record written by `to_json`. Raises TypeError, KeyError or AttributeError for anything else."""
        from adapterkit.algebra.updates import Retention

        retention = {name: Retention(*sums) for name, sums in facts["retention"].items()}
        lists = {name: tuple(facts[name]) for name in ("unchanged", "notes")}
        return cls(**(facts | lists | {"retention": retention}))


def fingerprint_of(plan: MergePlan, file: FilePlan, options: RunOptions) -> str:
    """The SHA-256 of everything that determines an output file, except the bytes of base and adapter files."""
    recorded = plan.undoable and options.receipt, plan.restores, options.report
    copies = [(copy.start, copy.stop, copy.at) for copy in file.copies]
    in_memory = {number for number, one in enumerate(plan.adapters) if not one.adapter.files}
    facts = [
        __version__, recorded, hashlib.sha256(file.header).hexdigest(), file.name, file.size, copies,
        [_edit(edit, in_memory) for edit in file.edits], [(one.at, one.tensor.nbytes) for one in file.from_sidecar],
    ]  # fmt: skip
    return sha256_of_json(facts)


def sha256_of_json(facts: object) -> str:
    """The SHA-256 of facts as JSON: dataclasses by their fields, paths by their names, tensors by their bytes."""
    text = json.dumps(facts, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _edit(edit: MergeEdit | RestoreEdit, in_memory: Iterable[int]) -> list[Any]:
    """The facts of an edit that are not in the header; factors only of an adapter that has no file to hash."""
    deltas = []
    for delta in edit.deltas:
        target, weights = delta.target, delta.weights
        position = (target.rows, target.delta_rows, target.expert, target.transposed)
        factors = list(weights.tensors()) if delta.adapter in in_memory else None
        deltas.append((delta.adapter, delta.module, weights.scaling, delta.weight, position, factors))
    source = None if edit.source is None else (edit.source.name, edit.source.start, edit.source.dtype)
    if isinstance(edit, RestoreEdit):
        return [edit.name, source, deltas, edit.recorded, edit.quantized]
    others = [part for part in (edit.replaced, edit.added, edit.packing, edit.checked_against, edit.as_trained) if part]
    return [edit.name, source, deltas, *others]


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return value.name
    if callable(getattr(value, "untyped_storage", None)):  # a tensor
        return [str(value.dtype), list(value.shape), hashlib.sha256(bytes(value.untyped_storage())).hexdigest()]
    if hasattr(value, "__dataclass_fields__"):
        return [type(value).__name__, *(getattr(value, field.name) for field in fields(value))]
    return [type(value).__qualname__, *(getattr(value, name, None) for name in ("__qualname__", "func", "args"))]
