"""A weight that is stored quantized: what it is once dequantized, and how its rows are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from adapterkit.base.quant.rounding import NEAREST, Rounding
from adapterkit.files.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

DEFAULT_BLOCKSIZE = 64

# What reads a tensor, onto the device where it is computed with.
Read = Callable[[TensorInfo], "torch.Tensor"]


class Rows(Protocol):
    """Rows `first:last` of a weight seen as a matrix, dequantized where `read` puts what is stored."""

    def __call__(self, first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor: ...


class Codes(Protocol):
    """The codes that dequantize to `rows`, which begin with row `first`, as they are stored: the inverse of `Rows`.

    Where a scale is zero, several codes mean one value, and it is any of them.
    """

    def __call__(self, rows: torch.Tensor, first: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """One quantized weight, by its logical `shape` and the `dtype` that its scheme dequantizes to.

    Plain data, so that plans pickle; `stored` holds the codes, `parts` are all the tensors it is made from.
    """

    name: str
    kind: str  # one of its scheme's
    shape: tuple[int, ...]
    dtype: str
    stored: TensorInfo

    @property
    @abstractmethod
    def scheme(self) -> str:
        """What to call the scheme, with its block size and nesting."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]: ...

    @abstractmethod
    def open(self, columns: int) -> Rows:
        """Read the scales, and return what reads and dequantizes rows of `columns` elements, from any thread."""

    @abstractmethod
    def codes(self, columns: int) -> Codes:
        """Read the scales, and return what tells from dequantized rows how they are stored."""

    @abstractmethod
    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        """How far weights of rows `first:last` can be, in float32, from what they dequantize to: half a step."""

    @abstractmethod
    def spec(self) -> QuantizationSpec | None:
        """How to quantize another weight to just this, or None where that is not supported."""

    @property
    def bits(self) -> int:
        """What an element takes where the codes are stored."""
        return 8

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def start(self) -> int:
        return self.stored.start

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """What weights are to be quantized to: a kind of some scheme, the options of that scheme, and the rounding."""

    kind: str
    blocksize: int = DEFAULT_BLOCKSIZE
    nested: bool = False  # the scales are quantized, too
    rounding: Rounding = NEAREST


class QuantizationSpec(ABC):
    """How one weight is to be quantized: which tensors that makes, known before any weight is read."""

    bits: ClassVar[int]  # that an element of the weight itself takes
    taken_as: ClassVar[str] = "F32"  # the dtype that weights are quantized from
    dtype: str  # that it dequantizes to
    rounding: Rounding

    @classmethod
    @abstractmethod
    def of(cls, weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> QuantizationSpec:
        """How to quantize `weight` by settings whose rounding has the weight's own seed."""

    @property
    @abstractmethod
    def scheme(self) -> str:
        """What to call the scheme, as `QuantizedWeight.scheme` does."""

    @abstractmethod
    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, dtype and shape of every tensor that weight `name` is stored in, itself first."""

    @abstractmethod
    def rows_together(self, columns: int) -> int:
        """How many rows of `columns` elements, or a multiple, are packed at a time, so that no block is cut."""

    @abstractmethod
    def start(self, columns: int) -> Quantizer: ...


class Quantizer(ABC):
    """Quantizes one weight, some rows at a time, in any order and from any thread."""

    @abstractmethod
    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """The packed bytes of `rows`, float32, which begin with row `first`; their scales are kept."""

    @abstractmethod
    def finish(self) -> list[bytes]:
        """The other tensors of the layout, when all rows are packed."""

    @abstractmethod
    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """What rows `first:last` dequantize to, in float32, after `finish`."""

    @abstractmethod
    def most(self) -> float:
        """The greatest magnitude that anything dequantizes to, after `finish`."""
