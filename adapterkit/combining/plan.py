"""Plans of new adapters, checked from headers, and the events of carrying them out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from adapterkit.adapter.formats.table import DEFAULT
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.files.staging import Destination
from adapterkit.reprs import Displayed
from adapterkit.text import counted, number


@dataclass(frozen=True, slots=True)
class ModuleDone:
    """A finished module: its rank, `‖Δ‖_F²` before truncation, and the part of it that truncation discarded."""

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
    """`√(discarded / energy)`, or zero if that is only the rounding of float64."""
    return math.sqrt(discarded / energy) if discarded > 1e-28 * energy else 0.0


@dataclass(frozen=True, slots=True, repr=False)
class AdapterMade(Displayed):
    """The last event: the new adapter, its notes, and the path it was written to."""

    adapter: Adapter
    modules: tuple[ModuleDone, ...]
    notes: tuple[str, ...] = ()
    out: Path | None = None  # None until it is written

    @property
    def error(self) -> float:
        """`‖Δ' − Δ‖_F / ‖Δ‖_F` over all modules."""
        return relative_error(*(math.fsum(getattr(row, of) for row in self.modules) for of in ("discarded", "energy")))

    def brief(self) -> str:
        return f"{self.adapter.brief()}, relative error {number(self.error)}"

    def lines(self) -> list[str]:
        wrote = [f"wrote     {self.out}"] if self.out else []
        return [f"adapter   {self.adapter.brief()}", f"error     {number(self.error)}, relative", *wrote, *self.notes]


class Work(Protocol):
    """The computation of a new adapter: frozen plain data, checked when it is constructed."""

    @property
    def modules(self) -> int:
        """The number of modules to compute."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user, known before the computation."""

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Compute the adapter, without writing it: an event per module, then the result."""


@dataclass(frozen=True, repr=False)
class AdapterPlan(Displayed):
    """The computation of an adapter, its inputs and its destination; `made` describes it in the record and the card."""

    work: Work
    made: str
    destination: Destination
    given: tuple[WeightedAdapter, ...] = ()
    models: tuple[Checkpoint, ...] = ()
    format: str = DEFAULT
    unit: ClassVar[str] = "modules"

    @property
    def out(self) -> Path:
        return self.destination.out

    @property
    def notes(self) -> tuple[str, ...]:
        return self.work.notes

    def facts(self) -> dict[str, Any]:
        """The plan as JSON fields."""
        return {
            "output": str(self.out),
            "made": self.made,
            "adapters": [{"name": one.label, **one.weight_facts()} for one in self.given],
            "models": [model.name for model in self.models],
            "modules": self.work.modules,
        }

    def brief(self) -> str:
        return f"{self.made} → {self.out}, {counted(self.work.modules, 'module')} to make"

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        return [
            f"plan      {counted(self.work.modules, 'module')}, checked from headers",
            *(line for one in self.given for line in one.module_weight_lines()),
            f"writes    {self.out}",
        ]
