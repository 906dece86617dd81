"""A merge plan: the spans to copy, the tensors to compute, and their offsets in every output file.

A plan is made from headers alone and is plain data: it pickles, so any process can run one file of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any, ClassVar

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.files.safetensors import Header, TensorInfo
from adapterkit.files.staging import Destination
from adapterkit.files.stamps import Stamp
from adapterkit.files.workspace import receipt_of
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.tokenizers import Tokenizer
from adapterkit.reprs import Displayed
from adapterkit.text import counted, size


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes `start:stop` of the input file, written at `at`."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class SidecarCopy:
    """A tensor copied from a receipt's sidecar, written at `at`."""

    tensor: TensorInfo
    at: int


@dataclass(frozen=True, repr=False)
class FilePlan(Displayed):
    """One output file: its header, the spans copied from `source` or from a sidecar, and the computed tensors."""

    name: str
    source: Path
    header: bytes
    size: int
    tensors: tuple[str, ...]
    copies: tuple[Copy, ...]
    edits: tuple[MergeEdit | RestoreEdit, ...]
    from_sidecar: tuple[SidecarCopy, ...] = ()
    dropped: tuple[tuple[int, TensorInfo], ...] = ()  # tensors and rows that only the source has, by number in it

    def brief(self) -> str:
        return f"{self.name}, {size(self.size)}, {len(self.edits)} of {counted(len(self.tensors), 'tensor')} computed"

    @property
    def copies_all(self) -> bool:
        """Whether every tensor is copied to its old offset, so that only the header may differ from the source."""
        return not self.edits and not self.from_sidecar and all(copy.at == copy.start for copy in self.copies)


@dataclass(frozen=True)
class Hashes:
    """The SHA-256 of every file of a run, by file name; `adapters` in the plan's order."""

    base: dict[str, str]
    adapters: tuple[dict[str, str], ...]
    outputs: dict[str, str]  # empty if neither a receipt nor a restored base needs them


# Called with the plan, the folder for companions and receipt, and all hashes.
WriteCompanions = Callable[["MergePlan", Path, Hashes], None]


@dataclass(frozen=True, repr=False)
class MergePlan(Displayed):
    """Every tensor of every output file of a merge, and the output's path; `RunOptions` has the options of a run.

    Plain data that pickles: `run_file` makes one file of it, in any process.
    """

    unit: ClassVar[str] = "tensors"  # of its progress
    base: Checkpoint
    out: Path
    adapters: tuple[WeightedAdapter, ...]
    files: tuple[FilePlan, ...]
    config: dict[str, Any]  # the output's
    weight_map: dict[str, str]
    ledger: dict[str, dict[str, tuple[str, ...]]]  # adapter label -> its module or tensor -> the base tensors
    skipped: tuple[str, ...] = ()  # only with allow_partial
    notes: tuple[str, ...] = ()
    dtype: str | None = None
    vocabulary: int | None = None  # the output's number of tokens, by the rows of its embedding; None if unknown
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of tensors that gain or lose rows
    calibration: Path | None = None  # a text, for compensated rounding
    undoable: bool = False  # whether a run may write a receipt
    restores: bool = False  # whether it restores a base, whose hashes are known
    restores_receipt: bool = False  # whether a restored single file had the receipt of an earlier merge
    unchecked: tuple[str, ...] = ()  # restored files whose hashes the receipt lacks
    overwrite: bool | None = None  # whether to replace an output of ours; None if the caller cannot choose
    also_read: tuple[Path, ...] = ()  # inputs besides the base and the adapters
    quantized: Checkpoint | None = None  # the quantized base that `base` is the original of
    tokenizer: Tokenizer | None = None  # that an adapter brings; None: the base's
    write_companions: WriteCompanions | None = None  # checks hashes, writes the other files; None: `finish_merge`

    def destination(self, receipt: bool) -> Destination:
        """The output's path, and the inputs that it must not replace."""
        inputs = (*inputs_of(self.base, *self.adapters), *self.also_read)
        beside = not self.base.is_directory and (receipt or self.restores_receipt)
        return Destination(self.out, inputs, self.base.is_directory, self.overwrite, beside)

    def header_of(self, file: FilePlan) -> Header:
        """The header of the base's file that is the source of `file`."""
        return next(header for header in self.base.shards if header.file == file.source)

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """The stamps of every file that was read to make the plan."""
        stamps: dict[Path, Stamp] = {}
        for source in (*(given.adapter for given in reversed(self.adapters)), self.quantized, self.base):
            stamps |= source.stamps if source is not None else {}
        return stamps

    @property
    def edits(self) -> int:
        return sum(len(file.edits) for file in self.files)

    @property
    def merges(self) -> Iterator[MergeEdit]:
        """The edits that merge, quantize or convert a tensor rather than restore it."""
        return (edit for file in self.files for edit in file.edits if isinstance(edit, MergeEdit))

    @property
    def schemes(self) -> list[str]:
        """The quantization schemes of the output."""
        return list(dict.fromkeys(edit.packing.scheme for edit in self.merges if edit.packing))

    @property
    def trained_as(self) -> list[str]:
        """The quantization schemes of the base in training, which its weights are rounded to."""
        return list(dict.fromkeys(edit.as_trained.scheme for edit in self.merges if edit.as_trained))

    @property
    def stored_as(self) -> str:
        """The requested dtype, or that of dequantized weights; else the base's."""
        plain = (edit for edit in self.merges if not edit.packing)
        dequantized = dict.fromkeys(edit.dtype for edit in plain if isinstance(edit.source, QuantizedWeight))
        return self.dtype or ", ".join(dequantized) or "as the base"

    def facts(self) -> dict[str, Any]:
        """The plan as JSON facts."""
        return {
            "base": self.base.name,
            "adapters": [
                {
                    "name": given.label,
                    **given.weight_facts(),
                    "modules": len(given.adapter.modules),
                    "format": given.adapter.format,
                }
                for given in self.adapters
            ],
            "output": str(self.out),
            "files": len(self.files),
            "tensors": len(self.weight_map) or sum(len(file.tensors) for file in self.files),
            "tensors_changed": self.edits,
            "dtype": self.stored_as,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer.label if self.tokenizer else self.base.name,
            "quantized_to": self.schemes,
            "as_trained": self.trained_as,
            "bytes_to_write": self.bytes_to_write,
            "bytes_free": disk_usage(next(p for p in self.out.absolute().parents if p.exists())).free,
            "landed": {label: {name: list(at) for name, at in landed.items()} for label, landed in self.ledger.items()},
            "skipped": list(self.skipped),
        }

    def brief(self) -> str:
        adapters = "".join(f" {'−' if self.restores else '+'} {given.label}" for given in self.adapters)
        return f"{self.base.name}{adapters} → {self.out}, {counted(self.edits, 'tensor')} to compute"

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        facts = self.facts()
        tensors = counted(facts["tensors"], "tensor")
        writes = f"writes    {self.out}: {size(self.bytes_to_write)} ({size(facts['bytes_free'])} free)"
        if self.restores:
            labels = ", ".join(given.label for given in self.adapters)
            changed = f"{self.edits} of {tensors}" + (f", changed by {labels}" if labels else "")
            return [f"restores  {changed if self.edits else f'{tensors} from {self.base.name}'}", writes]
        stored = f"quantized to {'; '.join(self.schemes)}" if self.schemes else f"dtype {self.stored_as}"
        trained = f", as quantized to {'; '.join(self.trained_as)}" if self.trained_as else ""
        return [
            f"base      {self.base.name}: {tensors} in {counted(len(self.files), 'file')}{trained}",
            *(line for given in self.adapters for line in self._adapter_lines(given)),
            f"changes   {self.edits} of {tensors}, {stored}",
            writes,
        ]

    def _adapter_lines(self, given: WeightedAdapter) -> Iterator[str]:
        yield f"adapter   {given.label} × {given.weight:g}: {self._matches(given)}"
        yield from given.module_weight_lines()

    def _matches(self, given: WeightedAdapter) -> str:
        matched, others = len(self.ledger[given.label]), len(given.adapter.replaced) + len(given.adapter.tokens)
        total = len(given.adapter.modules) + others
        nouns = "modules and tensors" if others else "modules"
        if total == 1:
            return f"{matched} of 1 {'tensor' if others else 'module'} matches the base"
        return f"{f'all {total}' if matched == total else f'{matched} of {total}'} {nouns} match the base"


def inputs_of(*inputs: Checkpoint | WeightedAdapter) -> tuple[Path, ...]:
    """The files and directories of bases, the receipts beside them included, and of adapters."""
    paths: list[Path] = []
    for source in inputs:
        if isinstance(source, WeightedAdapter):
            paths += [*([source.path] if source.path else []), *source.adapter.files]
        else:
            paths += [source.path] if source.is_directory else [source.path, receipt_of(source.path)]
    return tuple(paths)


def total_size(plan: MergePlan) -> int:
    """The index's `total_size`: the bytes of all tensors, without headers."""
    return sum(file.size - len(file.header) for file in plan.files)
