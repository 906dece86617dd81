"""Match an adapter's modules to a base, and measure ‖W‖_F of the weights they target, in bounded memory."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from adapterkit.base.tied_embeddings import find_tie
from adapterkit.base.vocabulary import find_vocabulary
from adapterkit.files.safetensors import TensorInfo, Weight
from adapterkit.inspection.audit import EXPERT
from adapterkit.text import counted

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
    idle_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of the base, by module, without a Δ

    def warnings(self) -> list[str]:
        """What does not fit, a line each."""
        found = [self.hint] if self.missing else []
        if self.rows and (other := self.rows.note(self.base)):
            found.append(other)
        if self.idle_experts:
            count = sum(map(len, self.idle_experts.values()))
            found.append(
                f"{counted(count, 'expert')} of {self.base} without an update, in {next(iter(self.idle_experts))}"
            )
        return found


def match(adapter: Adapter, checkpoint: Checkpoint, name: str) -> tuple[Match, Fit]:
    """Match `adapter` to `checkpoint`, called `name` in the result, from headers only.

    Raises FitError if a name is found but its shape does not match.
    """
    tensors = _model_weights(checkpoint)
    if (vocabulary := find_vocabulary(tensors, checkpoint.config)) is not None:
        tensors = vocabulary.resized(tensors, vocabulary.size_in(adapter, name) or vocabulary.size)
    adapter = replace(adapter, orientation=adapter.orientation or "plain")  # matches the same rows either way
    places = place_adapter(adapter, tensors, checkpoint)
    hint = explain_misfit(adapter, places, tensors, checkpoint.config) if places.missing else ""
    total = len(adapter.modules)
    idle = experts_without_update(places, tensors)
    return Match(name, len(places.targets), total, places.missing, hint, idle_experts=idle), places


def experts_without_update(places: Fit, tensors: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """The base's experts without a Δ, by module, where other experts of that module have one."""
    updated: defaultdict[str, set[int]] = defaultdict(set)
    total: dict[str, set[int]] = {}
    of_tensor = {name: found for name in tensors if (found := EXPERT.fullmatch(name))}
    for target in (target for targets in places.targets.values() for target in targets):
        if found := of_tensor.get(target.tensor):
            updated[_of_all(found)].add(int(found["number"]))
        elif target.expert is not None and target.rows is not None and len(shape := tensors[target.tensor].shape) == 3:
            total[target.tensor] = set(range(shape[0]))
            updated[target.tensor].add(target.rows[0] // shape[1])
    for found in of_tensor.values():
        total.setdefault(_of_all(found), set()).add(int(found["number"]))
    missing = {name: tuple(sorted(total[name] - numbers)) for name, numbers in updated.items()}
    return {name: numbers for name, numbers in missing.items() if numbers}


def _of_all(found: re.Match[str]) -> str:
    return f"{found['experts']}.{found['part']}"


def _model_weights(checkpoint: Checkpoint) -> dict[str, TensorInfo | QuantizedWeight]:
    """A base's weights, with a tied head as the embedding's tensor."""
    tensors, tie = weights(checkpoint.tensors, checkpoint.config), find_tie(checkpoint)
    return tensors | ({tie.head: tensors[tie.embedding]} if tie is not None and tie.implied else {})


def with_rows(found: Match, adapter: Adapter, checkpoint: Checkpoint) -> Match:
    """Add the comparison of a few rows of the base with those that `adapter` was made for; reads these rows."""
    rows = compare_rows(adapter.base_fingerprint, checkpoint)
    return replace(found, rows=rows) if rows.compared else found


def base_norms(places: Fit, checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """Yield ‖W‖_F by module, over the rows that its Δ changes, read in row chunks and summed in float64.

    Raises FitError if the base is quantized in an unsupported scheme: the stored numbers are not the weights.
    """
    tensors = _model_weights(checkpoint)
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
