"""Quantized weights: one file a scheme, found by the tensors they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.errors import FormatError
from adapterkit.quant import bnb4, bnb8, fp8
from adapterkit.quant.packed import Packed, Packing
from adapterkit.tensorfile import FLOAT_DTYPES, TensorInfo

__all__ = ["SCHEMES", "SUPPORTED", "Packed", "Packing", "weights"]

SCHEMES = (bnb4, bnb8, fp8)
SUPPORTED = "bitsandbytes NF4 and FP4, LLM.int8, block-scaled FP8"


def weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo | Packed]:
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
