"""LLM.int8 weights, as bitsandbytes saves them (arXiv 2208.07339): `W = q · SCB / 127` per row.

Like bitsandbytes, this multiplies `q · SCB` by the float32 nearest 1/127, so that results agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant.bnb_config import quantization_config
from adapterkit.base.quant.rounding import NEAREST, Rounding, choose_codes
from adapterkit.base.quant.scheme import Layer, Scheme, Writer
from adapterkit.base.quant.weight import (
    Codes,
    QuantizationSettings,
    QuantizationSpec,
    QuantizedWeight,
    Quantizer,
    Read,
    Rows,
)
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

NAME = "bitsandbytes LLM.int8"
SCALE, LAYOUT = "SCB", "weight_format"


@dataclass(frozen=True)
class Quantized8bit(QuantizedWeight):
    """An int8 weight `(out, in)` with the largest magnitude of each row `(out,)`."""

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

    def spec(self) -> Spec8bit:
        return Spec8bit(self.shape, self.dtype)

    def open(self, columns: int) -> Rows:
        import torch

        scale, dtype = self.scale.read()[:, None], getattr(torch, TORCH_NAMES[self.dtype])

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            start, stop = self.stored.start + first * columns, self.stored.start + last * columns
            q = read(replace(self.stored, start=start, stop=stop, shape=(last - first, columns)))
            return (q * scale[first:last].to(q.device) * (1 / 127)).to(dtype)

        return rows

    def codes(self, columns: int) -> Codes:
        import torch

        factor = torch.where((scale := self.scale.read()[:, None]) > 0, 127 / scale, 0.0)

        def codes(rows: torch.Tensor, first: int) -> torch.Tensor:
            q = (rows.float() * factor[first : first + len(rows)].to(rows.device)).round_()
            return q.nan_to_num_().clamp_(-128, 127).to(torch.int8).view(-1).view(torch.uint8)

        return codes


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str) -> Iterator[Quantized8bit]:
    """Yield every LLM.int8 weight; raises FormatError if its scale doesn't match or it isn't stored by rows."""
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
        yield Quantized8bit(name, "int8", stored.shape, dtype, stored, scale, layout)


# --- quantizing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec8bit(QuantizationSpec):
    """LLM.int8, quantized from float16 as in bitsandbytes."""

    bits = 8
    source_dtype = "F16"

    shape: tuple[int, ...]
    dtype: str
    rounding: Rounding = NEAREST

    @classmethod
    def of(cls, weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> Spec8bit:
        return cls(weight.shape, weight.dtype, settings.rounding)

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

    def start(self, columns: int) -> Quantizer8bit:
        return Quantizer8bit(self)


class Quantizer8bit(Quantizer):
    """Quantizes one weight to 8 bits."""

    def __init__(self, spec: Spec8bit) -> None:
        import torch

        self.scale, self.rounding = torch.empty(spec.shape[0]), spec.rounding
        self.shares = spec.rounding.read_shares()

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
        index = choose_codes(scaled, unit, code, self.rounding, first * rows.shape[1], self.shares)
        return (index - 127).to(torch.int8).reshape(-1).view(torch.uint8)

    def finish(self) -> list[bytes]:
        return [self.scale.numpy().tobytes(), b"\0"]

    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        import torch

        scale = self.scale[first:last, None].to(packed.device)
        return packed.view(torch.int8).view(last - first, -1) * scale * (1 / 127)

    def max_magnitude(self) -> float:
        return float(self.scale.max())


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` of a model in LLM.int8."""
    return quantization_config(8, "fp4", nested=False, compute_dtype="float32")


# --- in memory -------------------------------------------------------------------------------------------------------


def layer_weight(layer: Any) -> torch.Tensor:
    """Dequantize the weight of a Linear8bitLt."""
    import torch

    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    dtype = layer.bias.dtype if layer.bias is not None else torch.get_default_dtype()
    weight: torch.Tensor = layer.weight.data * scale[:, None] * (1 / 127)
    return weight.to(dtype)


SCHEME = Scheme(
    label="LLM.int8",
    kinds=("int8",),
    suffixes=(f".{SCALE}", f".{LAYOUT}"),
    find=find,
    writer=Writer(Spec8bit, declaration, scales="one scale per row"),
    layer=Layer(
        "bitsandbytes", "Linear8bitLt", lambda layer: getattr(layer.weight, "SCB", None) is not None, layer_weight
    ),
)
