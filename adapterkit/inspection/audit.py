"""Facts about an adapter that stand out: broken or missing updates, and figures far from those of similar modules.

They describe; whether an adapter does harm is not a matter of such figures.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from adapterkit.inspection.module_rows import ModuleRow
from adapterkit.text import counted, given

NEAR_ZERO = 1e-3  # of the median ‖ΔW‖_F of a target's modules
DEVIATIONS = 6  # from the median, in units of the median deviation times 1.4826: the standard deviation of a normal
LEAST_EXCESS = 0.3  # of σ₁/Σσ over the median, where nearly equal modules make deviations tiny
LEAST_MODULES = 5  # of a target, for a median to mean something
USUAL_RELATIVE = (1e-4, 0.5)  # ‖ΔW‖_F / ‖W‖_F of trained adapters
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>.+)")


@dataclass(frozen=True, slots=True)
class Finding:
    """What stands out: its kind, the modules, the most extreme first, of how many, its figure, and the usual limit."""

    kind: str
    modules: tuple[str, ...]
    of: int
    value: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        some = f"{len(self.modules)} of {counted(self.of, 'module')}"
        return TEXTS[self.kind].format(
            some=some, first=self.modules[0], value=given(self.value), limit=given(self.limit)
        )


TEXTS = {
    "non_finite": "{some} hold NaN or Inf, {first} first; merge refuses them",
    "zero": "{some} have B = 0 and change nothing, {first} first",
    "near_zero": "near-zero update in {some}: ‖ΔW‖ is {value} in {first}, below {limit} × the median of its target",
    "dominated": "one dominant direction in {some}: σ₁/Σσ is {value} in {first}; the median of its target is {limit}",
    "experts_without_update": "{value} experts without an update where others have one, in {first} first",
    "relative_large": "unusually large update in {some}: ‖ΔW‖/‖W‖ is {value} in {first}, above {limit}",
    "relative_small": "unusually small update in {some}: ‖ΔW‖/‖W‖ is {value} in {first}, below {limit}",
}


def audit(rows: Sequence[ModuleRow]) -> list[Finding]:
    """What stands out among measured modules."""
    found = [_named("non_finite", [row for row in rows if row.non_finite], rows)]
    found.append(_named("zero", [row for row in rows if row.zero_B and not row.non_finite], rows))
    sound = [row for row in rows if row.frobenius and math.isfinite(row.frobenius)]
    found += [_near_zero(sound), _dominated(sound), _experts(rows), *_relative(sound)]
    return [finding for finding in found if finding is not None]


def _named(
    kind: str, some: Sequence[ModuleRow], rows: Sequence[ModuleRow], value: float | None = None,
    limit: float | None = None,
) -> Finding | None:  # fmt: skip
    return Finding(kind, tuple(row.name for row in some), len(rows), value, limit) if some else None


def _by_target(rows: Iterable[ModuleRow]) -> Iterator[list[ModuleRow]]:
    groups: defaultdict[str, list[ModuleRow]] = defaultdict(list)
    for row in rows:
        groups[row.target].append(row)
    return (group for group in groups.values() if len(group) >= LEAST_MODULES)


def _near_zero(rows: Sequence[ModuleRow]) -> Finding | None:
    some = []
    for group in _by_target(rows):
        limit = NEAR_ZERO * median(row.frobenius or 0.0 for row in group)
        some += [row for row in group if (row.frobenius or 0.0) < limit]
    some.sort(key=lambda row: row.frobenius or 0.0)
    return _named("near_zero", some, rows, some[0].frobenius if some else None, NEAR_ZERO)


def _dominated(rows: Sequence[ModuleRow]) -> Finding | None:
    """Modules of which one singular value has an unusual share for their target and rank."""
    some, medians = [], {}
    for group in _by_target(row for row in rows if row.top_share is not None and row.rank > 1):
        shares = [row.top_share or 0.0 for row in group]
        usual = median(shares)
        spread = 1.4826 * median(abs(share - usual) for share in shares)
        limit = usual + max(LEAST_EXCESS, DEVIATIONS * spread)
        some += [row for row in group if (row.top_share or 0.0) > limit]
        medians[group[0].target] = usual
    some.sort(key=lambda row: -(row.top_share or 0.0))
    return _named("dominated", some, rows, *((some[0].top_share, medians[some[0].target]) if some else ()))


def _experts(rows: Sequence[ModuleRow]) -> Finding | None:
    """Stacked experts whose factors are zero, and experts that lack a module that others of their layer have."""
    some: dict[str, int] = {row.name: len(row.idle_experts) for row in rows if row.idle_experts}
    layers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    numbers: set[int] = set()
    for row in rows:
        if match := EXPERT.fullmatch(row.name):
            layers[match["experts"], match["part"]].add(int(match["number"]))
            numbers.add(int(match["number"]))
    for (experts, part), present in layers.items():
        if lacking := sorted(numbers - present):
            some[f"{experts}.{lacking[0]}.{part}"] = len(lacking)
    if not some:
        return None
    return Finding("experts_without_update", tuple(some), len(rows), sum(some.values()))


def _relative(rows: Sequence[ModuleRow]) -> Iterator[Finding | None]:
    known = sorted((row for row in rows if row.relative is not None), key=lambda row: row.relative or 0.0)
    least, most = USUAL_RELATIVE
    small = [row for row in known if (row.relative or 0.0) < least]
    large = [row for row in reversed(known) if (row.relative or 0.0) > most]
    yield _named("relative_small", small, known, small[0].relative if small else None, least)
    yield _named("relative_large", large, known, large[0].relative if large else None, most)
