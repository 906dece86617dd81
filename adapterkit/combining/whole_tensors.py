"""What adapters hold whole instead of as factors (modules_to_save, trained tokens), when several are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from adapterkit.adapter.weights import LazyTensor, WeightedAdapter
from adapterkit.errors import FitError
from adapterkit.text import counted

RULES = ("error", "first", "average")
Tokens = dict[str, tuple[tuple[int, ...], LazyTensor]]


def combine_wholes(given: Sequence[WeightedAdapter], rule: str) -> tuple[dict[str, LazyTensor], Tokens, list[str]]:
    """Tensors that replace the base's, and trained tokens, by the rule for those that several adapters hold."""
    replaced: dict[str, LazyTensor] = {}
    tokens: Tokens = {}
    notes = []
    for name in dict.fromkeys(name for one in given for name in one.adapter.replaced):
        values = [(one, one.adapter.replaced[name]) for one in given if name in one.adapter.replaced]
        replaced[name] = _pick(name, values, rule)
    for name in dict.fromkeys(name for one in given for name in one.adapter.tokens):
        holding = [one for one in given if name in one.adapter.tokens]
        rows = holding[0].adapter.tokens[name][0]
        if any(one.adapter.tokens[name][0] != rows for one in holding):
            raise FitError(f"{name}: {', '.join(one.label for one in holding)} trained different tokens of it")
        tokens[name] = rows, _pick(name, [(one, one.adapter.tokens[name][1]) for one in holding], rule)
    if len(given) > 1 and (replaced or tokens):
        whole = [*replaced, *tokens]
        notes.append(f"{counted(len(whole), 'tensor')} not of low rank, taken whole: {whole[0]} first")
    return replaced, tokens, notes


def _pick(name: str, values: Sequence[tuple[WeightedAdapter, LazyTensor]], rule: str) -> LazyTensor:
    if len(values) == 1 or rule == "first":
        return values[0][1]
    if rule == "error":
        labels = ", ".join(one.label for one, _ in values)
        raise FitError(f"{name}: is held whole by {labels}: say with --saved first or --saved average which to take")
    if len({tensor.shape for _, tensor in values}) > 1:
        raise FitError(f"{name}: has different shapes in {', '.join(one.label for one, _ in values)}")
    total = math.fsum(one.weight for one, _ in values)
    if not total:
        raise FitError(f"{name}: the weights of the adapters that hold it add up to zero, which has no average")
    mean = torch.stack([one.weight * tensor.read().double() for one, tensor in values]).sum(0) / total
    return LazyTensor.of(mean.float())
