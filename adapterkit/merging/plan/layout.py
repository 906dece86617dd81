"""The layout of an output file: copied spans, computed tensors, and their offsets."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from adapterkit.base.quant import QuantizationSpec, QuantizedWeight
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import DTYPE_BITS, Header, TensorInfo, encode_header
from adapterkit.merging.plan.edits import Addition, MergeEdit, ModuleUpdate, Replacement
from adapterkit.merging.plan.types import Copy, FilePlan


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight of the output model: stored as `dtype`, or packed into several tensors."""

    name: str
    source: TensorInfo | QuantizedWeight | None
    dtype: str
    shape: tuple[int, ...]
    deltas: tuple[ModuleUpdate, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    added: tuple[Addition, ...] = ()
    packing: QuantizationSpec | None = None
    checked_against: QuantizedWeight | None = None
    as_trained: QuantizationSpec | None = None

    @property
    def copied(self) -> TensorInfo | None:
        """The input's tensor, if the output copies its bytes."""
        changed = self.deltas or self.replaced or self.added or self.packing or self.checked_against or self.as_trained
        if changed or not isinstance(self.source, TensorInfo):
            return None
        same = (self.source.dtype, self.source.shape) == (self.dtype, self.computed_shape)
        return self.source if same else None

    @property
    def computed_shape(self) -> tuple[int, ...]:
        """The shape in which it is computed: a vector if the source is one, as of a bias whose length changes."""
        return self.shape[-1:] if self.source is not None and len(self.source.shape) == 1 else self.shape

    def stored(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, dtype and shape of every stored tensor, the weight itself first."""
        return self.packing.layout(self.name) if self.packing else ((self.name, self.dtype, self.shape),)


def lay_out(header: Header, entries: Sequence[Entry], metadata: Mapping[str, str] = MappingProxyType({})) -> FilePlan:
    """Plan an output file with `entries` in place of the tensors in `header`, and additional `metadata`."""
    stored = [part for entry in entries for part in entry.stored()]
    same = [(info.name, info.dtype, info.shape) for info in _in_order(header)] == stored
    if same and not metadata:
        spans = {info.name: (info.start, info.stop) for info in header.tensors.values()}
        with open_regular(header.file) as stream:
            raw = stream.read(header.nbytes)
    else:
        if any(entry.packing for entry in entries):  # packed bytes of any length go last, to keep the others aligned
            stored.sort(key=lambda part: -DTYPE_BITS[part[1]])
        raw, found = encode_header(stored, {**header.metadata, **metadata}, header.nbytes if same else 0)
        spans = {name: span for (name, *_), span in zip(stored, found, strict=True)}
    copies: list[Copy] = []
    edits: list[MergeEdit] = []
    for entry in entries:
        (start, stop), *parts = (spans[name] for name, *_ in entry.stored())
        if (source := entry.copied) is not None:
            _append_copy(copies, Copy(source.start, source.stop, start))
            continue
        if start == stop:  # empty, although its shape may claim many rows
            continue
        edits.append(
            MergeEdit(
                entry.name, entry.source, entry.dtype, entry.computed_shape, start, stop, entry.deltas,
                entry.replaced, entry.added, entry.packing, entry.checked_against, tuple(parts), entry.as_trained,
            )
        )  # fmt: skip
    size = max((stop for _, stop in spans.values()), default=len(raw))
    return FilePlan(
        header.file.name, header.file, raw, size, tuple(spans), tuple(copies), tuple(edits),
        dropped=tuple(_dropped(header, entries, spans)),
    )  # fmt: skip


def _dropped(header: Header, entries: Sequence[Entry], kept: Container[str]) -> Iterator[tuple[int, TensorInfo]]:
    """The numbers of tensors in `header` that the output lacks or shortens, each with the tensor or its last rows."""
    sources = {entry.name: entry.source for entry in entries}
    for number, info in enumerate(header.tensors.values()):
        source = sources.get(info.name)
        if info.name not in kept:
            yield number, info
        elif isinstance(source, TensorInfo) and source.start == info.start and source.stop < info.stop:
            rows = (info.nbytes - source.nbytes) * source.shape[0] // source.nbytes
            yield number, replace(info, start=source.stop, shape=(rows, *source.shape[1:]))


def _in_order(header: Header) -> list[TensorInfo]:
    return sorted(header.tensors.values(), key=lambda info: (info.start, info.stop))


def _append_copy(copies: list[Copy], copy: Copy) -> None:
    """Append a span, joined with the last one if they are contiguous in both input and output."""
    if copy.start == copy.stop:
        return
    last = copies[-1] if copies else None
    if last and last.stop == copy.start and last.at + last.stop - last.start == copy.at:
        copies[-1] = Copy(last.start, copy.stop, last.at)
    else:
        copies.append(copy)
