"""An adapter with its weights: one number, or several by layer and module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.adapter.module_patterns import last_match
from adapterkit.adapter.weights import Adapter
from adapterkit.errors import FitError
from adapterkit.text import counted


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a merge with its weight, and its label in messages and cards.

    `module_weights` pairs patterns (see `module_patterns`) with weights; the last that matches a module is its weight.
    """

    adapter: Adapter
    weight: float = 1.0
    label: str = "the adapter"
    path: Path | None = None  # the file or directory that it was opened from
    module_weights: tuple[tuple[str, float], ...] = ()

    @property
    def folder(self) -> Path | None:
        """The folder whose other files belong to the adapter; None for a lone file."""
        files = self.adapter.files
        lone = self.path is not None and self.path.is_file() and len(files) == 1
        return None if lone or not files else files[0].parent

    def weight_of(self, name: str) -> float:
        """The weight of a module, or of a tensor or embedding that is stored whole."""
        number = self._deciding(name)
        return self.weight if number is None else self.module_weights[number][1]

    def names(self) -> list[str]:
        """The names of all modules, and of all tensors and embeddings that are stored whole."""
        return [*self.adapter.modules, *self.adapter.replaced, *self.adapter.tokens]

    def times(self, factor: float) -> WeightedAdapter:
        """The adapter with every weight multiplied."""
        scaled = tuple((pattern, factor * weight) for pattern, weight in self.module_weights)
        return replace(self, weight=factor * self.weight, module_weights=scaled)

    def weight_facts(self) -> dict[str, Any]:
        """The weights as JSON facts, each by pattern with the number of modules and whole tensors that it decides."""
        counts = Counter(map(self._deciding, self.names())) if self.module_weights else Counter[int | None]()
        weights = enumerate(self.module_weights)
        by_module = [{"pattern": one, "weight": weight, "modules": counts[number]} for number, (one, weight) in weights]
        return {"weight": self.weight, "module_weights": by_module}

    def module_weight_lines(self) -> list[str]:
        """The weights by module as lines of a plan."""
        facts = self.weight_facts()["module_weights"]
        return [
            f"weight    {self.label}:{one['pattern']} × {one['weight']:g}: {counted(one['modules'], 'module')}"
            for one in facts
        ]

    @property
    def weight_text(self) -> str:
        """The weights in words: `0.7, layers.0-9 × 0.3`."""
        return ", ".join([f"{self.weight:g}", *(f"{pattern} × {weight:g}" for pattern, weight in self.module_weights)])

    def _deciding(self, name: str) -> int | None:
        """The number of the module weight that decides the weight of `name`; None if that is the adapter's own."""
        return last_match(tuple(pattern for pattern, _ in self.module_weights), name) if self.module_weights else None


def check_mergeable(one: WeightedAdapter) -> None:
    """Raise FitError if an adapter has fatal problems, unrecognized tensors, or no weights."""
    fatal = [problem for problem in one.adapter.problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more: see adapterkit inspect)" if len(fatal) > 1 else ""
        raise FitError(f"{one.label}: {fatal[0]}{more}", hint=fatal[0].remedy)
    if one.adapter.unrecognized:
        names = ", ".join(info.name for info in one.adapter.unrecognized[:3])
        raise FitError(f"{one.label}: has {counted(len(one.adapter.unrecognized), 'unrecognized tensor')}: {names}")
    if not (one.adapter.modules or one.adapter.replaced or one.adapter.tokens):
        raise FitError(f"{one.label}: has no weights")
