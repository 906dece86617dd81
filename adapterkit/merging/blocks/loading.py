"""The data that all blocks of an edit share in memory: its factors, and the scales of quantized weights."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from adapterkit.adapter.weights import LazyTensor, LoraWeights, load_weights
from adapterkit.algebra.updates import Update, measure_columns, update_for
from adapterkit.base.quant.weight import Codes, QuantizedWeight, Quantizer, Rows
from adapterkit.files.safetensors import TensorInfo
from adapterkit.merging.blocks.as_trained import trained_rows
from adapterkit.merging.blocks.device import CPU, ComputeDevice
from adapterkit.merging.blocks.overflow import check_finite
from adapterkit.merging.blocks.reading import base_chunks, compute_dtype
from adapterkit.merging.plan.edits import STACK_BYTES, MergeEdit, ModuleUpdate, RestoreEdit

E = TypeVar("E", MergeEdit, RestoreEdit)


@dataclass(frozen=True)
class Loaded(Generic[E]):
    """An edit, the open file `fd` of its input, and its updates on the device of `place`.

    `codes` packs rows of a weight that is quantized in the base.
    """

    edit: E
    fd: int
    place: ComputeDevice
    updates: list[Update]
    codes: Codes | None = None
    added: tuple[torch.Tensor, ...] = ()  # to a bias
    packed: Rows | None = None  # if the base is quantized, or was for training
    packer: Quantizer | None = None  # if the output is quantized
    checked_against: Dequantized | None = None

    def at(self, place: ComputeDevice) -> Loaded[E]:
        """Move it to another device."""
        updates = [update.to(place.device) for update in self.updates]
        added = tuple(vector.to(place.device) for vector in self.added)
        return replace(self, place=place, updates=updates, added=added)


@dataclass(frozen=True)
class Dequantized:
    """The rows of a quantized weight, and their largest distance from the weights that it was quantized from."""

    rows: Rows
    slack: Callable[[int, int], torch.Tensor]


class FactorReader:
    """Reads factors, those of stacked experts once for all tensors of the experts, which are neighbours in a file."""

    def __init__(self) -> None:
        self._stacks: OrderedDict[int, tuple[LazyTensor, LoraWeights[torch.Tensor]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, weights: LoraWeights[LazyTensor]) -> LoraWeights[torch.Tensor]:
        """Read the factors of one module; of a stack, from memory if they are among the last STACK_BYTES read."""
        if weights.experts == 1:
            return load_weights(weights)
        key = id(weights.A)  # of an object that the entry keeps alive
        with self._lock:
            if key in self._stacks:
                self._stacks.move_to_end(key)
                return replace(self._stacks[key][1], scaling=weights.scaling)
        loaded = load_weights(weights)
        with self._lock:
            self._stacks[key] = weights.A, loaded
            while len(self._stacks) > 1 and sum(map(_size, self._stacks.values())) > STACK_BYTES:
                self._stacks.popitem(last=False)
        return loaded


def _size(entry: tuple[LazyTensor, LoraWeights[torch.Tensor]]) -> int:
    return entry[1].A.nbytes + entry[1].B.nbytes


def load(edit: MergeEdit | RestoreEdit, fd: int, factors: FactorReader) -> Loaded[Any]:
    """Read the factors of `edit`. Raises FitError if one is not finite."""
    return load_restore(edit, fd, factors) if isinstance(edit, RestoreEdit) else load_merge(edit, fd, factors)


def load_merge(edit: MergeEdit, fd: int, factors: FactorReader | None = None) -> Loaded[MergeEdit]:
    """Read the factors of a merge, the biases, and the scales of quantized weights."""
    factors = factors or FactorReader()
    columns, dtype = edit.matrix[1], compute_dtype(edit)
    packed = edit.source.open(columns) if isinstance(edit.source, QuantizedWeight) else None
    if edit.as_trained is not None and isinstance(edit.source, TensorInfo):
        packed = trained_rows(edit.source, edit.matrix, edit.as_trained)
    updates: list[Update] = []
    for delta in edit.deltas:
        update = _update(edit, delta, factors)
        if update.magnitude is not None and delta.target.transposed:
            update = measure_columns(update, lambda: base_chunks(edit, packed, fd))
        updates.append(update)
    added = []
    for addition in edit.added:
        vector = addition.vector.read().to(dtype) * addition.scale
        check_finite(vector, edit.name)
        added.append(vector[:, None])
    packer = edit.packing.start(columns) if edit.packing else None
    quantized = edit.checked_against
    checked_against = Dequantized(quantized.open(columns), quantized.slack(columns)) if quantized else None
    codes = edit.source.codes(columns) if isinstance(edit.source, QuantizedWeight) and not edit.packing else None
    return Loaded(edit, fd, CPU, updates, codes, tuple(added), packed, packer, checked_against)


def load_restore(edit: RestoreEdit, fd: int, factors: FactorReader) -> Loaded[RestoreEdit]:
    """Read the factors of a restored tensor, and the gains by column that its receipt recorded."""
    by_column = next((block.gains for block in edit.recorded if block.gains is not None), None)
    updates: list[Update] = []
    for delta in edit.deltas:
        update = _update(edit, delta, factors)
        if update.magnitude is not None and delta.target.transposed and by_column is not None:  # None: no block uses it
            index = sum(earlier.renormalizes for earlier in updates)
            update = replace(update, gain=by_column.read()[index][None])
        updates.append(update)
    codes = edit.quantized.codes(edit.matrix[1]) if edit.quantized else None
    return Loaded(edit, fd, CPU, updates, codes)


def _update(edit: MergeEdit | RestoreEdit, delta: ModuleUpdate, factors: FactorReader) -> Update:
    target = delta.target
    return update_for(
        factors.read(delta.weights), delta.weight, target.rows or (0, edit.matrix[0]), target.delta_rows, target.expert,
        target.transposed, compute_dtype(edit), where=delta.module,
    )  # fmt: skip
