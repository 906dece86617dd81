"""LLM.int8 weights, as bitsandbytes saves them (arXiv 2208.07339): `W = q · SCB / 127` by row.

bitsandbytes multiplies by the float32 nearest 1/127, after `q · SCB`; so does this, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant.packed import Numbers, QuantizationSpec, QuantizedWeight, Quantizer, Read, Rows, float_dtype
from adapterkit.base.quant.rounding import NEAREST, Rounding, choose
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

NAME = "bitsandbytes LLM.int8"
SCALE, LAYOUT = "SCB", "weight_format"


@dataclass(frozen=True)
class Packed8bit(QuantizedWeight):
    """A weight in signed bytes `(out, in)`, and its rows' greatest magnitudes `(out,)`."""

    scale: TensorInfo
    layout: TensorInfo | None

    @property
    def scheme(self) -> str:
        return NAME

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.stored, self.scale, *((self.layout,) if self.layout else ()))

    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        steps = self.scale.read()[:, None] / 254
        return lambda first, last: steps[first:last].expand(-1, columns)

    def packing(self) -> Packing8bit:
        return Packing8bit(self.shape, self.dtype)

    def open(self, columns: int) -> Rows:
        import torch

        scale, dtype = self.scale.read()[:, None], getattr(torch, TORCH_NAMES[self.dtype])

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            start, stop = self.stored.start + first * columns, self.stored.start + last * columns
            q = read(replace(self.stored, start=start, stop=stop, shape=(last - first, columns)))
            return (q * scale[first:last].to(q.device) * (1 / 127)).to(dtype)

        return rows

    def numbers(self, columns: int) -> Numbers:
        import torch

        factor = torch.where((scale := self.scale.read()[:, None]) > 0, 127 / scale, 0.0)

        def numbers(rows: torch.Tensor, first: int) -> torch.Tensor:
            q = (rows.float() * factor[first : first + len(rows)].to(rows.device)).round_()
            return q.nan_to_num_().clamp_(-128, 127).to(torch.int8).view(-1).view(torch.uint8)

        return numbers


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Packed8bit]:
    """Every LLM.int8 weight. Raises FormatError where its scale does not fit or it is not stored by rows."""
    dtype = float_dtype(config, tensors)
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{module}.{SCALE}")
        if leaf != "weight" or scale is None:
            continue
        matrix = len(stored.shape) == 2 and 0 not in stored.shape
        if stored.dtype != "I8" or not matrix or scale.dtype != "F32" or scale.shape != stored.shape[:1]:
            raise FormatError(
                f"{stored.file}: {name} is {stored.dtype} {stored.shape} and its SCB {scale.dtype} {scale.shape}; "
                "expected I8 (out, in), neither 0, and F32 (out,)"
            )
        layout = tensors.get(f"{module}.{LAYOUT}")
        if layout is not None and (layout.nbytes > 8 or any(layout.read_bytes())):
            raise FormatError(f"{layout.file}: {layout.name}: only LLM.int8 weights stored by rows (0) are supported")
        yield Packed8bit(name, "int8", stored.shape, dtype, stored, scale, layout)


# --- quantizing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing8bit(QuantizationSpec):
    """To LLM.int8. bitsandbytes takes the weight in float16, so that is what is quantized here too."""

    bits = 8
    taken_as = "F16"

    shape: tuple[int, ...]
    dtype: str
    rounding: Rounding = NEAREST

    @property
    def scheme(self) -> str:
        return NAME

    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        module = name.rpartition(".")[0]
        return (
            (name, "I8", self.shape), (f"{module}.{SCALE}", "F32", self.shape[:1]), (f"{module}.{LAYOUT}", "U8", ()),
        )  # fmt: skip

    def rows_together(self, columns: int) -> int:
        return 1

    def start(self, columns: int) -> Packer8bit:
        return Packer8bit(self)


class Packer8bit(Quantizer):
    """One weight on its way to 8 bits."""

    def __init__(self, packing: Packing8bit) -> None:
        import torch

        self.scale, self.rounding = torch.empty(packing.shape[0]), packing.rounding
        self.shares = packing.rounding.read_shares()

    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        import torch

        half = rows.half()
        scale = half.abs().amax(dim=1).float()
        self.scale[first : first + len(rows)] = scale.cpu()
        factor = torch.where(scale > 0, 127.0 / scale, 0.0)
        scaled = half * factor[:, None]
        if self.rounding.kind == "nearest":
            return torch.round(scaled).to(torch.int8).view(-1).view(torch.uint8)
        unit = (scale / 127)[:, None].expand_as(scaled)
        code = torch.arange(-127.0, 128.0, device=rows.device)
        index = choose(scaled, unit, code, self.rounding, first * rows.shape[1], self.shares)
        return (index - 127).to(torch.int8).reshape(-1).view(torch.uint8)

    def finish(self) -> list[bytes]:
        return [self.scale.numpy().tobytes(), b"\0"]

    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        import torch

        scale = self.scale[first:last, None].to(packed.device)
        return packed.view(torch.int8).view(last - first, -1) * scale * (1 / 127)

    def most(self) -> float:
        return float(self.scale.max())
