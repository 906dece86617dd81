"""The verdict on a tensor: how the found values differ from the exact ones, and the known causes of a difference.

Least squares fit the actual change to the expected one, `D = W' − W ≈ Σ λᵢ·Δᵢ`, to recognize an update that was applied
twice, not at all, or with another scaling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.algebra.rounding import round_once
from adapterkit.algebra.tolerance import Rows, Tolerance
from adapterkit.base.quant import QuantizedWeight
from adapterkit.files.safetensors import Weight
from adapterkit.reprs import Displayed

DAMAGE_LIMIT = 1e-3  # up to this share of mismatched elements is damage, not another merge
SCALE_TOLERANCE = 0.02  # relative, to recognize a known factor
NOISE_FACTOR = 1.5  # times the error of two roundings, up to which the adapters explain a change
NOISE_DEVIATIONS = 4  # standard deviations of a scale, if every element had its largest error
COARSE_SHARE = 0.01  # of elements, which coarser arithmetic changes at least; fewer are damage
# The ratio of its bound to the fine one above which it does so: the bounds of float32 are far above usual errors.
TELLING = {2: 2.5, 4: 4.0, 8: 4.0}  # by the size of the result

# Kinds of verdict, best first. The first two pass.
EXACT, ROUNDED, SCALED, MISSING, QUANTIZED, DAMAGED, DIFFERENT = (
    "exact", "rounded", "scaled", "missing", "quantized", "damaged", "different",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Verdict(Displayed):
    """The verdict on one tensor: its kind, the number of checked and of mismatched elements, and an explanation.

    `modified` tells whether adapters modify the tensor; if so, `scales` are λ by adapter. `first_mismatch` describes
    the first mismatched element.
    """

    name: str
    kind: str
    modified: bool
    checked: int
    mismatched: int
    scales: tuple[tuple[str, float], ...] = ()
    first_mismatch: str = ""
    explanation: str = ""

    def brief(self) -> str:
        return ", ".join(filter(None, (self.name, self.kind, self.explanation)))

    @property
    def fits(self) -> bool:
        return self.kind in (EXACT, ROUNDED)


@dataclass
class Sums:
    """Sums over the checked elements of a tensor, with one row and column for each of `count` adapters."""

    count: int
    gram: torch.Tensor = field(init=False)  # Σ Δᵢ·Δⱼ
    toward: torch.Tensor = field(init=False)  # Σ D·Δᵢ
    beyond: torch.Tensor = field(init=False)  # Σ (D − expected D)·Δᵢ
    spread: torch.Tensor = field(init=False)  # Σ error²·Δᵢ²
    change: float = 0.0  # Σ D²
    noise: float = 0.0  # Σ of squared errors
    checked: int = 0
    inexact: int = 0  # not the correctly rounded value
    fine: int = 0  # beyond the error of float32
    coarse: int = 0  # beyond that of 16 bits
    telling: int = 0  # whose bound in 16 bits is much larger
    coarsened: int = 0  # of those, beyond the error of float32
    first_fine: str = ""
    first_coarse: str = ""

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.toward, self.beyond, self.spread = torch.zeros(3, self.count, dtype=torch.float64)

    @property
    def is_coarse(self) -> bool:
        """Whether the tensor was computed in 16 bits: then not only a few elements show it."""
        return self.coarsened >= int(COARSE_SHARE * self.telling)  # a few telling elements prove nothing

    @property
    def mismatched(self) -> int:
        return self.coarse if self.is_coarse else self.fine

    @property
    def rescaled(self) -> bool:
        """Whether the scale of an update differs from that of a correct merge by more than errors explain."""
        off = torch.linalg.lstsq(self.gram, self.beyond[:, None]).solution[:, 0].abs()
        return bool((off > NOISE_DEVIATIONS * self.spread.sqrt() / self.gram.diagonal().clamp(min=1e-300)).any())

    @property
    def first_mismatch(self) -> str:
        return self.first_coarse if self.is_coarse else self.first_fine

    def add(self, rows: Rows, found: torch.Tensor, tolerance: Tolerance) -> None:
        """Compare the `found` rows with those expected."""
        actual, exact = found.double(), rows.exact
        finite = exact.isfinite() & actual.isfinite()
        expected = round_once(exact, found.dtype)
        inexact = (expected != found) & ~(exact.isnan() & actual.isnan())
        error = tolerance.fine(rows)
        fine = inexact & ~((actual - exact).abs() <= error)
        change = torch.where(finite, actual - rows.before, 0.0)
        updates = torch.stack([torch.where(finite, delta, 0.0).flatten() for delta in rows.deltas])
        self.gram += updates @ updates.T
        self.toward += updates @ change.flatten()
        self.beyond += updates @ torch.where(finite, actual - expected.double(), 0.0).flatten()
        self.spread += updates.square() @ torch.where(finite, error, 0.0).square().flatten()
        self.change += float(change.square().sum())
        self.noise += float(torch.where(finite, error, 0.0).square().sum())
        self.checked += found.numel()
        self.inexact += int(inexact.sum())
        bounds, coarse = tolerance.coarse(rows, actual), fine
        if bounds is not None:
            coarse = inexact & ~((actual - bounds[0]).abs() <= bounds[1])
            telling = bounds[1] > TELLING[found.dtype.itemsize] * error
            self.telling += int(telling.sum())
            self.coarsened += int((fine & telling).sum())
        self.fine += int(fine.sum())
        self.coarse += int(coarse.sum())
        self.first_fine = self.first_fine or _described(rows, fine, actual)
        self.first_coarse = self.first_coarse or _described(rows, coarse, actual)


def _described(rows: Rows, mismatched: torch.Tensor, actual: torch.Tensor) -> str:
    """The first mismatched element, if there is one."""
    if not bool(mismatched.any()):
        return ""
    i, j = mismatched.nonzero()[0].tolist()
    return f"[{rows.first + i}, {j}] is {float(actual[i, j]):.6g}, expected {float(rows.exact[i, j]):.6g}"


def classify(
    name: str, sums: Sums, how: str, labels: list[str], after: Weight, given: tuple[WeightedAdapter, ...]
) -> Verdict:
    """The verdict on a tensor, `how` the tool must have computed it if not in the usual way."""
    solved = torch.linalg.lstsq(sums.gram, sums.toward[:, None]).solution[:, 0]
    scales = tuple(zip(labels, solved.tolist(), strict=True))
    unexplained = max(0.0, sums.change - float(solved @ sums.toward))
    explained = unexplained <= NOISE_FACTOR**2 * sums.noise
    explanation = ""
    if not sums.inexact and not how:
        kind = EXACT
    elif not sums.mismatched:
        kind, explanation = ROUNDED, how
    elif isinstance(after, QuantizedWeight):
        retained = " and ".join(f"{scale:.1%}" for scale in solved.tolist())
        kind, explanation = QUANTIZED, f"{after.scheme} retains {retained} of the update"
    elif not sums.change or (explained and float(solved.abs().max()) < SCALE_TOLERANCE):
        kind, explanation = MISSING, "equals the base"
    elif explained and sums.rescaled:
        kind = SCALED
        explanation = "; ".join(f"{label} × {scale:.4g}{_cause_of(scale, label, given)}" for label, scale in scales)
    else:
        kind = DAMAGED if sums.mismatched <= DAMAGE_LIMIT * sums.checked else DIFFERENT
        explanation = sums.first_mismatch
    return Verdict(name, kind, True, sums.checked, sums.mismatched, scales, sums.first_mismatch, explanation)


def _cause_of(scale: float, label: str, given: tuple[WeightedAdapter, ...]) -> str:
    """The known cause of a wrong scale, in parentheses."""
    adapter = next(one.adapter for one in given if one.label == label)
    weights = next(iter(adapter.modules.values()), None)
    known = {2.0: "applied twice", -1.0: "subtracted", 3.0: "applied three times", 0.5: "halved"}
    if weights is not None:
        root = weights.rank**0.5
        known |= {1 / root: "α/r instead of α/√r"} if adapter.rslora else {root: "α/√r instead of α/r"}
        if weights.scaling:
            known.setdefault(1 / weights.scaling, "without its scaling")
            known.setdefault(weights.scaling, "scaling applied twice")
    causes = [
        cause for factor, cause in known.items() if factor != 1 and abs(scale - factor) <= SCALE_TOLERANCE * abs(factor)
    ]
    return f" ({causes[0]})" if causes else ""
