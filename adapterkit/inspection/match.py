"""Match an adapter's modules to a base, and measure ‖W‖_F of the weights they target, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from adapterkit.adapter.weights import Adapter
from adapterkit.base.adapter_fit import explain_misfit, place_adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.fingerprint import RowsCompared, compare_rows
from adapterkit.base.quant import QuantizedWeight, weights
from adapterkit.base.row_reader import reader
from adapterkit.base.target import Target
from adapterkit.base.targets import Fit
from adapterkit.files.safetensors import TensorInfo

CHUNK_BYTES = 16 << 20  # rows of W in memory at once, as float32


@dataclass(frozen=True, slots=True)
class Match:
    """The number of an adapter's modules found in a base, and the missing ones."""

    base: str
    found: int
    total: int
    missing: tuple[str, ...]
    hint: str  # the nearest names in the base; empty if nothing is missing
    rows: RowsCompared | None = None  # with the base that the adapter was made for, where its fingerprint is known

    def warnings(self) -> list[str]:
        """What does not fit, a line each."""
        other = self.rows.note(self.base) if self.rows else None
        return [*([self.hint] if self.missing else []), *([other] if other else [])]


def match(adapter: Adapter, checkpoint: Checkpoint, name: str) -> tuple[Match, Fit]:
    """Match `adapter` to `checkpoint`, called `name` in the result, from headers only.

    Raises FitError if a name is found but its shape does not match.
    """
    tensors = weights(checkpoint.tensors, checkpoint.config)
    adapter = replace(adapter, orientation=adapter.orientation or "plain")  # matches the same rows either way
    places = place_adapter(adapter, tensors, checkpoint)
    hint = explain_misfit(adapter, places, tensors, checkpoint.config) if places.missing else ""
    total = len(adapter.modules)
    return Match(name, len(places.targets), total, places.missing, hint), places


def with_rows(found: Match, adapter: Adapter, checkpoint: Checkpoint) -> Match:
    """Add the comparison of a few rows of the base with those that `adapter` was made for; reads these rows."""
    rows = compare_rows(adapter.base_fingerprint, checkpoint)
    return replace(found, rows=rows) if rows.compared else found


def base_norms(places: Fit, checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """Yield ‖W‖_F by module, over the rows that its Δ changes, read in row chunks and summed in float64.

    Raises FitError if the base is quantized in an unsupported scheme: the stored numbers are not the weights.
    """
    tensors = weights(checkpoint.tensors, checkpoint.config)
    for module, targets in places.targets.items():
        yield module, math.sqrt(sum(_square(tensors[target.tensor], target) for target in targets))


def _square(info: TensorInfo | QuantizedWeight, target: Target) -> float:
    """‖W[rows]‖_F², with W viewed as a matrix whose rows have its last dimension."""
    width = max(1, info.shape[-1])
    depth = prod(info.shape) // width
    read = reader(info, width)
    first, last = target.rows or (0, depth)
    step = max(1, CHUNK_BYTES // (4 * width))
    total = 0.0
    for start in range(first, last, step):
        rows = read(start, min(last, start + step))
        norms = torch.linalg.vector_norm(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
        total += float(norms.double().square().sum())
    return total
