"""The summary of an adapter from its headers, for the command line, for notebooks and for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterkit.reprs import Displayed
from adapterkit.text import counted, runs, size, span

V = TypeVar("V", int, float, str)

LABEL = 12  # columns


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Displayed):
    """The facts in an adapter's headers; `ranks`, `scalings` and `alphas` are the distinct values, in order."""

    format: str
    kind: str
    base_model: str | None
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]  # empty if no config defines the alpha
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int  # trained ones, without replaced tensors
    bytes: int
    dtypes: tuple[str, ...]
    replaced: dict[str, tuple[int, ...]]  # tensor -> shape
    tokens: dict[str, int]  # embedding -> rows trained
    problems: tuple[dict[str, Any], ...]  # where, what, fatal, remedy
    unread: tuple[str, ...]

    def brief(self) -> str:
        rank = f"rank {span(self.ranks)}" if self.ranks else "no modules"
        for_base = f", for {self.base_model}" if self.base_model else ""
        return (
            f"{self.kind}, {rank}, {counted(self.modules, 'module')}, {counted(self.parameters, 'parameter')}{for_base}"
        )

    def rows(self) -> dict[str, str]:
        """Return the facts by label, without those that don't apply."""
        rows = {
            "format": f"{self.format}, {self.kind}",
            "base": self.base_model or "not named",
            "rank": span(self.ranks),
            "alpha": (span(self.alphas) or "not given") if self.modules else "",
            "scaling": (span(self.scalings) or "unknown") if self.modules else "",
            "targets": ", ".join(self.targets),
            "layers": f"{runs(self.layers)} ({len(self.layers)})" if self.layers else "",
            "modules": str(self.modules),
            "parameters": f"{self.parameters:,}",
            "size": f"{size(self.bytes)}, {', '.join(self.dtypes)}",
            "replaced": ", ".join(f"{name} {list(shape)}" for name, shape in self.replaced.items()),
            "tokens": ", ".join(f"{counted(rows, 'row')} of {name}" for name, rows in self.tokens.items()),
            "unread": ", ".join(self.unread),
        }
        return {label: text for label, text in rows.items() if text}

    def warnings(self) -> list[str]:
        """Return the problems, one per line."""
        refused = {True: "; merge refuses it", False: ""}
        found = [
            f"{problem['where']}: {problem['what']}{refused[problem['fatal']]}"
            + (f". {problem['remedy'][0].upper()}{problem['remedy'][1:]}" if problem["remedy"] else "")
            for problem in self.problems
        ]
        if self.unread:
            found.append(f"{counted(len(self.unread), 'unrecognized tensor')}; merge refuses them")
        return found

    def lines(self) -> list[str]:
        rows = [f"{label:{LABEL}}{text}" for label, text in self.rows().items()]
        return [*rows, *(f"⚠ {line}" for line in self.warnings())]


def distinct(values: Iterable[V]) -> tuple[V, ...]:
    """Return the distinct values; numbers sorted, names in order of appearance."""
    seen = list(dict.fromkeys(values))
    return tuple(seen if seen and isinstance(seen[0], str) else sorted(seen))
