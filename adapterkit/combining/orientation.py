"""Bring the factors of stacked experts into one orientation, which versions of PEFT store differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.adapter.peft_versions import adds_transposed
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.errors import FitError

if TYPE_CHECKING:
    import torch


def has_stacks(adapter: Adapter) -> bool:
    """Return whether the adapter has factors of stacked experts."""
    return any(weights.experts > 1 for weights in adapter.modules.values())


def aligned(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """Transpose the Δ of stacked experts in adapters that store it unlike the first one that has any.

    Raises FitError if versions of PEFT differ and neither they nor shapes tell.
    """
    first = next((one for one in adapters if has_stacks(one.adapter)), None)
    return [
        replace(one, adapter=_turned(one.adapter, first.adapter.peft_version))
        if first is not None and one is not first and has_stacks(one.adapter) and _differ(first, one)
        else one
        for one in adapters
    ]


def _turned(adapter: Adapter, version: str | None) -> Adapter:
    """Return the adapter with the Δ of stacked experts transposed, as `version` of PEFT stores it."""
    stacks = {name: weights for name, weights in adapter.modules.items() if weights.experts > 1}
    turned = {name: _transposed(weights) for name, weights in stacks.items()}
    return replace(adapter, modules=adapter.modules | turned, peft_version=version)


def _differ(first: WeightedAdapter, one: WeightedAdapter) -> bool:
    """Return whether `one` stores the Δ of experts transposed, compared with `first`."""
    told = set()
    for name, weights in one.adapter.modules.items():
        other, shape = first.adapter.modules.get(name), (weights.out_features, weights.in_features)
        if other is not None and weights.experts > 1 and shape[0] != shape[1]:
            told.add((other.out_features, other.in_features) == shape[::-1])
    if len(told) == 1:
        return told.pop()
    versions = first.adapter.peft_version, one.adapter.peft_version
    if versions[0] == versions[1]:
        return False
    by_mark = {adds_transposed(versions[0], marked) == adds_transposed(versions[1], marked) for marked in (False, True)}
    known = all(adds_transposed(version, marked=False) is not None for version in versions)
    if known and len(by_mark) == 1:
        return not by_mark.pop()
    named = [f"PEFT {version}" if version else "an unknown version of PEFT" for version in versions]
    raise FitError(
        f"{first.label} was written by {named[0]} and {one.label} by {named[1]}, which may store stacked experts "
        "transposed, and shapes do not tell",
        hint="merge both into the base, whose architecture tells",
    )


def _transposed(weights: LoraWeights[LazyTensor]) -> LoraWeights[LazyTensor]:
    """Return factors of the transposed Δ of every expert."""
    A, B, experts = weights.A, weights.B, weights.experts
    as_A, as_B = partial(_as_rows, experts, B.view), partial(_as_columns, experts, A.view)
    return replace(weights, A=replace(B, shape=B.shape[::-1], view=as_A), B=replace(A, shape=A.shape[::-1], view=as_B))


View = Callable[["torch.Tensor"], "torch.Tensor"] | None


def _as_rows(experts: int, view: View, stored: torch.Tensor) -> torch.Tensor:
    """Turn `B (out, rank·experts)` into `A (experts·rank, out)`."""
    B = view(stored) if view else stored
    return B.reshape(len(B), -1, experts).permute(2, 1, 0).reshape(-1, len(B))


def _as_columns(experts: int, view: View, stored: torch.Tensor) -> torch.Tensor:
    """Turn `A (experts·rank, in)` into `B (in, rank·experts)`."""
    A = view(stored) if view else stored
    return A.reshape(experts, -1, A.shape[1]).permute(2, 1, 0).reshape(A.shape[1], -1)
