"""A test-only scheme in one module: 8 bits, `w = low + code · step` per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapterkit.base.quant.rounding import NEAREST, Rounding, choose_codes
from adapterkit.base.quant.scheme import Scheme, Writer
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

LOW, STEP = ".toy_low", ".toy_step"
LEVELS = 255


@dataclass(frozen=True)
class ToyWeight(QuantizedWeight):
    low: TensorInfo
    step: TensorInfo
    scheme = "toy, affine by row"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.stored, self.low, self.step)

    def open(self, columns: int) -> Rows:
        low, step = self.low.read()[:, None], self.step.read()[:, None]

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            start = self.stored.start + first * columns
            span = replace(
                self.stored, start=start, stop=start + (last - first) * columns, shape=(last - first, columns)
            )
            return (low[first:last] + read(span) * step[first:last]).to(getattr(torch, TORCH_NAMES[self.dtype]))

        return rows

    def codes(self, columns: int) -> Codes:
        low, step = self.low.read()[:, None], self.step.read()[:, None]

        def codes(rows: torch.Tensor, first: int) -> torch.Tensor:
            span = slice(first, first + len(rows))
            found = torch.where(step[span] > 0, (rows.float() - low[span]) / step[span], 0.0)
            return found.round_().nan_to_num_().clamp_(0, LEVELS).to(torch.uint8).view(-1)

        return codes

    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        half = self.step.read()[:, None] / 2
        return lambda first, last: half[first:last].expand(-1, columns)

    def spec(self) -> ToySpec:
        return ToySpec(self.shape, self.dtype)


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str) -> Iterator[ToyWeight]:
    for name, low in tensors.items():
        if name.endswith(LOW):
            weight = name.removesuffix(LOW)
            stored, step = tensors.get(weight), tensors.get(weight + STEP)
            if stored is None or step is None or stored.dtype != "U8" or low.shape != step.shape != stored.shape[:1]:
                raise FormatError(f"{low.file}: {weight} is not whole")
            yield ToyWeight(weight, "toy", stored.shape, dtype, stored, low, step)


@dataclass(frozen=True)
class ToySpec(QuantizationSpec):
    shape: tuple[int, ...]
    dtype: str
    rounding: Rounding = NEAREST
    bits = 8
    scheme = "toy, affine by row"

    @classmethod
    def of(cls, weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> ToySpec:
        return cls(weight.shape, weight.dtype, settings.rounding)

    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        rows = self.shape[:1]
        return (name, "U8", self.shape), (name + LOW, "F32", rows), (name + STEP, "F32", rows)

    def rows_together(self, columns: int) -> int:
        return 1

    def start(self, columns: int) -> ToyQuantizer:
        return ToyQuantizer(self)


class ToyQuantizer(Quantizer):
    def __init__(self, spec: ToySpec) -> None:
        self.low, self.step, self.rounding = torch.zeros(spec.shape[0]), torch.zeros(spec.shape[0]), spec.rounding

    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = (high - low) / LEVELS
        self.low[first : first + len(rows)], self.step[first : first + len(rows)] = low[:, 0], step[:, 0]
        scaled = torch.where(step > 0, (rows - low) / step, 0.0)
        code = torch.arange(LEVELS + 1.0)
        index = choose_codes(scaled, step.expand_as(rows), code, self.rounding, first * rows.shape[1])
        return index.to(torch.uint8).view(-1)

    def finish(self) -> list[bytes]:
        return [self.low.numpy().tobytes(), self.step.numpy().tobytes()]

    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return self.low[first:last, None] + packed.view(last - first, -1) * self.step[first:last, None]

    def max_magnitude(self) -> float:
        return float(torch.maximum(self.low.abs(), (self.low + LEVELS * self.step).abs()).max())


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    return {"quant_method": "toy", "levels": LEVELS + 1}


SCHEME = Scheme(
    label="the toy's 8 bits",
    kinds=("toy",),
    suffixes=(LOW, STEP),
    find=find,
    writer=Writer(ToySpec, declaration, scales="a low and a step a row"),
)
