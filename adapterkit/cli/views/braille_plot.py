"""A line plot in the terminal, in braille dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: its columns, from the top
EMPTY = 0x2800


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """Plot `values` from left to right as lines of text, with the maximum and minimum in the margin.

    Where there are more values than columns of dots, each shows the mean of its own.
    """
    columns = 2 * width
    if len(values) > columns:
        bounds = [round(column * len(values) / columns) for column in range(columns + 1)]
        values = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(values), max(values)
    cells = [[EMPTY] * width for _ in range(height)]
    rows, before = 4 * height, None
    for column in range(columns if len(values) > 1 else 1):
        place = column * (len(values) - 1) / (columns - 1)
        left, share = int(place), place % 1
        value = values[left] + share * (values[min(left + 1, len(values) - 1)] - values[left])
        row = round((high - value) / (high - low) * (rows - 1)) if high > low else rows // 2
        for dot in range(min(row, before), max(row, before) + 1) if before is not None else (row,):
            cells[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
        before = row
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"] if height > 1 else [f"{high:.4g}"]
    margin = max(map(len, labels))
    return [f"{label:>{margin}} " + "".join(map(chr, row)).rstrip() for label, row in zip(labels, cells, strict=True)]
