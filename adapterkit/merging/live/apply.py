"""Merge adapters into a model in memory, in place, and remove them again bit for bit.

A residual, a few percent of the weights' size, undoes plain updates of 16- and 32-bit weights. Other changes (DoRA,
biases, replaced tensors) save a copy. A layer in 4 or 8 bits is replaced by a dense one, because quantizing the sum
again would erase the update; removing the adapter puts the quantized layer back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import nn

from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.adapter.weights import Adapter
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.targets import Fit, fit
from adapterkit.errors import FitError, UsageError
from adapterkit.merging.blocks.device import exact_products
from adapterkit.merging.live.modules import config_of, is_nf4, parameters_of, separate_head, untie, with_separate_head
from adapterkit.merging.live.weights import Undo, add_to_bias, fingerprint, merge_into, replace_values, updates_of
from adapterkit.text import counted

APPLIED = "_adapterkit_applied"  # the attribute of a model that lists its adapters, oldest first


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A tensor's dtype, shape and fingerprint after an adapter was applied."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fingerprint: int


@dataclass
class AppliedAdapter:
    """An adapter in a model, the steps that undo it, run last to first, and the tensors that it changed."""

    adapter: Adapter
    undo: Undo = field(default_factory=list)
    after: dict[str, _Snapshot] = field(default_factory=dict)


@torch.no_grad()
@exact_products()
def apply(model: nn.Module, adapter: Adapter, weight: float = 1.0) -> None:
    """Merge `weight · adapter` into `model`, in place: `W + weight · scaling · B·A`, rounded once.

    Args:
        model: a model in memory, on any device.
        adapter: the adapter, from `adapterkit.load`.
        weight: its weight.

    Raises:
        UsageError: if the adapter is already in the model, or an argument is invalid.
        FitError: if a part of the adapter matches nothing in the model or has another shape; the model is unchanged.
    """
    if not isinstance(model, nn.Module) or not isinstance(adapter, Adapter):
        types = f"{type(model).__name__} and {type(adapter).__name__}"
        raise UsageError(f"apply: expected a torch.nn.Module and an Adapter (see adapterkit.load), found {types}")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not isfinite(weight):
        raise UsageError(f"weight {weight!r}: expected a finite number")
    earlier: list[AppliedAdapter] = getattr(model, APPLIED, [])
    if any(applied.adapter is adapter for applied in earlier):
        raise UsageError("this adapter is already in the model: remove it before applying it again")
    settled = adapter.given("quantized base") if is_nf4(model) else adapter
    check_mergeable(WeightedAdapter(settled))
    parameters, config = parameters_of(model), config_of(model)
    found = fit(adapter, parameters, config)
    if found.missing:
        names = explain_missing(found.missing, parameters)
        raise FitError(f"{counted(len(found.missing), 'module')} not found in the model: {names}")
    applied = AppliedAdapter(adapter)
    try:
        _apply(model, applied, weight, found, config)
    except BaseException:
        _run_undo(applied)
        raise
    setattr(model, APPLIED, [*earlier, applied])


def _apply(model: nn.Module, applied: AppliedAdapter, weight: float, found: Fit, config: dict[str, Any]) -> None:
    """Change every tensor, and record how to undo it."""
    adapter, undo = applied.adapter, applied.undo
    saved = list(found.replaced.items())
    if adapter.ensure_weight_tying:
        saved += [
            (name, head)
            for name, tensor in saved
            if name in adapter.new_tensors and (head := separate_head(model, config, tensor, found)) is not None
        ]
        found = with_separate_head(model, config, adapter, found)
    targeted = dict.fromkeys(target.tensor for targets in found.targets.values() for target in targets)
    tokens = [(tensor, *adapter.tokens[module]) for module, tensor in found.tokens.items()]
    tokens += [
        (head, rows, values)
        for tensor, rows, values in tokens
        if (head := separate_head(model, config, tensor, found)) is not None
    ]
    untie(model, adapter, found, undo)
    for name, tensor in saved:
        replace_values(model, tensor, adapter.replaced[name].read(), weight, None, undo)
    for tensor, rows, values in tokens:
        replace_values(model, tensor, values.read(), weight, rows, undo)
    for tensor in targeted:
        merge_into(model, tensor, updates_of(adapter, found.targets, tensor, model, weight), undo)
    for module, bias in found.biases.items():
        weights = adapter.modules[module]
        assert weights.bias is not None
        add_to_bias(model, bias, weights.bias.read(), weight * weights.scaling, undo)
    others = (*(tensor for _, tensor in saved), *(tensor for tensor, *_ in tokens), *found.biases.values())
    changed = dict.fromkeys((*targeted, *others))
    applied.after = {name: _snapshot(model.get_parameter(name).data) for name in changed}


@torch.no_grad()
@exact_products()
def remove(model: nn.Module, adapter: Adapter) -> None:
    """Remove `adapter` from `model`, restoring every bit of its weights before `apply`.

    The model may have moved to another device meanwhile.

    Args:
        model: the model that `apply` changed.
        adapter: the adapter that was applied last.

    Raises:
        UsageError: if it is not in the model, another was applied after it, or a weight has changed since.
    """
    earlier: list[AppliedAdapter] = getattr(model, APPLIED, [])
    if not any(applied.adapter is adapter for applied in earlier):
        raise UsageError("this adapter is not in the model")
    if earlier[-1].adapter is not adapter:
        raise UsageError("another adapter was applied after this one: remove that first")
    for name, snapshot in earlier[-1].after.items():
        _check_unchanged(model, name, snapshot)
    _run_undo(earlier.pop())


def _run_undo(applied: AppliedAdapter) -> None:
    while applied.undo:
        applied.undo.pop()()


def _snapshot(tensor: torch.Tensor) -> _Snapshot:
    return _Snapshot(tensor.dtype, tuple(tensor.shape), fingerprint(tensor))


def _check_unchanged(model: nn.Module, name: str, then: _Snapshot) -> None:
    """Raise UsageError if a bit of the weight has changed; another device is fine."""
    try:
        now = model.get_parameter(name).data
    except AttributeError as error:
        raise UsageError(f"{name}: no longer in the model, so the adapter cannot be removed") from error
    if (now.dtype, tuple(now.shape)) != (then.dtype, then.shape):
        raise UsageError(
            f"{name}: is {now.dtype} {tuple(now.shape)}, was {then.dtype} {then.shape} when the adapter was applied"
        )
    if fingerprint(now) != then.fingerprint:
        raise UsageError(f"{name}: has changed since the adapter was applied, so its bits cannot be restored")
