"""The interfaces of quantized weights: reading them, and quantizing to them."""

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

# Reads a tensor onto the device for the computation.
Read = Callable[[TensorInfo], "torch.Tensor"]


class Rows(Protocol):
    """Reads and dequantizes rows `first:last` of a weight viewed as a matrix, on the device that `read` reads to."""

    def __call__(self, first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor: ...


class Codes(Protocol):
    """The inverse of `Rows`: returns the stored codes that dequantize to `rows`, which start at row `first`.

    If a scale is zero, all codes dequantize to the same value, and any of them is returned.
    """

    def __call__(self, rows: torch.Tensor, first: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """A quantized weight, with its logical `shape` and the `dtype` that it dequantizes to.

    Plain data, so that plans pickle. `stored` holds the codes; `parts` are all tensors of the weight.
    """

    name: str
    kind: str  # one of `Scheme.kinds`
    shape: tuple[int, ...]
    dtype: str
    stored: TensorInfo

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The name of the scheme, with its block size and nesting."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]: ...

    @abstractmethod
    def open(self, columns: int) -> Rows:
        """Read the scales, and return a thread-safe function to read and dequantize rows of `columns` elements."""

    @abstractmethod
    def codes(self, columns: int) -> Codes:
        """Read the scales, and return a function that encodes dequantized rows as stored."""

    @abstractmethod
    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        """Return a function for the largest quantization error in rows `first:last`, in float32: half a step."""

    @abstractmethod
    def spec(self) -> QuantizationSpec | None:
        """Return the spec to quantize another weight in the same way, or None if unsupported."""

    @property
    def bits(self) -> int:
        """The bits per element of the stored codes."""
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
    """Options for quantizing weights: the kind, its block size and nesting, and the rounding."""

    kind: str
    blocksize: int = DEFAULT_BLOCKSIZE
    nested: bool = False  # quantize the scales too
    rounding: Rounding = NEAREST


class QuantizationSpec(ABC):
    """A plan to quantize one weight, with the layout of its tensors, made before the weight is read."""

    bits: ClassVar[int]  # per element, without scales
    scales_together: bool = False  # whether the scales of all rows depend on each other
    source_dtype: ClassVar[str] = "F32"  # that weights are quantized from
    dtype: str  # that the weight dequantizes to
    rounding: Rounding

    @classmethod
    @abstractmethod
    def of(cls, weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> QuantizationSpec:
        """Make the spec for `weight`; the rounding in `settings` already has the weight's own seed."""

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The name of the scheme, as in `QuantizedWeight.scheme`."""

    @abstractmethod
    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return name, dtype and shape of every tensor of the weight `name`, its codes first."""

    @abstractmethod
    def rows_together(self, columns: int) -> int:
        """Return a number of rows of `columns` elements that can be packed together without splitting a block."""

    @abstractmethod
    def start(self, columns: int) -> Quantizer: ...


class Quantizer(ABC):
    """Quantizes one weight, some rows at a time, in any order and from any thread."""

    @abstractmethod
    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Pack float32 `rows`, which start at row `first`, to bytes, and remember their scales."""

    @abstractmethod
    def finish(self) -> list[bytes]:
        """Return the other tensors of the layout, after all rows are packed."""

    @abstractmethod
    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Dequantize the packed rows `first:last` to float32; after `finish` if scales depend on each other."""

    @abstractmethod
    def max_magnitude(self) -> float:
        """Return the largest magnitude that any code dequantizes to, after `finish`."""
