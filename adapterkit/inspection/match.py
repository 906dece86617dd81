"""How an adapter fits a base, and ‖W‖_F of every weight that it targets, read in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from adapterkit.adapter.weights import Adapter
from adapterkit.base.adapter_fit import explain_misfit, place_adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight, weights
from adapterkit.base.row_reader import reader
from adapterkit.base.targets import Fit, Target
from adapterkit.files.safetensors import TensorInfo

CHUNK_BYTES = 16 << 20  # rows of W in memory at once, as float32


@dataclass(frozen=True, slots=True)
class Match:
    """How many modules of an adapter have a place in a base, and why the others have none."""

    base: str
    found: int
    total: int
    missing: tuple[str, ...]
    hint: str  # the nearest names in the base; empty where nothing is missing


def match(adapter: Adapter, checkpoint: Checkpoint, name: str) -> tuple[Match, Fit]:
    """Where `adapter` lands in `checkpoint`, which the user calls `name`, by headers only.

    Raises FitError where a name is found but its shape does not fit.
    """
    tensors = weights(checkpoint.tensors, checkpoint.config)
    places = place_adapter(adapter, tensors, checkpoint)
    hint = explain_misfit(adapter, places, tensors, checkpoint.config) if places.missing else ""
    total = len(adapter.modules)
    return Match(name, len(places.targets), total, places.missing, hint), places


def base_norms(places: Fit, checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """‖W‖_F by module, over the rows that its Δ lands on; a row chunk at a time, squares summed in float64.

    Raises FitError where the base is quantized by an unknown scheme: its stored numbers are not its weights.
    """
    tensors = weights(checkpoint.tensors, checkpoint.config)
    for module, targets in places.targets.items():
        yield module, math.sqrt(sum(_square(tensors[target.tensor], target) for target in targets))


def _square(info: TensorInfo | QuantizedWeight, target: Target) -> float:
    """‖W[rows]‖_F², with W seen as a matrix of rows of its last dimension."""
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
