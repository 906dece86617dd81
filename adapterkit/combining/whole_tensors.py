"""Combine tensors that adapters store whole (modules_to_save, trained tokens)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import LazyTensor
from adapterkit.errors import FitError
from adapterkit.text import counted

RULES = ("error", "first", "average")  # for a tensor that several adapters store
Tokens = dict[str, tuple[tuple[int, ...], LazyTensor]]
Weighted = tuple[tuple[float, LazyTensor], ...]


@dataclass(frozen=True)
class WholeTensors:
    """Tensors that replace the base's, and trained tokens: each the weighted mean of one or several tensors."""

    replaced: dict[str, Weighted]
    tokens: dict[str, tuple[tuple[int, ...], Weighted]]

    @property
    def notes(self) -> list[str]:
        """A note on tensors that combining copies or averages."""
        names = [*self.replaced, *self.tokens]
        return [f"{counted(len(names), 'tensor')} stored whole, not as factors (first: {names[0]})"] if names else []

    def read(self) -> tuple[dict[str, LazyTensor], Tokens]:
        """The tensors, averaged where there are several."""
        replaced = {name: _mean(tensors) for name, tensors in self.replaced.items()}
        return replaced, {name: (rows, _mean(tensors)) for name, (rows, tensors) in self.tokens.items()}


def pick_whole_tensors(adapters: Sequence[WeightedAdapter], rule: str) -> WholeTensors:
    """Pick the whole tensors of the adapters, by one of RULES. Raises FitError if several conflict."""
    replaced: dict[str, Weighted] = {}
    tokens: dict[str, tuple[tuple[int, ...], Weighted]] = {}
    for name in dict.fromkeys(name for one in adapters for name in one.adapter.replaced):
        values = [(one, one.adapter.replaced[name]) for one in adapters if name in one.adapter.replaced]
        replaced[name] = _pick(name, values, rule)
    for name in dict.fromkeys(name for one in adapters for name in one.adapter.tokens):
        having = [one for one in adapters if name in one.adapter.tokens]
        rows = having[0].adapter.tokens[name][0]
        if any(one.adapter.tokens[name][0] != rows for one in having):
            raise FitError(f"{name}: different tokens were trained in {', '.join(one.label for one in having)}")
        tokens[name] = rows, _pick(name, [(one, one.adapter.tokens[name][1]) for one in having], rule)
    return WholeTensors(replaced, tokens)


def _pick(name: str, values: Sequence[tuple[WeightedAdapter, LazyTensor]], rule: str) -> Weighted:
    if len(values) == 1 or rule == "first":
        return ((1.0, values[0][1]),)
    labels = ", ".join(one.label for one, _ in values)
    if rule == "error":
        raise FitError(f"{name}: stored whole in {labels}", hint="choose `saved='first'` or `saved='average'`")
    if len({tensor.shape for _, tensor in values}) > 1:
        raise FitError(f"{name}: has different shapes in {labels}", hint="choose `saved='first'`")
    if not math.fsum(one.weight_of(name) for one, _ in values):
        raise FitError(f"{name}: the weights of {labels} add up to zero, so there is no average")
    return tuple((one.weight_of(name), tensor) for one, tensor in values)


def _mean(weighted: Weighted) -> LazyTensor:
    import torch

    if len(weighted) == 1:
        return weighted[0][1]
    total = math.fsum(weight for weight, _ in weighted)
    return LazyTensor.of(
        (torch.stack([weight * tensor.read().double() for weight, tensor in weighted]).sum(0) / total).float()
    )
