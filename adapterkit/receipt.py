"""The receipt of a merge: what was merged into what, by hash, and where that is kept which undoes it.

`adapterkit_receipt.json` names files, adapters, scalings and targets; in the folder beside it lie a sidecar for each
shard, and in `before/` those files of the base that the merge replaced, an earlier receipt among them. A single file
has all this in `NAME.receipt/`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.plan import Delta, Edit, Hashes, MergePlan
from adapterkit.staging import RECEIPT
from adapterkit.targets import Target
from adapterkit.tensorfile import FLOAT_DTYPES, read_json
from adapterkit.version import __version__

FOLDER = "adapterkit_receipt"
BEFORE = f"{FOLDER}/before"
FORMAT = 1
# What a dtype can hold of others, bit for bit.
HOLDS = {"BF16": ("BF16",), "F16": ("F16",), "F32": ("F32", "BF16", "F16"), "F64": FLOAT_DTYPES}


@dataclass(frozen=True, slots=True)
class Part:
    """One module's share in a merged tensor."""

    adapter: int
    module: str
    scaling: float
    weight: float
    target: Target


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its sizes and hashes before and after, and the tensors that were changed, in the sidecar's order."""

    name: str
    size: int
    before: str
    after: str
    tensors: tuple[tuple[str, tuple[Part, ...]], ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """One adapter, as the merge was given it."""

    name: str
    weight: float
    base_model: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Receipt:
    """A receipt as it was read, and the folder that it lies in."""

    folder: Path
    base: str
    adapters: tuple[Merged, ...]
    shards: tuple[Shard, ...]
    irreversible: str | None  # why it cannot be undone

    def sidecar(self, shard: Shard) -> Path:
        return self.folder / sidecar_name(shard.name)


def folder_of(out: Path, directory: bool) -> Path:
    """Where the receipt of an output lies."""
    return out if directory else out.with_name(f"{out.name}.receipt")


def sidecar_name(shard: str) -> str:
    return f"{FOLDER}/{shard}.residuals"


def undoable(edit: Edit) -> bool:
    """Whether a tensor of the output has one in the base's file that is to be restored."""
    return edit.source is not None and edit.source.name == edit.name


def irreversible(plan: MergePlan) -> str | None:
    """Why what `plan` makes cannot be turned back into the base, if so."""
    for edit in (edit for file in plan.files for edit in file.edits):
        if edit.packing is not None:
            return f"the output is quantized to {edit.packing.scheme}"
        if edit.source is not None and edit.source.dtype not in HOLDS[edit.dtype]:
            return f"{edit.source.dtype} weights were converted to {edit.dtype}"
    return None


# --- written ---------------------------------------------------------------------------------------------------------


def as_json(plan: MergePlan, hashes: Hashes, bases: Sequence[str | None]) -> dict[str, Any]:
    """The receipt of a merge; `bases` are the public names of what its adapters were trained on."""
    return {
        "adapterkit_receipt": FORMAT,
        "adapterkit": __version__,
        "method": "W' = W + sum of weight * scaling * B @ A, rounded once to nearest even",
        "base": plan.base.name,
        "adapters": [
            {
                "name": one.label,
                "weight": one.weight,
                "base_model": trained_on,
                "files": files,
            }
            for one, trained_on, files in zip(plan.given, bases, hashes.adapters, strict=True)
        ],
        "irreversible": irreversible(plan),
        "shards": [
            {
                "name": file.name,
                "size": header.size,
                "sha256_before": hashes.base[header.file.name],
                "sha256_after": hashes.outputs[file.name],
                "tensors": [
                    {"name": edit.name, "parts": [_part(delta) for delta in edit.deltas]}
                    for edit in file.edits
                    if undoable(edit)
                ],
            }
            for header, file in zip(plan.base.shards, plan.files, strict=True)
        ],
    }  # fmt: skip


def _part(delta: Delta) -> dict[str, Any]:
    """What is at its default is left out."""
    target = delta.target
    place = {"rows": target.rows, "of": target.of, "expert": target.expert, "transposed": target.transposed or None}
    return {
        "adapter": delta.adapter, "module": delta.module, "scaling": delta.weights.scaling, "weight": delta.weight,
        **{name: value for name, value in place.items() if value is not None},
    }  # fmt: skip


# --- read ------------------------------------------------------------------------------------------------------------


def find_receipt(out: Path) -> Path | None:
    """The folder with the receipt of a merged checkpoint, if there is one."""
    folder = folder_of(out, out.is_dir())
    return folder if (folder / RECEIPT).is_file() else None


def read_receipt(folder: Path) -> Receipt:
    """The receipt in `folder`, every field checked. Raises FormatError, UnsafeFileError for other places."""
    file = folder / RECEIPT
    facts = read_json(file, large=True)
    if facts.get("adapterkit_receipt") != FORMAT:
        found = str(facts.get("adapterkit_receipt"))[:20]
        raise FormatError(f"{file}: format {found}, this version reads {FORMAT}: use a newer adapterkit")
    read = _Reader(file)
    adapters = tuple(read.adapter(one) for one in read.objects(facts, "adapters"))
    shards = tuple(read.shard(one, len(adapters)) for one in read.objects(facts, "shards"))
    if not shards or len({shard.name for shard in shards}) < len(shards):
        raise read.wrong("shards", "one or several, each named once", facts.get("shards"))
    return Receipt(folder, read.text(facts, "base"), adapters, shards, read.optional(facts, "irreversible"))


class _Reader:
    """Fields of a JSON object, or a FormatError that says which is wrong."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def wrong(self, field: str, expected: str, found: Any) -> FormatError:
        return FormatError(f"{self.file}: {field}: expected {expected}, found {str(found)[:60]!r}")

    def text(self, of: dict[str, Any], field: str) -> str:
        value = of.get(field)
        if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
            raise self.wrong(field, "a name", value)
        return value

    def optional(self, of: dict[str, Any], field: str) -> str | None:
        return None if of.get(field) is None else self.text(of, field)

    def number(self, of: dict[str, Any], field: str) -> float:
        value = of.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.wrong(field, "a finite number", value)
        return float(value)

    def index(self, of: dict[str, Any], field: str, below: int = 2**63) -> int:
        value = of.get(field)
        if type(value) is not int or not 0 <= value < below:
            raise self.wrong(field, f"a whole number below {below}", value)
        return value

    def span(self, of: dict[str, Any], field: str) -> tuple[int, int] | None:
        value = of.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in value):
            raise self.wrong(field, "first and last row", value)
        return value[0], value[1]

    def hash(self, of: dict[str, Any], field: str) -> str:
        value = self.text(of, field)
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise self.wrong(field, "a SHA-256", value)
        return value

    def hashes(self, of: dict[str, Any], field: str) -> dict[str, str]:
        value = of.get(field)
        if not isinstance(value, dict):
            raise self.wrong(field, "file names and SHA-256", value)
        return {name: self.hash(value, name) for name in value}

    def objects(self, of: dict[str, Any], field: str) -> list[dict[str, Any]]:
        value = of.get(field)
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.wrong(field, "a list of objects", value)
        return value

    def adapter(self, of: dict[str, Any]) -> Merged:
        files = self.hashes(of, "files")
        return Merged(self.text(of, "name"), self.number(of, "weight"), self.optional(of, "base_model"), files)

    def shard(self, of: dict[str, Any], adapters: int) -> Shard:
        name = self.text(of, "name")
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise UnsafeFileError(f"{self.file}: names the shard {name[:80]!r}, which is not a plain file name")
        tensors = tuple(
            (self.text(one, "name"), tuple(self.part(part, adapters) for part in self.objects(one, "parts")))
            for one in self.objects(of, "tensors")
        )
        size = self.index(of, "size")
        return Shard(name, size, self.hash(of, "sha256_before"), self.hash(of, "sha256_after"), tensors)

    def part(self, of: dict[str, Any], adapters: int) -> Part:
        if not isinstance(transposed := of.get("transposed", False), bool):
            raise self.wrong("transposed", "true or false", transposed)
        expert = None if of.get("expert") is None else self.index(of, "expert")
        target = Target("", self.span(of, "rows"), self.span(of, "of"), expert, transposed)
        return Part(
            self.index(of, "adapter", adapters), self.text(of, "module"), self.number(of, "scaling"),
            self.number(of, "weight"), target,
        )  # fmt: skip
