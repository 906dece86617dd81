"""The weights of a base checkpoint by scheme or dtype, and how merge treats them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight, supported_schemes, weights
from adapterkit.base.quant.unsupported import unsupported_scheme
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True, slots=True)
class StoredAs:
    """The weights in one scheme or dtype: count, elements, and bytes on disk including scales."""

    scheme: str
    weights: int
    parameters: int
    bytes: int
    merge: str  # how merge treats them


def inventory(checkpoint: Checkpoint) -> list[StoredAs]:
    """Group the tensors of `checkpoint` by scheme or dtype, largest first, from headers only.

    Raises FormatError for an invalid quantized weight.
    """
    groups: dict[tuple[str, str], list[TensorInfo | QuantizedWeight]] = defaultdict(list)
    for weight in weights(checkpoint.tensors, checkpoint.config).values():
        if isinstance(weight, QuantizedWeight):
            groups[weight.scheme, f"dequantized to {weight.dtype}"].append(weight)
        else:
            # Other dtypes, such as packed weights of an unknown scheme, can only be copied.
            groups[weight.dtype, "directly" if weight.dtype in FLOAT_DTYPES else "copied only"].append(weight)
    rows = [
        StoredAs(
            scheme,
            len(found),
            sum(prod(weight.shape) for weight in found),
            sum(_bytes(weight) for weight in found),
            merge,
        )
        for (scheme, merge), found in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def unsupported(checkpoint: Checkpoint, rows: list[StoredAs]) -> str | None:
    """The message for a base that is quantized in an unsupported scheme, or None."""
    scheme = unsupported_scheme(checkpoint.tensors, checkpoint.quantization)
    if scheme is None or any(row.merge.startswith("dequantized") for row in rows):
        return None
    return f"quantized ({scheme}): merge can change only the unquantized weights; supported: {supported_schemes()}"


def _bytes(weight: TensorInfo | QuantizedWeight) -> int:
    return sum(part.nbytes for part in weight.parts) if isinstance(weight, QuantizedWeight) else weight.nbytes
