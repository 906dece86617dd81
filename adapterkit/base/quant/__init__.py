"""Quantized weights: one file a scheme, found by the tensors they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.base.quant import bnb4, bnb8, fp8
from adapterkit.base.quant.packed import QuantizationSpec, QuantizedWeight
from adapterkit.base.quant.rounding import NEAREST, ROUNDINGS, Rounding
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, TensorInfo

__all__ = [
    "BLOCKSIZES",
    "KINDS",
    "ROUNDINGS",
    "SCHEMES",
    "SUPPORTED",
    "QuantizationSpec",
    "Quantize",
    "QuantizedWeight",
    "Rounding",
    "weights",
]

SCHEMES = (bnb4, bnb8, fp8)
SUPPORTED = "bitsandbytes NF4 and FP4, LLM.int8, block-scaled FP8"


def weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo | QuantizedWeight]:
    """The weights as the model has them: those stored quantized by their real shape, and without their parts.

    Raises FormatError where one is broken, or where only some can be read.
    """
    packed = {one.name: one for scheme in SCHEMES for one in scheme.find(tensors, config)}
    parts = {part.name for one in packed.values() for part in one.parts}
    found = {name: packed.get(name, info) for name, info in tensors.items() if name in packed or name not in parts}
    for name, info in found.items():
        if packed and name.endswith("weight") and info.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} and has no scale, while other weights are quantized as "
                f"{next(iter(packed.values())).scheme}"
            )
    return found


KINDS = (*bnb4.KINDS, "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for


@dataclass(frozen=True, slots=True)
class Quantize:
    """What weights are to be quantized to: a kind of `KINDS`, and for 4 bits the blocks, and whether scales nest."""

    kind: str
    blocksize: int = 64
    nested: bool = False
    rounding: Rounding = NEAREST

    def packing(self, weight: TensorInfo | QuantizedWeight) -> QuantizationSpec:
        """How to quantize `weight`; one that is stored by the same kind keeps its block size and nesting."""
        if isinstance(weight, QuantizedWeight) and weight.kind == self.kind and (own := weight.packing()):
            return replace(own, rounding=self.rounding.of(weight.name))  # type: ignore[type-var]
        rounding = self.rounding.of(weight.name)
        if self.kind == "int8":
            return bnb8.Packing8bit(weight.shape, weight.dtype, rounding)
        dtype = weight.dtype if weight.dtype in bnb4.DTYPES.values() else "F32"  # no name for F64
        return bnb4.Packing4bit(weight.shape, dtype, self.kind, self.blocksize, self.nested, rounding=rounding)

    def declaration(self, dtype: str) -> dict[str, Any]:
        """The `quantization_config` by which transformers loads them; `dtype` is what they dequantize to."""
        four = self.kind != "int8"
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four,
            "_load_in_8bit": not four, "bnb_4bit_compute_dtype": TORCH_NAMES[dtype] if four else "float32",
            "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": self.kind if four else "fp4",
            "bnb_4bit_use_double_quant": self.nested and four, "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
        }  # fmt: skip
