"""Change one weight of a model in memory, in place and block by block, and record its undo."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from adapterkit.adapter.weights import Adapter, load_weights
from adapterkit.algebra.residual import Residual, record, restore
from adapterkit.algebra.rounding import round_once
from adapterkit.algebra.updates import Update, add_updates, update_for
from adapterkit.base.models.quantized_layers import is_quantized
from adapterkit.base.target import Target
from adapterkit.errors import FitError
from adapterkit.merging.blocks.overflow import check_finite, check_overflow
from adapterkit.merging.live.modules import dense_layer, set_module, shape_of

BLOCK_ELEMENTS = 1 << 22
GPU_FACTOR = 4  # larger blocks on a GPU, where every kernel launch costs some µs

Undo = list[Callable[[], object]]  # run last to first

# --- updates ---------------------------------------------------------------------------------------------------------


def merge_into(model: nn.Module, name: str, updates: list[Update], undo: Undo) -> None:
    """Add `updates` to the weight `name`."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if is_quantized(layer):
        dense = dense_layer(layer)
        undo.append(lambda: set_module(model, path, layer))
        set_module(model, path, dense)
        _add(dense.weight.data, updates, name)
        return
    data = getattr(layer, leaf).data
    if any(update.renormalizes for update in updates):
        _save(model, name, undo)
        _add(data, updates, name)
        return
    matrix = _matrix(data, updates)
    residuals: list[tuple[int, int, Residual]] = []  # by rows

    def subtract() -> None:
        now = _matrix(model.get_parameter(name).data, updates)
        moved = [update.to(now.device) for update in updates]
        for first, last, residual in residuals:
            now[first:last] = restore(now[first:last], first, moved, residual.to(now.device))

    undo.append(subtract)
    add = adder(matrix, updates)
    for first, last in _blocks(matrix):
        before = matrix[first:last].clone()
        try:
            add(first, last)
            check_overflow(before, matrix[first:last], name)
            residuals.append((first, last, record(before, matrix[first:last], first, updates)))
        except BaseException:
            matrix[first:last] = before
            raise


def updates_of(
    adapter: Adapter, targets_by_module: dict[str, tuple[Target, ...]], tensor: str, model: nn.Module, weight: float
) -> list[Update]:
    """The updates of all modules that target `tensor`, on its device."""
    path, _, leaf = tensor.rpartition(".")
    layer = model.get_submodule(path)
    parameter: torch.Tensor = getattr(layer, leaf)
    shape = shape_of(layer, parameter)
    updates = []
    for module, targets in targets_by_module.items():
        for target in (target for target in targets if target.tensor == tensor):
            weights = adapter.modules[module]
            if weights.magnitude is not None and target.transposed:
                raise FitError(f"{module}: DoRA on a weight stored transposed is not supported in a model in memory")
            depth = shape[0] * shape[1] if target.expert is not None and target.rows is not None else shape[0]
            wide = parameter.dtype in (torch.float32, torch.float64) or weights.magnitude is not None
            update = update_for(
                load_weights(weights), weight, target.rows or (0, depth), target.delta_rows, target.expert,
                target.transposed, torch.float64 if wide else torch.float32, where=module,
            )  # fmt: skip
            updates.append(update.to(parameter.device))
    return updates


def adder(matrix: torch.Tensor, updates: list[Update]) -> Callable[[int, int], None]:
    """Return a function that adds `updates` to rows `first:last` of `matrix` in place, rounded once.

    A GPU sums, adds and rounds a 16-bit weight in one pass: within half a unit in the last place plus 2⁻⁹ of one,
    because it rounds a float32 sum. It would round overlapping updates one by one, so those are summed first.
    """

    def add(first: int, last: int) -> None:
        sums = matrix[first:last].to(updates[0].left.dtype, copy=True)
        add_updates(sums, first, updates)
        matrix[first:last] = round_once(sums, matrix.dtype) if sums.dtype is torch.float64 else sums.to(matrix.dtype)

    def add_in_one_pass(first: int, last: int) -> None:
        from adapterkit.kernels.gpu import add_in_place  # imports triton

        for update in updates:
            start, stop = max(first, update.start), min(last, update.stop)
            if start < stop:
                left = update.left[start - update.start : stop - update.start]
                add_in_place(matrix[start:stop], left, update.right, update.strength)

    spans = sorted((update.start, update.stop) for update in updates)
    overlap = any(start < stop for (_, stop), (start, _) in pairwise(spans))
    separate = not overlap and not any(update.renormalizes for update in updates)
    return add_in_one_pass if separate and _has_kernel(matrix) else add


def _has_kernel(matrix: torch.Tensor) -> bool:
    return matrix.is_cuda and matrix.dtype in (torch.bfloat16, torch.float16)


def _add(data: torch.Tensor, updates: list[Update], name: str) -> None:
    matrix = _matrix(data, updates)
    add = adder(matrix, updates)
    for first, last in _blocks(matrix):
        before = matrix[first:last].clone()
        add(first, last)
        check_overflow(before, matrix[first:last], name)


def _matrix(data: torch.Tensor, updates: list[Update]) -> torch.Tensor:
    """`data` as a matrix with the updates' number of columns."""
    if not data.is_contiguous():
        raise FitError(f"weight of shape {tuple(data.shape)} is not contiguous in memory; call `.contiguous()` first")
    return data.view(-1, updates[0].right.shape[1])


def _blocks(matrix: torch.Tensor) -> list[tuple[int, int]]:
    elements = BLOCK_ELEMENTS * (GPU_FACTOR if matrix.is_cuda else 1)
    step = max(1, elements // max(1, matrix.shape[1]))
    return [(first, min(len(matrix), first + step)) for first in range(0, len(matrix), step)]


# --- whole tensors ---------------------------------------------------------------------------------------------------


def add_to_bias(model: nn.Module, name: str, vector: torch.Tensor, scale: float, undo: Undo) -> None:
    data = model.get_parameter(name).data
    _save(model, name, undo)
    before = data.double()
    data.copy_(round_once(before + vector.to(data.device).double() * scale, data.dtype))
    check_overflow(before, data, name)


def replace_values(
    model: nn.Module, name: str, values: torch.Tensor, weight: float, rows: tuple[int, ...] | None, undo: Undo
) -> None:
    """Replace all or some rows by `values`, interpolated by `weight`."""
    data = model.get_parameter(name).data
    at = slice(None) if rows is None else list(rows)
    if data[at].shape != values.shape:
        raise FitError(
            f"{name}: the adapter's tensor has shape {tuple(values.shape)}, the model's {tuple(data[at].shape)}"
        )
    _save(model, name, undo)
    old, new = data[at].double(), values.to(data.device).double()
    check_finite(new, name)
    data[at] = round_once(old + weight * (new - old) if weight != 1.0 else new, data.dtype)
    check_overflow(new if weight == 1.0 else old + new, data[at], name)


def _save(model: nn.Module, name: str, undo: Undo) -> None:
    """Save a copy of a tensor for `undo`."""
    before = model.get_parameter(name).data.clone()
    undo.append(lambda: model.get_parameter(name).data.copy_(before))


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(values: torch.Tensor) -> int:
    """`Σ aᵢ·bⱼ·wᵢⱼ` modulo 2⁶⁴ over 16-bit words, with random odd numbers a by row and b by column.

    Changing one word always changes it; other changes, such as swapped rows or elements, are missed with a probability
    of about 2⁻⁴⁰. It takes one pass, on any device.
    """
    rows = values.contiguous().flatten(1) if values.dim() > 1 else values.reshape(1, -1)
    words = rows.view(torch.int8 if values.element_size() == 1 else torch.int16)
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**62), 2**62, (size,), generator=rng).to(values.device) * 2 + 1 for size in words.shape)
    total = sum(int(((words[i:j] * b).sum(1) * a[i:j]).sum()) for i, j in _blocks(words))
    return total % 2**64
