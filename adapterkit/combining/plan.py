"""A new adapter, planned from headers and checked: how it is computed, what it is made from, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterkit.adapter.weights import Adapter, WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.files.staging import Destination
from adapterkit.text import counted, visible


@dataclass(frozen=True, slots=True)
class ModuleDone:
    """One module of the result: its rank, `‖Δ‖_F²` as it was meant, and how much of that was left out."""

    name: str
    rank: int
    energy: float
    discarded: float
    done: int
    total: int

    @property
    def error(self) -> float:
        """`‖Δ' − Δ‖_F / ‖Δ‖_F`."""
        return relative_error(self.discarded, self.energy)


def relative_error(discarded: float, energy: float) -> float:
    """`√(discarded / energy)`, but zero where that is the rounding of float64."""
    return math.sqrt(discarded / energy) if discarded > 1e-28 * energy else 0.0


@dataclass(frozen=True, slots=True)
class AdapterMade:
    """The last event: the new adapter, where it was written, and what a person should know of it."""

    adapter: Adapter
    modules: tuple[ModuleDone, ...]
    notes: tuple[str, ...] = ()
    out: Path | None = None  # None until it is written

    @property
    def error(self) -> float:
        """`‖Δ' − Δ‖_F / ‖Δ‖_F` over all modules."""
        return relative_error(*(math.fsum(getattr(row, of) for row in self.modules) for of in ("discarded", "energy")))


class Work(Protocol):
    """How an adapter is computed: frozen plain data, checked as it is made."""

    @property
    def modules(self) -> int:
        """How many modules there are to compute."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before it is computed."""

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Compute the adapter: an event for each module, the result last. Nothing is written."""


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter to be made by `work`, and to be written where that may be done; `made` says how, for its card."""

    work: Work
    made: str
    destination: Destination
    given: tuple[WeightedAdapter, ...] = ()
    models: tuple[Checkpoint, ...] = ()

    @property
    def out(self) -> Path:
        return self.destination.out

    @property
    def notes(self) -> tuple[str, ...]:
        return self.work.notes

    def facts(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "output": str(self.out),
            "made": self.made,
            "adapters": [{"name": one.label, "weight": one.weight} for one in self.given],
            "models": [model.name for model in self.models],
            "modules": self.work.modules,
        }

    def lines(self) -> list[str]:
        """The plan for people."""
        return [
            f"plan      {counted(self.work.modules, 'module')} to make; all that headers tell is checked, and fits",
            f"writes    {self.out}",
        ]

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))
