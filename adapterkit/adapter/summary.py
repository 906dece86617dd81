"""An adapter in a few numbers, as its headers tell them: for people, for a notebook and, field by field, for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterkit.display import Displayed
from adapterkit.text import counted, runs, size, span

V = TypeVar("V", int, float, str)

LABEL = 12  # columns of the names on the left


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Displayed):
    """What the headers say about an adapter; `scalings` and `alphas` are the different values, in order."""

    format: str
    kind: str
    base_model: str | None
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]  # empty where no config gives the alpha
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int  # trained ones: whole tensors that replace the base's are counted apart
    bytes: int
    dtypes: tuple[str, ...]
    replaced: dict[str, tuple[int, ...]]  # tensor -> shape
    tokens: dict[str, int]  # embedding -> rows trained
    problems: tuple[dict[str, Any], ...]  # where, what, fatal
    unread: tuple[str, ...]

    def brief(self) -> str:
        rank = f"rank {span(self.ranks)}" if self.ranks else "no modules"
        for_base = f", for {self.base_model}" if self.base_model else ""
        return (
            f"{self.kind}, {rank}, {counted(self.modules, 'module')}, {counted(self.parameters, 'parameter')}{for_base}"
        )

    def rows(self) -> dict[str, str]:
        """Each fact by its label; those that do not apply are left out."""
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
        """What is wrong with it, a line each."""
        refused = {True: "; merge refuses it", False: ""}
        found = [f"{problem['where']}: {problem['what']}{refused[problem['fatal']]}" for problem in self.problems]
        if self.unread:
            found.append(f"{counted(len(self.unread), 'tensor')} of no known kind; merge refuses them")
        return found

    def lines(self) -> list[str]:
        rows = [f"{label:{LABEL}}{text}" for label, text in self.rows().items()]
        return [*rows, *(f"⚠ {line}" for line in self.warnings())]


def distinct(values: Iterable[V]) -> tuple[V, ...]:
    """The different values; numbers in order, names in order of appearance."""
    seen = list(dict.fromkeys(values))
    return tuple(seen if seen and isinstance(seen[0], str) else sorted(seen))
