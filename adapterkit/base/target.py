"""The place of (part of) a module's Δ in a base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """The target of (part of) a module's Δ: `tensor[rows] += Δ[delta_rows]`.

    Args:
        rows: Rows of the tensor viewed as a matrix, of which an expert is a range; None means all.
        delta_rows: Rows of Δ as stored, after any transposition; None means all.
        expert: The expert whose factors make Δ.
        transposed: Whether Δ is added transposed.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    delta_rows: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False
