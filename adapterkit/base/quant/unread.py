"""Quantized layouts that are not read yet: what gives them away, so that an error can name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.base.quant.weight import QuantizedWeight

# The last part of a tensor's name in each, or its end; the first that a base has decides.
LAYOUTS = {
    "weight_scale_2": "NVFP4",
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "_blocks": "MXFP4",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "_data": "Quanto",
    "weight_scale": "FP8 or INT8 with one scale a tensor or row",
}


def unread_scheme(tensors: Mapping[str, Any], declared: str | None) -> str | None:
    """The scheme of a quantized base of which no weight is read; `declared` is what its config calls it."""
    if any(isinstance(weight, QuantizedWeight) for weight in tensors.values()):
        return None
    leaves = {name.rpartition(".")[2] for name in tensors}
    found = (scheme for end, scheme in LAYOUTS.items() if any(_ends(leaf, end) for leaf in leaves))
    return declared or next(found, None)


def _ends(leaf: str, end: str) -> bool:
    return leaf.endswith(end) if end.startswith("_") else leaf == end
