"""Quantization schemes that are recognized, so that errors can name them, but not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.base.quant.weight import QuantizedWeight

# Last segment of a tensor's name, or its suffix if it starts with an underscore -> scheme; the first match counts.
UNSUPPORTED = {
    "weight_scale_2": "NVFP4",
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "_blocks": "MXFP4",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "_data": "Quanto",
    "weight_scale": "FP8 or INT8 with one scale a tensor or row",
}


def unsupported_scheme(tensors: Mapping[str, Any], declared: str | None) -> str | None:
    """Return the scheme of a base that is quantized in an unsupported way; `declared` is its name in the config."""
    if any(isinstance(weight, QuantizedWeight) for weight in tensors.values()):
        return None
    leaves = {name.rpartition(".")[2] for name in tensors}
    found = (scheme for end, scheme in UNSUPPORTED.items() if any(_ends(leaf, end) for leaf in leaves))
    return declared or next(found, None)


def _ends(leaf: str, end: str) -> bool:
    return leaf.endswith(end) if end.startswith("_") else leaf == end
