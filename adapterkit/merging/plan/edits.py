"""Edits: the computed tensors of an output, either merged from a base's or restored to their values before a merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.base.quant import QuantizationSpec, QuantizedWeight
from adapterkit.base.target import Target
from adapterkit.files.safetensors import DTYPE_BITS, TensorInfo

STACK_BYTES = 128 << 20  # of factors of stacked experts, kept in memory for the tensors of the other experts


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """The update of one module on one base tensor."""

    adapter: int  # index in the plan
    module: str
    weights: LoraWeights[LazyTensor]
    weight: float
    target: Target


@dataclass(frozen=True, slots=True)
class Replacement:
    """Values that replace all or some rows of the base, interpolated by `weight`; rows that the base lacks are new.

    With `of_base` they are the layer's own weight during training, not a trained copy (modules_to_save): a tied layer
    has it too.
    """

    values: LazyTensor
    weight: float
    rows: tuple[int, ...] | None = None
    of_base: bool = False


@dataclass(frozen=True, slots=True)
class Addition:
    """A vector added to a bias: `scale · vector`."""

    vector: LazyTensor
    scale: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """Sidecar tensors that restore rows `first:last`.

    `residual` is encoded; `gains` are those of DoRA updates; `numbers` corrects the packed bytes of quantized rows.
    """

    first: int
    last: int
    residual: TensorInfo
    gains: TensorInfo | None = None
    numbers: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One computed output tensor: its source, dtype, shape, and byte span in the output file.

    The tensor is processed as a matrix `(rows, columns)`, which may have more rows than the source.
    """

    name: str
    source: TensorInfo | QuantizedWeight | None
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    deltas: tuple[ModuleUpdate, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        if len(self.shape) < 2:
            return (self.shape[0] if self.shape else 1, 1)
        depth = self.shape[0] * self.shape[1] if len(self.shape) > 2 and self.by_expert else self.shape[0]
        return (depth, prod(self.shape) // depth if depth else 0)

    @property
    def source_rows(self) -> int:
        """The number of rows that the source has; further ones are new."""
        rows, columns = self.matrix
        return 0 if self.source is None else min(rows, prod(self.source.shape) // max(1, columns))

    def spans(self, step: int) -> Iterator[tuple[int, int]]:
        """First and last row of blocks of `step` rows, none of which has both rows of the source and new ones."""
        kept, rows = self.source_rows, self.matrix[0]
        for start, stop in ((0, kept), (kept, rows)):
            yield from ((first, min(stop, first + step)) for first in range(start, stop, step))

    @property
    def by_expert(self) -> bool:
        return any(delta.target.expert is not None and delta.target.rows is not None for delta in self.deltas)

    @property
    def stored_bits(self) -> int:
        """Bits per element in the output."""
        return DTYPE_BITS[self.dtype]

    def offset(self, row: int) -> int:
        """Byte offset of `row` in the output file."""
        depth, columns = self.matrix
        return self.stop if row == depth else self.start + (row * columns * self.stored_bits + 7) // 8

    @property
    def renormalizes(self) -> bool:
        """Whether any update is a DoRA update."""
        return any(delta.weights.magnitude is not None for delta in self.deltas)

    @property
    def is_quantized(self) -> bool:
        """Whether the source tensor is quantized."""
        return isinstance(self.source, QuantizedWeight)


@dataclass(frozen=True, slots=True)
class MergeEdit(Edit):
    """A tensor that adapters change, or that changes its dtype or quantization.

    Without a `source` the tensor is new and `replaced` provides it. With a `packing` it is quantized: `start:stop` is
    the span of the packed weights, `parts` are the spans of its other tensors. With `as_trained` the source is
    quantized and dequantized before anything is added to it.
    """

    replaced: tuple[Replacement, ...] = ()
    added: tuple[Addition, ...] = ()
    packing: QuantizationSpec | None = None
    checked_against: QuantizedWeight | None = None  # must match the source, quantized
    parts: tuple[tuple[int, int], ...] = ()
    as_trained: QuantizationSpec | None = None

    @property
    def stored_bits(self) -> int:
        return self.packing.bits if self.packing else DTYPE_BITS[self.dtype]

    @property
    def rows_together(self) -> int:
        """Number of rows that must stay in one block: its row count is a multiple of this."""
        columns = self.matrix[1]
        own = 2 if isinstance(self.source, QuantizedWeight) and columns * self.source.bits % 8 else 1  # whole bytes
        return lcm(own, *(spec.rows_together(columns) for spec in (self.packing, self.as_trained) if spec))

    @property
    def changes(self) -> bool:
        """Whether adapters change the tensor, not only its dtype or quantization."""
        return bool(self.deltas or self.replaced or self.added)


@dataclass(frozen=True, slots=True)
class RestoreEdit(Edit):
    """A tensor restored to its values before a merge: the updates are subtracted, then `recorded` residuals applied.

    With `quantized`, the base's tensor was quantized by that scheme, and its packed bytes are restored.
    """

    recorded: tuple[Recorded, ...] = ()
    quantized: QuantizedWeight | None = None

    @property
    def stored_bits(self) -> int:
        return self.quantized.bits if self.quantized else DTYPE_BITS[self.dtype]
