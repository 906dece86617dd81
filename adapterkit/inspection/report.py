"""What `inspect` finds: of an adapter its headers, its fit to a base and its norms; of a base how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.summary import LABEL, Summary
from adapterkit.inspection.audit import Finding, audit
from adapterkit.inspection.module_rows import ModuleRow, TargetRow, by_target, to_json
from adapterkit.reprs import Displayed
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.inspection.base_summary import StoredAs
    from adapterkit.inspection.match import Match


@dataclass(frozen=True, slots=True)
class Outlined:
    """What was fetched of a repository on the Hub whose weights were not: `fetched` of `size` bytes."""

    fetched: int
    size: int

    def __str__(self) -> str:
        shown = f"{size(self.fetched)} of {size(self.size)}"
        return f"{shown} on the Hub: headers and configs; `full=True` gets the weights"


@dataclass(frozen=True, slots=True)
class ModuleMeasured:
    """The `done`-th of `total` modules was measured, or its weight of the base, as `what` says."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, repr=False)
class AdapterReport(Displayed):
    """An adapter called `path`: its headers; with weights read, `measured` modules; with a base, how it fits.

    `unknown` says why its strength is unknown, where it is: the norms are those of `B · A` then.
    """

    path: str
    summary: Summary
    modules: tuple[ModuleRow, ...]
    measured: bool = False
    match: Match | None = None
    unknown: str | None = None
    outlined: Outlined | None = None

    @property
    def findings(self) -> list[Finding]:
        """What stands out among the measured modules."""
        return audit(self.modules) if self.measured else []

    @property
    def targets(self) -> list[TargetRow]:
        """The measured modules gathered by target."""
        return by_target(self.modules) if self.measured else []

    def facts(self, *, sigma: bool = True) -> dict[str, Any]:
        """The report for programs; without `sigma` its modules have no singular values."""
        rows = [to_json(row) for row in self.modules]
        return {
            "path": self.path, "summary": to_json(self.summary), "against": to_json(self.match) if self.match else None,
            "fetched": self.outlined.fetched if self.outlined else None,
            "findings": [to_json(finding) for finding in self.findings],
            "targets": [to_json(row) for row in self.targets],
            "modules": [{key: value for key, value in row.items() if sigma or key != "sigma"} for row in rows],
        }  # fmt: skip

    def brief(self) -> str:
        return f"{self.path}: {self.summary.brief()}"

    def rows(self) -> dict[str, str]:
        """Each fact that headers tell by its label."""
        rows = {"adapter": self.path, **self.summary.rows()}
        if self.unknown and self.summary.modules:
            rows |= dict.fromkeys(("alpha", "scaling"), f"unknown: {self.unknown}; give `alpha`")
        if self.match:
            rows["against"] = f"{self.match.base}: {self.match.found} of {counted(self.match.total, 'module')} found"
            rows["against"] += f", {self.match.rows}" if self.match.rows else ""
        if self.outlined:
            rows["fetched"] = str(self.outlined)
        return rows

    def warnings(self) -> list[str]:
        """What is wrong with it or stands out, a line each."""
        match = self.match.warnings() if self.match else []
        return [*self.summary.warnings(), *match, *map(str, self.findings)]

    def lines(self) -> list[str]:
        rows = [f"{label:{LABEL}}{text}" for label, text in self.rows().items()]
        return [*rows, *(f"⚠ {line}" for line in self.warnings())]


@dataclass(frozen=True, repr=False)
class BaseReport(Displayed):
    """A base called `path`: how its weights are stored, and what merging does with them."""

    path: str
    model_type: str
    files: int
    bytes: int
    quantization: str | None
    stored: Sequence[StoredAs]
    unsupported: str | None = None  # what merging cannot do with it
    outlined: Outlined | None = None

    def facts(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "path": self.path, "model_type": self.model_type, "files": self.files, "bytes": self.bytes,
            "quantization": self.quantization, "stored": [asdict(row) for row in self.stored],
            "unsupported": self.unsupported, "fetched": self.outlined.fetched if self.outlined else None,
        }  # fmt: skip

    def brief(self) -> str:
        schemes = ", ".join(row.scheme for row in self.stored)
        return f"{self.path}: {self.model_type}, {size(self.bytes)}, {schemes}"

    def lines(self) -> list[str]:
        weights = f"{sum(row.weights for row in self.stored):,} in {counted(self.files, 'file')}, {size(self.bytes)}"
        width = max(len("stored as"), *(len(row.scheme) for row in self.stored)) if self.stored else 0
        return [
            f"base        {self.path}",
            f"model       {self.model_type}",
            f"weights     {weights}",
            f"parameters  {sum(row.parameters for row in self.stored):,}",
            *([f"fetched     {self.outlined}"] if self.outlined else []),
            *([f"⚠ {self.unsupported}"] if self.unsupported else []),
            "",
            f"{'stored as':{width}}  weights     parameters        bytes  merge",
            *(
                f"{row.scheme:{width}}  {row.weights:7,}  {row.parameters:13,}  {size(row.bytes):>11}  {row.merge}"
                for row in self.stored
            ),
        ]
