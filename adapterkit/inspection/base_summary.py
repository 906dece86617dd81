"""What a base checkpoint stores: how many weights, by which scheme or dtype, and what merging does with them."""

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
    """The weights stored in one way: their number, elements and bytes on disk, scales included."""

    scheme: str
    weights: int
    parameters: int
    bytes: int
    merge: str  # what merge does with one


def inventory(checkpoint: Checkpoint) -> list[StoredAs]:
    """How the tensors of `checkpoint` are stored, the largest share first, by headers only.

    Raises FormatError where a quantized weight is broken.
    """
    groups: dict[tuple[str, str], list[TensorInfo | QuantizedWeight]] = defaultdict(list)
    for weight in weights(checkpoint.tensors, checkpoint.config).values():
        if isinstance(weight, QuantizedWeight):
            groups[weight.scheme, f"dequantized to {weight.dtype}"].append(weight)
        else:
            # What is no number of its own, such as a packed weight of an unknown scheme, can only be copied.
            groups[weight.dtype, "as it is" if weight.dtype in FLOAT_DTYPES else "copied only"].append(weight)
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
    """What to say where the base is quantized by a scheme that no weight was read by."""
    scheme = unsupported_scheme(checkpoint.tensors, checkpoint.quantization)
    if scheme is None or any(row.merge.startswith("dequantized") for row in rows):
        return None
    return f"quantized ({scheme}): merge reaches only what is not; it can dequantize {supported_schemes()}"


def _bytes(weight: TensorInfo | QuantizedWeight) -> int:
    return sum(part.nbytes for part in weight.parts) if isinstance(weight, QuantizedWeight) else weight.nbytes
