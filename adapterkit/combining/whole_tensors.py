"""What adapters hold whole instead of as factors (modules_to_save, trained tokens), when several are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.adapter.weights import LazyTensor, WeightedAdapter
from adapterkit.errors import FitError
from adapterkit.text import counted

RULES = ("error", "first", "average")
Tokens = dict[str, tuple[tuple[int, ...], LazyTensor]]
Shares = tuple[tuple[float, LazyTensor], ...]  # weights and values, whose mean is taken


@dataclass(frozen=True)
class Wholes:
    """Tensors that replace the base's, and trained tokens: of each the values that it is the mean of."""

    replaced: dict[str, Shares]
    tokens: dict[str, tuple[tuple[int, ...], Shares]]

    @property
    def notes(self) -> list[str]:
        """What a person should know where several adapters are combined."""
        whole = [*self.replaced, *self.tokens]
        return [f"{counted(len(whole), 'tensor')} not of low rank, taken whole: {whole[0]} first"] if whole else []

    def read(self) -> tuple[dict[str, LazyTensor], Tokens]:
        """The tensors; where several have a share, their mean."""
        replaced = {name: _mean(shares) for name, shares in self.replaced.items()}
        return replaced, {name: (rows, _mean(shares)) for name, (rows, shares) in self.tokens.items()}


def pick_wholes(given: Sequence[WeightedAdapter], rule: str) -> Wholes:
    """What adapters hold whole, by the rule for what several hold. Raises FitError where that gives no tensor."""
    replaced: dict[str, Shares] = {}
    tokens: dict[str, tuple[tuple[int, ...], Shares]] = {}
    for name in dict.fromkeys(name for one in given for name in one.adapter.replaced):
        values = [(one, one.adapter.replaced[name]) for one in given if name in one.adapter.replaced]
        replaced[name] = _pick(name, values, rule)
    for name in dict.fromkeys(name for one in given for name in one.adapter.tokens):
        holding = [one for one in given if name in one.adapter.tokens]
        rows = holding[0].adapter.tokens[name][0]
        if any(one.adapter.tokens[name][0] != rows for one in holding):
            raise FitError(f"{name}: {', '.join(one.label for one in holding)} trained different tokens of it")
        tokens[name] = rows, _pick(name, [(one, one.adapter.tokens[name][1]) for one in holding], rule)
    return Wholes(replaced, tokens)


def _pick(name: str, values: Sequence[tuple[WeightedAdapter, LazyTensor]], rule: str) -> Shares:
    if len(values) == 1 or rule == "first":
        return ((1.0, values[0][1]),)
    if rule == "error":
        labels = ", ".join(one.label for one, _ in values)
        raise FitError(
            f"{name}: is held whole by {labels}", hint="say which to take: `saved='first'` or `saved='average'`"
        )
    if len({tensor.shape for _, tensor in values}) > 1:
        raise FitError(f"{name}: has different shapes in {', '.join(one.label for one, _ in values)}")
    if not math.fsum(one.weight for one, _ in values):
        raise FitError(f"{name}: the weights of the adapters that hold it add up to zero, which has no average")
    return tuple((one.weight, tensor) for one, tensor in values)


def _mean(shares: Shares) -> LazyTensor:
    if len(shares) == 1:
        return shares[0][1]
    total = math.fsum(weight for weight, _ in shares)
    return LazyTensor.of(
        (torch.stack([weight * tensor.read().double() for weight, tensor in shares]).sum(0) / total).float()
    )
