"""The receipt of a merge: base, adapters and outputs by hash, and the data that undoes it.

`adapterkit_receipt.json` lists files, adapters, scalings and targets. The folder beside it holds a sidecar for each
shard, and in `before/` the base's files that the merge replaced, an earlier receipt included. A single file has all of
this in `NAME.receipt/`. Names are stored unescaped, whatever characters they contain; printing escapes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from sys import float_info
from typing import Any

from adapterkit import __version__
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.target import Target
from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.files.jsonfile import parse_json, read_json
from adapterkit.files.opening import sha256_of
from adapterkit.files.safetensors import FLOAT_DTYPES
from adapterkit.files.staging import MAX_NAME_BYTES, RECEIPT, RECEIPT_FOLDER, workspace_receipts
from adapterkit.files.workspace import receipt_of
from adapterkit.hub.names import public_name
from adapterkit.merging.plan.edits import Edit, MergeEdit, ModuleUpdate
from adapterkit.merging.plan.types import Hashes, MergePlan

FORMAT = 2
# For each dtype, those that it represents exactly.
HOLDS = {"BF16": ("BF16",), "F16": ("F16",), "F32": ("F32", "BF16", "F16"), "F64": FLOAT_DTYPES}


@dataclass(frozen=True, slots=True)
class ModuleShare:
    """The update of one module in a merged tensor."""

    adapter: int
    module: str
    scaling: float
    weight: float
    target: Target


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its size before, its hashes before and after, and the changed tensors in sidecar order."""

    name: str
    size: int
    before: str
    after: str
    tensors: tuple[tuple[str, tuple[ModuleShare, ...]], ...]


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One adapter of the merge, with its weight and the SHA-256 of its files."""

    name: str
    weight: float
    base_model: str | None
    files: dict[str, str]
    module_weights: tuple[tuple[str, float], ...] = ()  # by pattern, as in `WeightedAdapter`

    def weighting(self, adapter: Adapter) -> WeightedAdapter:
        """`adapter` with the weights of the merge."""
        return WeightedAdapter(adapter, self.weight, self.name, module_weights=self.module_weights)


@dataclass(frozen=True)
class Companions:
    """The SHA-256 of the base's files beside its weights, by path in its folder."""

    copied: dict[str, str]
    replaced: dict[str, str]  # saved in `before/`
    left_out: tuple[str, ...] = ()  # not copied and not hashed
    added: tuple[str, ...] = ()  # files of the output that an adapter brought


@dataclass(frozen=True)
class Receipt:
    """A receipt read from `folder`."""

    folder: Path
    base: str
    adapters: tuple[MergedAdapter, ...]
    shards: tuple[Shard, ...]
    companions: Companions | None  # None in format 1, which has no hashes of them
    irreversible: str | None  # the reason, if the merge cannot be undone
    as_trained: str | None = None  # how the base was quantized before, if it was

    def sidecar(self, shard: Shard) -> Path:
        return self.folder / sidecar_name(shard.name)


def folder_of(out: Path, directory: bool) -> Path:
    """The folder of an output's receipt."""
    return out if directory else receipt_of(out)


def sidecar_name(shard: str) -> str:
    """The path of a shard's sidecar in the receipt's folder."""
    return f"{RECEIPT_FOLDER}/{with_ending(shard, '.residuals')}"


def with_ending(shard: str, ending: str) -> str:
    """The shard's name plus `ending`; a hash replaces a name that would become too long."""
    raw = os.fsencode(shard)
    fits = len(raw) + len(ending) <= MAX_NAME_BYTES
    return (shard if fits else hashlib.sha256(raw).hexdigest()) + ending


def undoable(edit: Edit) -> bool:
    """Whether an edit changes a tensor of the base's file, which `unmerge` then restores."""
    return edit.source is not None and edit.source.name == edit.name


def subtracted(edit: Edit) -> tuple[ModuleUpdate, ...]:
    """The updates that `unmerge` subtracts; none if values are replaced too, which leaves the whole difference."""
    return () if isinstance(edit, MergeEdit) and edit.replaced else edit.deltas


def irreversible(plan: MergePlan) -> str | None:
    """The reason if the output of `plan` cannot be undone, else None."""
    for edit in plan.merges:
        if edit.packing is not None:
            return f"the output is quantized to {edit.packing.scheme}"
        if edit.source is not None and edit.source.dtype not in HOLDS[edit.dtype]:
            return f"{edit.source.dtype} weights were converted to {edit.dtype}"
    return None


# --- written ---------------------------------------------------------------------------------------------------------


def as_json(plan: MergePlan, hashes: Hashes, companions: Companions) -> dict[str, Any]:
    """The receipt of a merge as JSON facts."""
    base = f"dequantize(quantize(W, {'; '.join(plan.trained_as)}))" if plan.trained_as else "W"
    return {
        "adapterkit_receipt": FORMAT,
        "adapterkit": __version__,
        "method": f"W' = {base} + sum of weight * scaling * B @ A, rounded once to nearest even",
        "base": plan.base.name,
        "as_trained": "; ".join(plan.trained_as) or None,
        "adapters": [
            {
                "name": one.label,
                **one.weight_facts(),
                "base_model": public_name(one.adapter.base_model),
                "files": files,
            }
            for one, files in zip(plan.adapters, hashes.adapters, strict=True)
        ],
        "irreversible": irreversible(plan),
        "copied": companions.copied,
        "replaced": companions.replaced,
        "left_out": list(companions.left_out),
        "added": list(companions.added),
        "shards": [
            {
                "name": file.name,
                "size": header.size,
                "sha256_before": hashes.base[header.file.name],
                "sha256_after": hashes.outputs[file.name],
                "tensors": [
                    {"name": edit.name, "parts": [_part(delta) for delta in subtracted(edit)]}
                    for edit in file.edits
                    if undoable(edit)
                ],
            }
            for header, file in zip(plan.base.shards, plan.files, strict=True)
        ],
    }  # fmt: skip


def encode(facts: Mapping[str, Any]) -> bytes:
    """Encode a receipt in ASCII, so that file names that are not UTF-8 survive."""
    return json.dumps(facts).encode() + b"\n"


def check_receipt(plan: MergePlan) -> None:
    """Raise FormatError if the receipt of `plan` could not be read back."""
    unknown = "0" * 64
    adapters = tuple({file.name: unknown for file in one.adapter.files} for one in plan.adapters)
    base = {shard.file.name: unknown for shard in plan.base.shards}
    hashes = Hashes(base, adapters, {file.name: unknown for file in plan.files})
    folder = folder_of(plan.out, plan.base.is_directory)
    stream = BytesIO(encode(as_json(plan, hashes, Companions({}, {}))))
    _parse(folder, parse_json(folder / RECEIPT, stream, large=True, allow_surrogates=True))


def _part(delta: ModuleUpdate) -> dict[str, Any]:
    """One module's update as JSON facts, without defaults."""
    target = delta.target
    position = {
        "rows": target.rows, "of": target.delta_rows, "expert": target.expert, "transposed": target.transposed or None,
    }  # fmt: skip
    return {
        "adapter": delta.adapter, "module": delta.module, "scaling": delta.weights.scaling, "weight": delta.weight,
        **{name: value for name, value in position.items() if value is not None},
    }  # fmt: skip


# --- read ------------------------------------------------------------------------------------------------------------


def find_receipt(out: Path) -> Path | None:
    """The folder with the receipt of a merged checkpoint, or None.

    After an interrupted overwrite, the receipt whose hash matches the file.
    """
    folder = folder_of(out, out.is_dir())
    folders = [folder] if os.path.isfile(folder / RECEIPT) else []  # Path.is_file raises for names that are too long
    if not out.is_dir() and (aside := workspace_receipts(out)):
        found = sha256_of(out)
        matching = [one for one in [*folders, *aside] if read_receipt(one).shards[0].after == found]
        folders = matching or folders
    return folders[0] if folders else None


def read_receipt(folder: Path) -> Receipt:
    """Read the receipt in `folder`. Raises FormatError for an invalid field, UnsafeFileError for an unsafe path."""
    return _parse(folder, read_json(folder / RECEIPT, large=True, allow_surrogates=True))


def _parse(folder: Path, facts: dict[str, Any]) -> Receipt:
    read, version = _Reader(folder / RECEIPT), facts.get("adapterkit_receipt")
    if type(version) is not int or not 1 <= version <= FORMAT:
        found = str(version)[:20]
        raise FormatError(f"{read.file}: receipt format {found}, expected 1 to {FORMAT}; upgrade adapterkit")
    adapters = tuple(read.adapter(one) for one in read.objects(facts, "adapters"))
    shards = tuple(read.shard(one, len(adapters)) for one in read.objects(facts, "shards"))
    if not shards or len({shard.name for shard in shards}) < len(shards):
        raise read.wrong("shards", "one or more with unique names", facts.get("shards"))
    companions = None if version == 1 else read.companions(facts)
    reasons = read.optional(facts, "irreversible"), read.optional(facts, "as_trained")
    return Receipt(folder, read.text(facts, "base"), adapters, shards, companions, *reasons)


class _Reader:
    """Reads fields of JSON objects. Raises FormatError naming an invalid field."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def wrong(self, field: str, expected: str, found: Any) -> FormatError:
        return FormatError(f"{self.file}: {field}: expected {expected}, found {str(found)[:60]!r}")

    def text(self, of: dict[str, Any], field: str) -> str:
        value = of.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, "a string", value)
        try:
            os.fsencode(value)
        except UnicodeEncodeError as error:
            raise self.wrong(field, "a valid file name", ascii(value)) from error
        return value

    def optional(self, of: dict[str, Any], field: str) -> str | None:
        return None if of.get(field) is None else self.text(of, field)

    def number(self, of: dict[str, Any], field: str) -> float:
        value = of.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= float_info.max:
            raise self.wrong(field, "a finite number", value)
        return float(value)

    def index(self, of: dict[str, Any], field: str, below: int = 2**63) -> int:
        value = of.get(field)
        if type(value) is not int or not 0 <= value < below:
            raise self.wrong(field, f"an integer from 0 to {below - 1}", value)
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
            raise self.wrong(field, "SHA-256 by file name", value)
        return {name: self.hash(value, name) for name in value}

    def companions(self, of: dict[str, Any]) -> Companions:
        left_out, added = self.names(of, "left_out"), self.names(of, "added") if "added" in of else ()
        return Companions(self.hashes(of, "copied"), self.hashes(of, "replaced"), left_out, added)

    def names(self, of: dict[str, Any], field: str) -> tuple[str, ...]:
        value = of.get(field)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(field, "a list of file names", value)
        return tuple(value)

    def objects(self, of: dict[str, Any], field: str) -> list[dict[str, Any]]:
        value = of.get(field)
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.wrong(field, "a list of objects", value)
        return value

    def adapter(self, of: dict[str, Any]) -> MergedAdapter:
        by_module = self.objects(of, "module_weights") if "module_weights" in of else []
        return MergedAdapter(
            self.text(of, "name"), self.number(of, "weight"), self.optional(of, "base_model"), self.hashes(of, "files"),
            tuple((self.text(one, "pattern"), self.number(one, "weight")) for one in by_module),
        )  # fmt: skip

    def shard(self, of: dict[str, Any], adapters: int) -> Shard:
        name = self.text(of, "name")
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise UnsafeFileError(f"{self.file}: shard name {name[:80]!r}: expected a plain file name")
        tensors = tuple(
            (self.text(one, "name"), tuple(self.part(part, adapters) for part in self.objects(one, "parts")))
            for one in self.objects(of, "tensors")
        )
        size = self.index(of, "size")
        return Shard(name, size, self.hash(of, "sha256_before"), self.hash(of, "sha256_after"), tensors)

    def part(self, of: dict[str, Any], adapters: int) -> ModuleShare:
        if not isinstance(transposed := of.get("transposed", False), bool):
            raise self.wrong("transposed", "true or false", transposed)
        expert = None if of.get("expert") is None else self.index(of, "expert")
        target = Target("", self.span(of, "rows"), self.span(of, "of"), expert, transposed)
        return ModuleShare(
            self.index(of, "adapter", adapters), self.text(of, "module"), self.number(of, "scaling"),
            self.number(of, "weight"), target,
        )  # fmt: skip
