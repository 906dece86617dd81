"""The order of records: a function of the seed and the step alone, so that a run can resume at any step."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from adapterkit.train.data.tokenize import Example
from adapterkit.train.recipe import Recipe

Row = tuple[Example, ...]  # one record, or several packed together


@dataclass(frozen=True)
class Order:
    """The rows of a dataset, and their order over the steps."""

    rows: tuple[Row, ...]
    per_step: int
    steps: int
    seed: int

    @classmethod
    def of(cls, examples: Sequence[Example], recipe: Recipe) -> Order:
        """The order of `examples` in a run of `recipe`."""
        rows: tuple[Row, ...] = tuple((example,) for example in examples)
        if recipe.packing:
            groups = pack([len(example.ids) for example in examples], recipe.max_length)
            rows = tuple(tuple(examples[index] for index in group) for group in groups)
        per_epoch = -(-len(rows) // recipe.rows_per_step)
        steps = max(1, math.ceil(recipe.epochs * per_epoch - 1e-9))
        return cls(rows, recipe.rows_per_step, min(steps, recipe.max_steps or steps), recipe.seed)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.per_step)

    def step(self, number: int) -> list[Row]:
        """The rows of step `number`, counted from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, len(self.rows))
        return [self.rows[index] for index in order[within * self.per_step : (within + 1) * self.per_step]]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return order


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack sequences into rows of `room` tokens by best fit, longest first; returns the indices in each row."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (free tokens, index) of each row, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(left, (lengths[index], -1))
        if at == len(left):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = left.pop(at)
        rows[row].append(index)
        insort(left, (free - lengths[index], row))
    return rows
