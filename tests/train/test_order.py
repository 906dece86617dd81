"""The order and packing of records: worked by hand, and invariants for any lengths."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.train.data import order as batches
from adapterkit.train.data.order import Order, pack
from adapterkit.train.data.tokenize import Example
from adapterkit.train.recipe import Recipe


def examples(count: int, length: int = 3) -> list[Example]:
    return [Example(np.full(length, at, np.int32), np.ones(length, np.bool_), f"r:{at}") for at in range(count)]


def order(count: int, **recipe: Any) -> Order:
    return Order.of(examples(count), Recipe(**{"batch_size": 2, "grad_accum": 2} | recipe))


def wheres(order: Order, steps: range) -> list[list[int]]:
    """Return the numbers of the records of each step."""
    return [[int(one.where[2:]) for row in order.step(step) for one in row] for step in steps]


# --- packing ---------------------------------------------------------------------------------------------------------


def test_a_worked_packing() -> None:
    # best fit decreasing: 7 | 5 | 5 4 would not fill, so 6 4 | 5 5 | 7 3
    rows = pack([5, 3, 6, 4, 7, 5], 10)
    assert sorted(map(sorted, rows)) == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("lengths", "room", "rows"),
    [
        ([4, 4, 4], 4, [[0], [1], [2]]),  # each fills a row
        ([4, 1, 1, 1, 1], 4, [[0], [1, 2, 3, 4]]),
        ([1, 3, 2], 3, [[1], [2, 0]]),
        ([], 8, []),
        ([8], 8, [[0]]),
    ],
)
def test_exactly_full_rows(lengths: list[int], room: int, rows: list[list[int]]) -> None:
    assert pack(lengths, room) == rows


def test_best_fit() -> None:
    # 6 and 7 leave 4 and 3 of 10; the 3 goes to the 7, so that the 4 still fits
    assert pack([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert pack([6, 7, 3], 10) == [[1, 2], [0]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
def test_packing_has_every_sequence_once_within_the_room(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < one <= room for one in filled)
    # no two rows would have gone into one
    assert all(one + other > room for at, one in enumerate(filled) for other in filled[:at])


def fewest(lengths: list[int], room: int) -> int:
    """Return the minimum number of rows by brute force: for each set of sequences, the fewest, then the least in the last."""
    best = [(1, 0)]
    for chosen in range(1, 1 << len(lengths)):
        ways = []
        for at, length in enumerate(lengths):
            if chosen >> at & 1:
                rows, filled = best[chosen ^ (1 << at)]
                ways.append((rows, filled + length) if filled + length <= room else (rows + 1, length))
        best.append(min(ways))
    return best[-1][0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(20, 24))
def test_packing_is_close_to_optimal(lengths: list[int], room: int) -> None:
    most = fewest(lengths, room)
    assert most <= len(pack(lengths, room)) <= 11 / 9 * most + 6 / 9  # the bound of first and best fit decreasing


def test_packing_of_real_lengths_wastes_little() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.6, 3000).astype(int).clip(5, 512).tolist()
    rows = pack(lengths, 512)
    assert len(rows) <= -(-sum(lengths) // 512) * 1.01


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 8, 11])
def test_every_epoch_is_another_permutation(count: int) -> None:
    one = order(count, epochs=3.0)
    per_epoch = one.steps_per_epoch
    assert per_epoch == -(-count // 4) and one.steps == 3 * per_epoch
    epochs = [wheres(one, range(epoch * per_epoch, (epoch + 1) * per_epoch)) for epoch in range(3)]
    for steps in epochs:
        assert sorted(chain.from_iterable(steps)) == list(range(count))
        assert [len(step) for step in steps] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    if count > 4:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != [list(range(count))[at : at + 4] for at in range(0, count, 4)]


def test_a_step_depends_on_the_seed_and_its_number_only() -> None:
    first = wheres(order(23, epochs=4.0), range(24))
    batches._permutation.cache_clear()
    np.random.seed(5)
    again = order(23, epochs=9.0, max_steps=3, lr=1.0)
    assert [wheres(again, range(step, step + 1))[0] for step in reversed(range(24))] == first[::-1]
    assert wheres(order(23, seed=1), range(6)) != first[:6]


def test_a_step_does_not_depend_on_its_batches() -> None:
    assert wheres(order(23, batch_size=4, grad_accum=1), range(6)) == wheres(
        order(23, batch_size=1, grad_accum=4), range(6)
    )


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({}, 3), ({"epochs": 2.0}, 6), ({"epochs": 0.5}, 2), ({"epochs": 1.5}, 5), ({"epochs": 0.01}, 1),
        ({"epochs": 1 / 3}, 1), ({"epochs": 2 / 3}, 2), ({"epochs": 1 + 1e-12}, 3), ({"epochs": 1.1}, 4),
        ({"max_steps": 2}, 2), ({"max_steps": 3}, 3), ({"epochs": 2.0, "max_steps": 5}, 5), ({"max_steps": 99}, 3),
        ({"batch_size": 10, "grad_accum": 1}, 1), ({"batch_size": 64, "epochs": 3.0}, 3), ({"batch_size": 1, "grad_accum": 1}, 10),
    ],
)  # fmt: skip
def test_the_number_of_steps(recipe: dict[str, Any], steps: int) -> None:
    assert order(10, **recipe).steps == steps  # 10 records by 4: steps of 4, 4 and 2


def test_packed_rows_replace_records() -> None:
    some = [
        Example(np.full(n, at, np.int32), np.ones(n, np.bool_), f"r:{at}") for at, n in enumerate([5, 3, 6, 4, 7, 5])
    ]
    one = Order.of(some, Recipe(packing=True, max_length=10, batch_size=2))
    assert len(one.rows) == 3 and one.steps == one.steps_per_epoch == 2
    assert {frozenset(example.where for example in row) for row in one.rows} == {
        frozenset({"r:0", "r:5"}), frozenset({"r:1", "r:4"}), frozenset({"r:2", "r:3"})
    }  # fmt: skip
    assert sorted(chain.from_iterable(wheres(one, range(2)))) == list(range(6))
    assert len(Order.of(some, Recipe(packing=False, max_length=10)).rows) == 6
