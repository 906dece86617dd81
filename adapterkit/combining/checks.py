"""Checks on headers before adapters are combined or compared: methods, limits, shapes and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.combining.method import Method
from adapterkit.combining.methods import DEFAULT
from adapterkit.combining.whole_tensors import WholeTensors
from adapterkit.errors import FitError, UsageError

if TYPE_CHECKING:
    from adapterkit.algebra.truncation import Limit


def check_limit(limit: Limit | None) -> None:
    """Raise UsageError for a limit out of range, or more than one limit."""
    if limit is None:
        return
    for name, kind in (("rank", Integral), ("energy", Real), ("error", Real)):
        value = getattr(limit, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UsageError(f"{name} {value!r}: expected a {'whole ' if kind is Integral else ''}number")
    if limit.rank is not None and limit.rank < 1:
        raise UsageError(f"rank {limit.rank}: expected at least 1")
    if limit.energy is not None and not 0 < limit.energy <= 1:
        raise UsageError(f"energy {limit.energy}: expected a number above 0 and at most 1")
    if limit.error is not None and not 0 <= limit.error < 1:
        raise UsageError(f"error {limit.error}: expected a number from 0 to below 1")
    given = [f"`{name}`" for name in ("rank", "energy", "error") if getattr(limit, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")


def check_truncation(method: Method[..., Any], limit: Limit | None) -> None:
    """Raise UsageError for an invalid limit, or for any limit if the method never truncates."""
    if limit is not None and method.truncate == "never":
        raise UsageError(f"{method.name} never truncates", hint=f"use {DEFAULT} to truncate")
    check_limit(limit)


def check_supported(adapters: Sequence[WeightedAdapter], method: Method[..., Any]) -> None:
    """Raise FitError for DoRA modules, and for trained biases if the method does not support them."""
    for one in adapters:
        modules = one.adapter.modules
        dora = [name for name, weights in modules.items() if weights.magnitude is not None]
        if dora:
            raise FitError(
                f"{one.label}: {dora[0]} is DoRA, so its Δ depends on the base",
                hint="convert the adapter to LoRA first",
            )
        if not method.biases and any(weights.bias is not None for weights in modules.values()):
            raise FitError(
                f"{one.label}: {method.name} does not support trained biases (lora_bias)",
                hint=f"use {DEFAULT}, which adds them",
            )


def check_fit(adapters: Sequence[WeightedAdapter], modules: Mapping[str, None]) -> None:
    """Raise FitError if an adapter shares no module with the others, or if shapes differ in a shared module."""
    for one in adapters:
        own, others = one.adapter.modules, [other.adapter.modules for other in adapters if other is not one]
        if others and own and not any(name in other for other in others for name in own):
            here, there = next(iter(own)), next((name for other in others for name in other), "none")
            raise FitError(f"{one.label}: shares no module with the other adapters ({here} here, {there} there)")
    for name in modules:
        (first, expected), *rest = [(one, one.adapter.modules[name]) for one in adapters if name in one.adapter.modules]
        for other, found in rest:
            for what, ours, theirs in zip(Layout._fields, layout_of(expected), layout_of(found), strict=True):
                if ours != theirs:
                    raise FitError(
                        f"{name}: the {what} of Δ is {ours} in {first.label} and {theirs} in {other.label}",
                        hint="combine adapters of the same base",
                    )


def check_whole(adapters: Sequence[WeightedAdapter], whole: WholeTensors) -> None:
    """Raise FitError if an adapter's update of a weight has another shape than the weight that one of them stores."""
    for one in adapters:
        for module, weights in one.adapter.modules.items():
            shape = layout_of(weights).shape
            stored = {tensor.shape for _, tensor in whole.replaced.get(f"{module}.weight", ())}
            if stored - {shape, shape[::-1]}:
                raise FitError(
                    f"{module}: Δ is {shape} in {one.label}, but the weight is stored whole as {stored.pop()}",
                    hint="combine adapters of models with the same tokens",
                )


class Layout(NamedTuple):
    """The properties of Δ that must be equal in adapters that are combined."""

    shape: tuple[int, ...]
    kind: str
    experts: int


def layout_of(weights: LoraWeights[LazyTensor]) -> Layout:
    shape = (weights.out_features, *weights.A.shape[1:])
    return Layout(shape, weights.kind, weights.experts)


def check_rank(adapters: Sequence[WeightedAdapter], modules: Mapping[str, None], rank: int, pad: bool) -> None:
    """Raise UsageError if `rank` exceeds the total rank of the adapters; with `pad`, FitError if Δ is too small."""
    if pad:
        for name in modules:
            weights = next(one.adapter.modules[name] for one in adapters if name in one.adapter.modules)
            most = min(weights.in_features, weights.out_features)
            if rank > most:
                shape = f"{weights.out_features} × {weights.in_features}"
                raise FitError(f"{name}: rank {rank} exceeds {most}, the maximum for Δ of {shape}")
        return
    ranks = (sum(o.adapter.modules[name].rank for o in adapters if name in o.adapter.modules) for name in modules)
    most = max(ranks, default=0)
    if rank > most:
        raise UsageError(
            f"rank {rank}: exceeds {most}, the total rank of the adapters", hint="use resize to pad a rank"
        )
