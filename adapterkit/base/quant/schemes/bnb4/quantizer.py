"""Quantize weights to NF4 or FP4, with the arithmetic of bitsandbytes' reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

from adapterkit.base.quant.codebooks import CODES, dynamic_code
from adapterkit.base.quant.rounding import NEAREST, Rounding, choose_codes
from adapterkit.base.quant.schemes.bnb4.nibbles import dequantize, pair_table, pairs
from adapterkit.base.quant.weight import QuantizationSettings, QuantizationSpec, QuantizedWeight, Quantizer
from adapterkit.files.safetensors import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    import torch

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NESTED_BLOCK = 256
OFFSET_DIGITS = 25  # the most that a float32 takes in JSON
TINY = 1e-38  # the scale of a block of zeros


def scheme_name(kind: str, blocksize: int, nested: bool) -> str:
    return f"bitsandbytes {kind.upper()}, blocks of {blocksize}{', nested' if nested else ''}"


def scale(values: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `values / absmax`, in [−1, 1], and `absmax`, one per block.

    As in bitsandbytes' reference, full blocks are multiplied by the reciprocal, a short last block is divided.
    """
    import torch

    full = len(values) // blocksize * blocksize
    absmax = values[:full].view(-1, blocksize).abs().amax(dim=1)
    scaled = (values[:full].view(-1, blocksize) * absmax.clamp(min=TINY).reciprocal()[:, None]).view(-1)
    if full < len(values):
        last = values[full:].abs().max()
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, values[full:] / last.clamp(min=TINY)])
    return scaled.clamp_(-1, 1), absmax


@dataclass(frozen=True)
class Spec4bit(QuantizationSpec):
    """NF4 or FP4 as bitsandbytes stores it, packed into elements of the dtype `storage`."""

    bits = 4

    shape: tuple[int, ...]
    dtype: str
    kind: str
    blocksize: int
    nested: bool
    storage: str = "U8"
    rounding: Rounding = NEAREST

    @classmethod
    def of(cls, weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> Spec4bit:
        dtype = weight.dtype if weight.dtype in DTYPES.values() else "F32"  # no name for F64
        options = settings.kind, settings.blocksize, settings.nested
        return cls(weight.shape, dtype, *options, rounding=settings.rounding)

    @property
    def scales_together(self) -> bool:  # type: ignore[override]
        return self.nested

    @property
    def scheme(self) -> str:
        return scheme_name(self.kind, self.blocksize, self.nested)

    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        count = prod(self.shape)
        blocks = -(-count // self.blocksize)
        packed = (count + 1) // 2 * 8 // DTYPE_BITS[self.storage]
        tensors = [(name, self.storage, (packed, 1)), (f"{name}.absmax", "U8" if self.nested else "F32", (blocks,))]
        if self.nested:
            tensors += [(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),))]
            tensors += [(f"{name}.nested_quant_map", "F32", (256,))]
        room = len(self.state(0.0)) + (OFFSET_DIGITS if self.nested else 0)
        tensors += [(f"{name}.quant_map", "F32", (16,))]
        return (*tensors, (f"{name}.quant_state.bitsandbytes__{self.kind}", "U8", (room,)))

    def state(self, offset: float) -> bytes:
        """Return the quant_state as JSON."""
        dtype = next(name for name, stored in DTYPES.items() if stored == self.dtype)
        facts = {"quant_type": self.kind, "blocksize": self.blocksize, "dtype": dtype, "shape": list(self.shape)}
        if self.nested:
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(facts).encode()

    def rows_together(self, columns: int) -> int:
        return self.blocksize // gcd(self.blocksize, columns)

    def start(self, columns: int) -> Quantizer4bit:
        return Quantizer4bit(self, columns)


class Quantizer4bit(Quantizer):
    """Quantizes one weight to 4 bits."""

    def __init__(self, spec: Spec4bit, columns: int) -> None:
        import torch

        self.spec, self.columns, self.count = spec, columns, prod(spec.shape)
        self.code = torch.tensor(CODES[spec.kind])
        self.order = self.code.argsort()
        self.absmax = torch.empty(-(-self.count // spec.blocksize))
        self.restored = self.absmax  # as a reader restores it, which nesting changes
        self.shares = spec.rounding.read_shares()

    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        import torch

        size, at = self.spec.blocksize, first * self.columns
        scaled, absmax = scale(rows.reshape(-1), size)
        self.absmax[at // size : at // size + len(absmax)] = absmax.cpu()
        unit = scaled if self.spec.rounding.kind == "nearest" else absmax.repeat_interleave(size)[: len(scaled)]
        code, order = self.code[self.order].to(rows.device), self.order.to(rows.device, torch.uint8)
        index = choose_codes(scaled.view_as(rows), unit.view_as(rows), code, self.spec.rounding, at, self.shares)
        nibbles = order.index_select(0, index.reshape(-1))
        if len(nibbles) % 2:
            nibbles = torch.cat([nibbles, self.zero.to(rows.device)])
        return pairs(nibbles)

    @property
    def zero(self) -> torch.Tensor:
        """The code of 0, which pads the last byte."""
        import torch

        return (self.code == 0).nonzero()[:1, 0].to(torch.uint8)

    def finish(self) -> list[bytes]:
        if not self.spec.nested:
            return [_bytes(self.absmax), _bytes(self.code), self.spec.state(0.0)]
        import torch

        offset, code = self.absmax.mean(), dynamic_code()
        scaled, scales = scale(self.absmax - offset, NESTED_BLOCK)
        index = choose_codes(scaled, scaled, code, NEAREST, 0)
        self.restored = code[index] * scales.repeat_interleave(NESTED_BLOCK)[: len(index)] + offset
        state = self.spec.state(float(offset))
        room = len(self.spec.state(0.0)) + OFFSET_DIGITS
        return [_bytes(index.to(torch.uint8)), _bytes(scales), _bytes(code), _bytes(self.code), state.ljust(room)]

    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        begin, end = first * self.columns, last * self.columns
        absmax = self.restored[begin // self.spec.blocksize : -(-end // self.spec.blocksize)].to(packed.device)
        values = dequantize(packed, absmax, pair_table(self.code.to(packed.device)), self.spec.blocksize)
        return values[: end - begin].view(last - first, self.columns)

    def max_magnitude(self) -> float:
        return float(self.restored.abs().max() * self.code.abs().max())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
