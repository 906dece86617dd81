"""A merge, complete and checked before a byte is written: what to copy, what to edit, and where everything lands.

A plan is made from headers only and is plain data: it pickles, so any worker can run one file of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

from adapterkit.adapter.weights import LazyTensor, LoraWeights, WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizationSpec, QuantizedWeight
from adapterkit.base.targets import Target
from adapterkit.files.safetensors import DTYPE_BITS, TensorInfo
from adapterkit.files.staging import Destination
from adapterkit.files.stamps import Stamp
from adapterkit.files.workspace import receipt_of
from adapterkit.text import counted, size


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """One module's update where it lands."""

    adapter: int  # which of those given
    module: str
    weights: LoraWeights[LazyTensor]
    weight: float
    target: Target


@dataclass(frozen=True, slots=True)
class Replacement:
    """Values that take the place of the base's, `weight` of the way; all rows, or only some."""

    values: LazyTensor
    weight: float
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Addition:
    """A vector added to a bias: `scale · vector`."""

    vector: LazyTensor
    scale: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """Where a receipt keeps what restores rows `first:last`: a residual in code, and where they are needed more.

    That is the gains of DoRA's updates, and of quantized rows the stored bytes that their values do not tell.
    """

    first: int
    last: int
    residual: TensorInfo
    gains: TensorInfo | None = None
    numbers: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One output tensor that is not copied: where it comes from, what changes in it, where it is written.

    The tensor is processed as a matrix `(rows, columns)`. Without a `source` it is new, and `replaced` gives it. With a
    `packing` it is quantized: `start:stop` takes the packed numbers, `parts` are the spans of its other tensors.
    """

    name: str
    source: TensorInfo | QuantizedWeight | None
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    deltas: tuple[ModuleUpdate, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    added: tuple[Addition, ...] = ()
    packing: QuantizationSpec | None = None
    twin: QuantizedWeight | None = None  # what was made from the source by quantizing, if that is to be checked
    parts: tuple[tuple[int, int], ...] = ()
    recorded: tuple[Recorded, ...] = ()  # then the deltas are not added but taken out of the source
    quantized: QuantizedWeight | None = None  # what is then restored, and stored at `start:stop` by its numbers

    def offset(self, row: int) -> int:
        """Where in the output file `row` begins."""
        depth, columns = self.matrix
        if row == depth:
            return self.stop
        stored = self.packing or self.quantized
        bits = stored.bits if stored else DTYPE_BITS[self.dtype]
        return self.start + (row * columns * bits + 7) // 8

    @property
    def rows_together(self) -> int:
        """Of how many rows a block is to have a multiple."""
        columns = self.matrix[1]
        own = 2 if isinstance(self.source, QuantizedWeight) and columns * self.source.bits % 8 else 1  # whole bytes
        return lcm(own, self.packing.rows_together(columns)) if self.packing else own

    @property
    def matrix(self) -> tuple[int, int]:
        if len(self.shape) < 2:
            return (self.shape[0] if self.shape else 1, 1)
        depth = self.shape[0] * self.shape[1] if self.by_expert else self.shape[0]
        total = prod(self.shape)
        return (depth, total // depth if depth else 0)

    @property
    def changes(self) -> bool:
        """Whether adapters change the tensor; else it is only stored otherwise, or restored."""
        return bool(self.deltas or self.replaced or self.added) and not self.recorded

    @property
    def renormalizes(self) -> bool:
        """Whether DoRA is among the deltas."""
        return any(delta.weights.magnitude is not None for delta in self.deltas)

    @property
    def is_quantized(self) -> bool:
        """Whether the base has the tensor quantized."""
        return isinstance(self.source, QuantizedWeight)

    @property
    def by_expert(self) -> bool:
        return any(delta.target.expert is not None and delta.target.rows is not None for delta in self.deltas)


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


@dataclass(frozen=True)
class FilePlan:
    """One output file: its header, the spans copied from `source`, and the tensors that are computed."""

    name: str
    source: Path
    header: bytes
    size: int
    tensors: tuple[str, ...]
    copies: tuple[Copy, ...]
    edits: tuple[Edit, ...]
    kept: tuple[BytesFromSidecar, ...] = ()

    @property
    def copies_all(self) -> bool:
        """Whether all tensors are copied, and to where they were; then but for the header it is the same file."""
        return not self.edits and not self.kept and all(copy.at == copy.start for copy in self.copies)


@dataclass(frozen=True)
class Hashes:
    """The SHA-256 of every file of a run: of the base and outputs by name, of adapters in their order."""

    base: dict[str, str]
    adapters: tuple[dict[str, str], ...]
    outputs: dict[str, str]  # none where they were not asked for


# Called with a plan, the folder that its output or receipt is made in, and the hashes of it all.
Finish = Callable[["MergePlan", Path, Hashes], None]


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do."""

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
    accept_loss: bool = False  # of an update that quantizing erases
    calibration: Path | None = None  # a text, for compensated rounding
    link: bool = False  # files that stay as they are share their bytes with the base's, where the disk can
    receipt: bool = False  # whether what undoes it is recorded
    restores: bool = False  # makes a base again, whose hashes are known
    unchecked: tuple[str, ...] = ()  # files that are restored, though the receipt does not hash them
    beside: bool = False  # whether a folder goes with the output, which is a single file
    overwrite: bool | None = None  # what is at `out`, if it is ours; None where that was not to be asked
    also_read: tuple[Path, ...] = ()  # besides the base and the adapters
    quantized: Checkpoint | None = None  # what the base is checked to be the original of
    finish: Finish | None = None  # checks the result and writes what else belongs to it; by default what a merge needs

    @property
    def destination(self) -> Destination:
        """Where the output goes, and all that it is made from."""
        inputs = (*inputs_of(self.base, *self.given), *self.also_read)
        return Destination(self.out, inputs, self.base.is_directory, self.overwrite, self.beside)

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Of everything that was read to make the plan."""
        stamps: dict[Path, Stamp] = {}
        for one in (*(one.adapter for one in reversed(self.given)), self.quantized, self.base):
            stamps |= one.stamps if one else {}
        return stamps

    @property
    def edits(self) -> int:
        return sum(len(file.edits) for file in self.files)

    @property
    def stored_as(self) -> str:
        """The dtype that was asked for, or that of dequantized weights; else that of the base stays."""
        edits = (edit for file in self.files for edit in file.edits if not edit.packing)
        dequantized = dict.fromkeys(edit.dtype for edit in edits if isinstance(edit.source, QuantizedWeight))
        return self.dtype or ", ".join(dequantized) or "as the base"

    @property
    def schemes(self) -> list[str]:
        """What tensors are quantized to."""
        edits = (edit for file in self.files for edit in file.edits)
        return list(dict.fromkeys(edit.packing.scheme for edit in edits if edit.packing))

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
