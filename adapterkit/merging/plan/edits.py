"""The tensors of an output that are computed: merged from a base's, or restored to what they were before a merge."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.base.quant import QuantizationSpec, QuantizedWeight
from adapterkit.base.targets import Target
from adapterkit.files.safetensors import DTYPE_BITS, TensorInfo


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
    """One output tensor that is computed: what it is computed from, and the span of the output that it takes.

    The tensor is processed as a matrix `(rows, columns)`.
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
    def by_expert(self) -> bool:
        return any(delta.target.expert is not None and delta.target.rows is not None for delta in self.deltas)

    @property
    def stored_bits(self) -> int:
        """The bits that an element takes in the output."""
        return DTYPE_BITS[self.dtype]

    def offset(self, row: int) -> int:
        """Where in the output file `row` begins."""
        depth, columns = self.matrix
        return self.stop if row == depth else self.start + (row * columns * self.stored_bits + 7) // 8

    @property
    def renormalizes(self) -> bool:
        """Whether DoRA is among the deltas."""
        return any(delta.weights.magnitude is not None for delta in self.deltas)

    @property
    def is_quantized(self) -> bool:
        """Whether the tensor that it is computed from is quantized."""
        return isinstance(self.source, QuantizedWeight)


@dataclass(frozen=True, slots=True)
class MergeEdit(Edit):
    """A tensor that adapters change, or that is stored in another form than the base's.

    Without a `source` it is new, and `replaced` gives it. With a `packing` it is quantized: `start:stop` takes the
    packed numbers, `parts` are the spans of its other tensors.
    """

    replaced: tuple[Replacement, ...] = ()
    added: tuple[Addition, ...] = ()
    packing: QuantizationSpec | None = None
    checked_against: QuantizedWeight | None = None  # what must have been made from the source by quantizing it
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def stored_bits(self) -> int:
        return self.packing.bits if self.packing else DTYPE_BITS[self.dtype]

    @property
    def rows_together(self) -> int:
        """The number of rows that a block has a multiple of."""
        columns = self.matrix[1]
        own = 2 if isinstance(self.source, QuantizedWeight) and columns * self.source.bits % 8 else 1  # whole bytes
        return lcm(own, self.packing.rows_together(columns)) if self.packing else own

    @property
    def changes(self) -> bool:
        """Whether adapters change the tensor; otherwise it is only stored in another form."""
        return bool(self.deltas or self.replaced or self.added)


@dataclass(frozen=True, slots=True)
class RestoreEdit(Edit):
    """A tensor that becomes what it was before a merge: the deltas are subtracted, and the rest is `recorded`.

    With `quantized`, the base's tensor was stored by that scheme, and its numbers are restored.
    """

    recorded: tuple[Recorded, ...] = ()
    quantized: QuantizedWeight | None = None

    @property
    def stored_bits(self) -> int:
        return self.quantized.bits if self.quantized else DTYPE_BITS[self.dtype]
