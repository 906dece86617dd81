"""A merge, complete and checked before a byte is written: what to copy, what to edit, and where everything lands.

A plan is made from headers only and is plain data: it pickles, so any worker can run one file of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any, ClassVar

from adapterkit.adapter.weights import WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.display import Displayed
from adapterkit.files.safetensors import Header, TensorInfo
from adapterkit.files.staging import Destination
from adapterkit.files.stamps import Stamp
from adapterkit.files.workspace import receipt_of
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.text import counted, size


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes `start:stop` of the input file, written at `at`."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class BytesFromSidecar:
    """A tensor that lies in another file, written at `at`."""

    tensor: TensorInfo
    at: int


@dataclass(frozen=True, repr=False)
class FilePlan(Displayed):
    """One output file: its header, the spans copied from `source`, and the tensors that are computed."""

    name: str
    source: Path
    header: bytes
    size: int
    tensors: tuple[str, ...]
    copies: tuple[Copy, ...]
    edits: tuple[MergeEdit | RestoreEdit, ...]
    kept: tuple[BytesFromSidecar, ...] = ()

    def brief(self) -> str:
        return f"{self.name}, {size(self.size)}, {len(self.edits)} of {counted(len(self.tensors), 'tensor')} computed"

    @property
    def copies_all(self) -> bool:
        """Whether all tensors are copied, and to where they were; then but for the header it is the same file."""
        return not self.edits and not self.kept and all(copy.at == copy.start for copy in self.copies)


@dataclass(frozen=True)
class Hashes:
    """The SHA-256 of every file of a run: of the base and outputs by name, of adapters in their order."""

    base: dict[str, str]
    adapters: tuple[dict[str, str], ...]
    outputs: dict[str, str]  # empty where nothing needs them


# Called with a plan, the folder that its output or receipt is made in, and the hashes of it all.
WriteCompanions = Callable[["MergePlan", Path, Hashes], None]


@dataclass(frozen=True, repr=False)
class MergePlan(Displayed):
    """What a merge makes: every tensor of every file, and where the output goes. `RunOptions` say how it is made.

    Plain data that pickles: `run_file` makes one file of it, in any process.
    """

    unit: ClassVar[str] = "tensors"  # of its progress
    base: Checkpoint
    out: Path
    given: tuple[WeightedAdapter, ...]
    files: tuple[FilePlan, ...]
    config: dict[str, Any]  # as the output gets it
    weight_map: dict[str, str]
    ledger: dict[str, dict[str, tuple[str, ...]]]  # adapter label -> its module or tensor -> the base tensors
    skipped: tuple[str, ...] = ()  # only with allow_partial
    notes: tuple[str, ...] = ()
    dtype: str | None = None
    calibration: Path | None = None  # a text, for compensated rounding
    undoable: bool = False  # whether a receipt can be written, by which it is undone
    restores: bool = False  # makes a base again, whose hashes are known
    restores_receipt: bool = False  # and the receipt of an earlier merge beside it, where the output is a single file
    unchecked: tuple[str, ...] = ()  # files that are restored, though the receipt does not hash them
    overwrite: bool | None = None  # whether what is at `out` gives way, if it is ours; None where that cannot be asked
    also_read: tuple[Path, ...] = ()  # besides the base and the adapters
    quantized: Checkpoint | None = None  # what the base is checked to be the original of
    write_companions: WriteCompanions | None = None  # checks the hashes, writes the other files; None: as a merge does

    def destination(self, receipt: bool) -> Destination:
        """Where the output goes, with a `receipt` or without, and all that it is made from."""
        inputs = (*inputs_of(self.base, *self.given), *self.also_read)
        beside = not self.base.is_directory and (receipt or self.restores_receipt)
        return Destination(self.out, inputs, self.base.is_directory, self.overwrite, beside)

    def header_of(self, file: FilePlan) -> Header:
        """The header of the base's file that `file` is made from."""
        return next(header for header in self.base.shards if header.file == file.source)

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Of everything that was read to make the plan."""
        stamps: dict[Path, Stamp] = {}
        for one in (*(one.adapter for one in reversed(self.given)), self.quantized, self.base):
            stamps |= one.stamps if one is not None else {}
        return stamps

    @property
    def edits(self) -> int:
        return sum(len(file.edits) for file in self.files)

    @property
    def merges(self) -> Iterator[MergeEdit]:
        """The tensors that are merged or stored in another form, not restored."""
        return (edit for file in self.files for edit in file.edits if isinstance(edit, MergeEdit))

    @property
    def schemes(self) -> list[str]:
        """What tensors are quantized to."""
        return list(dict.fromkeys(edit.packing.scheme for edit in self.merges if edit.packing))

    @property
    def stored_as(self) -> str:
        """The dtype that was asked for, or that of dequantized weights; otherwise that of the base stays."""
        plain = (edit for edit in self.merges if not edit.packing)
        dequantized = dict.fromkeys(edit.dtype for edit in plain if isinstance(edit.source, QuantizedWeight))
        return self.dtype or ", ".join(dequantized) or "as the base"

    def facts(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "base": self.base.name,
            "adapters": [
                {
                    "name": one.label,
                    "weight": one.weight,
                    "modules": len(one.adapter.modules),
                    "format": one.adapter.format,
                }
                for one in self.given
            ],
            "output": str(self.out),
            "files": len(self.files),
            "tensors": len(self.weight_map) or sum(len(file.tensors) for file in self.files),
            "tensors_changed": self.edits,
            "dtype": self.stored_as,
            "quantized_to": self.schemes,
            "bytes_to_write": self.bytes_to_write,
            "bytes_free": disk_usage(next(p for p in self.out.absolute().parents if p.exists())).free,
            "landed": {label: {name: list(at) for name, at in landed.items()} for label, landed in self.ledger.items()},
            "skipped": list(self.skipped),
        }

    def brief(self) -> str:
        adapters = "".join(f" {'−' if self.restores else '+'} {one.label}" for one in self.given)
        return f"{self.base.name}{adapters} → {self.out}, {counted(self.edits, 'tensor')} to compute"

    def lines(self) -> list[str]:
        """The plan for people."""
        facts = self.facts()
        tensors = counted(facts["tensors"], "tensor")
        writes = f"writes    {self.out}: {size(self.bytes_to_write)} ({size(facts['bytes_free'])} free)"
        if self.restores:
            by = f", by {', '.join(one.label for one in self.given)}" if self.given else ""
            what = f"{self.edits} of {tensors}{by}" if self.edits else f"all of it, from {self.base.name}"
            return [f"restores  {what}", writes]
        stored = f"quantized to {'; '.join(self.schemes)}" if self.schemes else f"dtype {self.stored_as}"
        return [
            f"base      {self.base.name}: {tensors} in {counted(len(self.files), 'file')}",
            *(f"adapter   {one.label} × {one.weight:g}: {self._landed(one)}" for one in self.given),
            f"changes   {self.edits} of {tensors}, {stored}",
            writes,
        ]

    def _landed(self, one: WeightedAdapter) -> str:
        total = len(one.adapter.modules) + len(one.adapter.replaced) + len(one.adapter.tokens)
        return f"{len(self.ledger[one.label])} of {total} modules and tensors have their place"


def inputs_of(*inputs: Checkpoint | WeightedAdapter) -> tuple[Path, ...]:
    """The files and directories that bases, with the receipts beside them, and adapters are read from."""
    paths: list[Path] = []
    for one in inputs:
        if isinstance(one, WeightedAdapter):
            paths += [*([one.path] if one.path else []), *one.adapter.files]
        else:
            paths += [one.path] if one.is_directory else [one.path, receipt_of(one.path)]
    return tuple(paths)


def total_size(plan: MergePlan) -> int:
    """The index's `total_size`: the bytes of all tensors, headers not counted."""
    return sum(file.size - len(file.header) for file in plan.files)
