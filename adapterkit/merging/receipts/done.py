"""The record of one output file that is made: what was read, what was written, what is left of the update."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adapterkit import __version__
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import FilePlan, MergePlan

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention


@dataclass(frozen=True, slots=True)
class FileDone:
    """One file of a plan is on the disk, with its sidecar. Plain data that pickles; JSON as `to_json` writes it.

    Args:
        name: of the file, in the base and in the output.
        made_by: the `fingerprint` of what the plan has for it.
        size: in bytes.
        before: SHA-256 of the base's file.
        after: SHA-256 of the output, where a receipt needs it, or a restored base is checked by it.
        sidecar: bytes of what restores the base's file; None: nothing does.
        linked: whether it shares its bytes with the base's, whose status has changed by that.
        device: where it was computed in the end; None: nothing had to be.
        retention: what rounding kept of the update, by tensor: of its first rows, or of all of them with a report.
        unchanged: tensors that adapters change, and that came out as the base has them.
        notes: what was done otherwise than asked for.
    """

    name: str
    made_by: str
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
        """The record as JSON has it."""
        kept = {name: [one.dot, one.delta, one.residual] for name, one in self.retention.items()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"retention": kept}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> FileDone:
        """The record that `to_json` wrote. Raises TypeError, KeyError or AttributeError for anything else."""
        from adapterkit.algebra.updates import Retention

        kept = {name: Retention(*sums) for name, sums in facts["retention"].items()}
        lists = {name: tuple(facts[name]) for name in ("unchanged", "notes")}
        return cls(**(facts | lists | {"retention": kept}))


def fingerprint(plan: MergePlan, file: FilePlan, options: RunOptions) -> str:
    """The SHA-256 of everything that decides what a file becomes, but for the contents of base and adapters."""
    recorded = plan.undoable and options.receipt, plan.restores, options.report
    copies = [(copy.start, copy.stop, copy.at) for copy in file.copies]
    in_memory = {number for number, one in enumerate(plan.given) if not one.adapter.files}
    facts = [
        __version__, recorded, hashlib.sha256(file.header).hexdigest(), file.name, file.size, copies,
        [_edit(edit, in_memory) for edit in file.edits], [(one.at, one.tensor.nbytes) for one in file.kept],
    ]  # fmt: skip
    return sha256_of_json(facts)


def sha256_of_json(facts: object) -> str:
    """The SHA-256 of facts in JSON, where dataclasses are their fields, paths their last parts, tensors their bytes."""
    text = json.dumps(facts, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _edit(edit: MergeEdit | RestoreEdit, in_memory: Iterable[int]) -> list[Any]:
    """What the header and the base's bytes do not tell; a delta by its module, unless that is in no file."""
    deltas = []
    for delta in edit.deltas:
        target, weights = delta.target, delta.weights
        place = (target.rows, target.delta_rows, target.expert, target.transposed)
        factors = list(weights.tensors()) if delta.adapter in in_memory else None
        deltas.append((delta.adapter, delta.module, weights.scaling, delta.weight, place, factors))
    source = None if edit.source is None else (edit.source.name, edit.source.start, edit.source.dtype)
    if isinstance(edit, RestoreEdit):
        return [edit.name, source, deltas, edit.recorded, edit.quantized]
    rest = [one for one in (edit.replaced, edit.added, edit.packing, edit.checked_against) if one]
    return [edit.name, source, deltas, *rest]


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return value.name
    if callable(getattr(value, "untyped_storage", None)):  # a tensor
        return [str(value.dtype), list(value.shape), hashlib.sha256(bytes(value.untyped_storage())).hexdigest()]
    if hasattr(value, "__dataclass_fields__"):
        return [type(value).__name__, *(getattr(value, field.name) for field in fields(value))]
    return [type(value).__qualname__, *(getattr(value, name, None) for name in ("__qualname__", "func", "args"))]
