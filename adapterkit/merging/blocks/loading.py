"""What the blocks of one edit share in memory: its factors, and the scales of quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from adapterkit.adapter.weights import load_weights
from adapterkit.algebra.updates import Update, measure_columns, update_for
from adapterkit.base.quant.weight import Codes, QuantizedWeight, Quantizer, Rows
from adapterkit.merging.blocks.device import CPU, ComputeDevice
from adapterkit.merging.blocks.overflow import check_finite
from adapterkit.merging.blocks.reading import base_chunks, compute_dtype
from adapterkit.merging.plan.edits import MergeEdit, ModuleUpdate, RestoreEdit

E = TypeVar("E", MergeEdit, RestoreEdit)


@dataclass(frozen=True)
class Loaded(Generic[E]):
    """An edit, the open file `fd` that it reads, and its updates at the place where they are computed.

    `codes` tells how rows of a weight are stored that is, or becomes, quantized in the base.
    """

    edit: E
    fd: int
    place: ComputeDevice
    updates: list[Update]
    codes: Codes | None = None
    added: tuple[torch.Tensor, ...] = ()  # to a bias
    packed: Rows | None = None  # where the base is quantized
    packer: Quantizer | None = None  # where the output is
    checked_against: DequantizedTwin | None = None

    def at(self, place: ComputeDevice) -> Loaded[E]:
        """The same at another place."""
        updates = [update.to(place.device) for update in self.updates]
        added = tuple(vector.to(place.device) for vector in self.added)
        return replace(self, place=place, updates=updates, added=added)


@dataclass(frozen=True)
class DequantizedTwin:
    """What was quantized from the source, and how far it may be from that."""

    rows: Rows
    slack: Callable[[int, int], torch.Tensor]


def load(edit: MergeEdit | RestoreEdit, fd: int) -> Loaded[Any]:
    """Read the factors of `edit`; raises FitError where one is not finite."""
    return load_restore(edit, fd) if isinstance(edit, RestoreEdit) else load_merge(edit, fd)


def load_merge(edit: MergeEdit, fd: int) -> Loaded[MergeEdit]:
    """The same of a merge, with what quantized weights and a bias need."""
    columns, dtype = edit.matrix[1], compute_dtype(edit)
    packed = edit.source.open(columns) if isinstance(edit.source, QuantizedWeight) else None
    updates: list[Update] = []
    for delta in edit.deltas:
        update = _update(edit, delta)
        if update.magnitude is not None and delta.target.transposed:
            update = measure_columns(update, lambda: base_chunks(edit, packed, fd))
        updates.append(update)
    added = []
    for addition in edit.added:
        vector = addition.vector.read().to(dtype) * addition.scale
        check_finite(vector, edit.name)
        added.append(vector[:, None])
    packer = edit.packing.start(columns) if edit.packing else None
    twin = edit.checked_against
    other = DequantizedTwin(twin.open(columns), twin.slack(columns)) if twin else None
    codes = edit.source.codes(columns) if isinstance(edit.source, QuantizedWeight) and not edit.packing else None
    return Loaded(edit, fd, CPU, updates, codes, tuple(added), packed, packer, other)


def load_restore(edit: RestoreEdit, fd: int) -> Loaded[RestoreEdit]:
    """The same of what is restored, with the gains that a receipt recorded."""
    by_column = next((block.gains for block in edit.recorded if block.gains is not None), None)
    updates: list[Update] = []
    for delta in edit.deltas:
        update = _update(edit, delta)
        if update.magnitude is not None and delta.target.transposed and by_column is not None:  # else no block needs it
            before = sum(one.renormalizes for one in updates)
            update = replace(update, gain=by_column.read()[before][None])
        updates.append(update)
    codes = edit.quantized.codes(edit.matrix[1]) if edit.quantized else None
    return Loaded(edit, fd, CPU, updates, codes)


def _update(edit: MergeEdit | RestoreEdit, delta: ModuleUpdate) -> Update:
    target = delta.target
    return update_for(
        load_weights(delta.weights), delta.weight, target.rows or (0, edit.matrix[0]), target.delta_rows, target.expert,
        target.transposed, compute_dtype(edit), where=delta.module,
    )  # fmt: skip
