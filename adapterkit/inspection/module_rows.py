"""Per-module rows of an adapter, for inspect, the terminal app and JSON.

`header_rows` needs headers only; `measure` reads the weights, a few megabytes at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from statistics import fmean
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.module_names import layer_of, target_of
from adapterkit.adapter.summary import distinct
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, load_weights

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.lowrank import Spectrum

WINDOW_BYTES = 64 << 20  # the factors in memory at once, as float32


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One module. Measured fields are None until the weights are read, and NaN if the factors contain NaN or Inf.

    Norms are those of `ΔW = scaling · B · A`, for a DoRA module those of its low-rank part.
    """

    name: str
    layer: int | None
    target: str
    kind: str
    rank: int
    alpha: float | None
    scaling: float | None
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    dtype: str
    frobenius: float | None = None
    spectral: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    rank_90: int | None = None  # the lowest that retains 90% of ‖ΔW‖_F²
    rank_99: int | None = None
    base_norm: float | None = None  # ‖W‖_F
    relative: float | None = None  # ‖ΔW‖_F / ‖W‖_F
    non_finite: int | None = None  # elements that are NaN or Inf
    zero_B: bool | None = None
    top_share: float | None = None  # σ₁ / Σσ
    idle_experts: tuple[int, ...] = ()  # whose factors are zero, unless all are
    sigma: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetRow:
    """The modules of one target; statistics cover the finite values."""

    target: str
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    frobenius_min: float
    frobenius_max: float
    frobenius_mean: float
    spectral_max: float
    stable_rank_mean: float
    rank_99_mean: float
    relative_mean: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """A number for each layer of each target: `cells[target][layer]`, None without such a module."""

    targets: tuple[str, ...]
    layers: tuple[int, ...]
    cells: tuple[tuple[float | None, ...], ...]


def header_rows(adapter: Adapter, *, strength_known: bool = True) -> list[ModuleRow]:
    """One unmeasured row per module, in the adapter's order."""
    return [
        ModuleRow(
            name=name,
            layer=layer_of(name),
            target=target_of(name),
            kind=weights.kind,
            rank=weights.rank,
            alpha=weights.alpha if strength_known else None,
            scaling=weights.scaling if strength_known else None,
            shape_A=weights.A.shape,
            shape_B=weights.B.shape,
            dtype=weights.A.dtype,
        )
        for name, weights in adapter.modules.items()
    ]


def measure(
    adapter: Adapter, *, strength_known: bool = True, base_norms: Mapping[str, float] | None = None
) -> Iterator[ModuleRow]:
    """Read the weights and yield measured rows in the adapter's order, in bounded memory.

    `base_norms` is ‖W‖_F by module, if the base is known. If the strength is unknown, `adapter` was opened with a
    scaling of 1, and norms are those of `B · A`.
    """
    from adapterkit.algebra.lowrank import Spectrum, singular_values_of

    rows = iter(header_rows(adapter, strength_known=strength_known))
    for window in _windows(adapter.modules.values()):
        loaded = [load_weights(weights) for weights in window]
        for weights, sigma in zip(loaded, singular_values_of(loaded), strict=True):
            row = next(rows)
            base_norm = (base_norms or {}).get(row.name)
            yield _measured(row, weights, Spectrum(tuple(sigma.tolist())), base_norm)


def by_target(rows: Iterable[ModuleRow]) -> list[TargetRow]:
    """Aggregate measured rows by target, in order of appearance."""
    groups: defaultdict[str, list[ModuleRow]] = defaultdict(list)
    for row in rows:
        groups[row.target].append(row)
    return [_target_row(target, group) for target, group in groups.items()]


def grid(rows: Sequence[ModuleRow], *, relative: bool = False) -> Grid:
    """`‖ΔW‖_F` by target and layer, or with `relative` `‖ΔW‖_F / ‖W‖_F`; modules without a layer are left out.

    Several modules in one cell (experts, or two towers with equal layer numbers) count as blocks of one matrix: their
    squares are summed.
    """
    rows = [row for row in rows if row.layer is not None and (row.base_norm is not None or not relative)]
    squares: defaultdict[tuple[str, int | None], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        cell = squares[row.target, row.layer]
        cell[0] += (math.nan if row.frobenius is None else row.frobenius) ** 2
        cell[1] += (row.base_norm or 0.0) ** 2

    def value(target: str, layer: int) -> float | None:
        if (target, layer) not in squares:
            return None
        delta, base = squares[target, layer]
        return math.sqrt(delta) if not relative else math.sqrt(delta / base) if base else math.nan

    targets = tuple(dict.fromkeys(row.target for row in rows))
    layers = distinct(row.layer for row in rows if row.layer is not None)
    return Grid(targets, layers, tuple(tuple(value(target, layer) for layer in layers) for target in targets))


def to_json(record: Any) -> Any:
    """Convert a dataclass of this module to strict JSON data."""
    return finite(asdict(record))


def finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON lacks, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


# --- parts -----------------------------------------------------------------------------------------------------------


def _windows(modules: Iterable[LoraWeights[LazyTensor]]) -> Iterator[list[LoraWeights[LazyTensor]]]:
    """Yield runs of modules whose factors fit into `WINDOW_BYTES`; a larger module forms a run of its own."""
    window: list[LoraWeights[LazyTensor]] = []
    size = 0
    for weights in modules:
        needed = 4 * (prod(weights.A.shape) + prod(weights.B.shape))
        if window and size + needed > WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(weights)
        size += needed
    if window:
        yield window


def _measured(
    row: ModuleRow, weights: LoraWeights[torch.Tensor], spectrum: Spectrum, base_norm: float | None
) -> ModuleRow:
    return replace(
        row,
        frobenius=spectrum.frobenius,
        spectral=spectrum.spectral,
        stable_rank=spectrum.stable_rank,
        effective_rank=spectrum.effective_rank,
        rank_90=spectrum.energy_rank(0.90),
        rank_99=spectrum.energy_rank(0.99),
        base_norm=base_norm,
        relative=spectrum.frobenius / base_norm if base_norm else None,
        non_finite=sum(_non_finite(tensor) for tensor in weights.tensors()),
        zero_B=not bool(weights.B.any()),
        top_share=spectrum.top_share,
        idle_experts=_idle_experts(weights),
        sigma=spectrum.sigma,
    )


def _non_finite(tensor: torch.Tensor) -> int:
    """The number of NaN or Inf elements; a finite norm proves that there are none."""
    return 0 if bool(tensor.norm().isfinite()) else int((~tensor.isfinite()).sum())


def _idle_experts(weights: LoraWeights[torch.Tensor]) -> tuple[int, ...]:
    """The stacked experts without an update, if others have one."""
    if weights.experts == 1:
        return ()
    A = weights.A.reshape(weights.experts, -1).any(1)
    B = weights.B.reshape(-1, weights.experts).any(0)  # the expert is the fastest index of B's columns
    idle = (~(A & B)).nonzero()[:, 0].tolist()
    return tuple(idle) if len(idle) < weights.experts else ()


def _target_row(target: str, rows: Sequence[ModuleRow]) -> TargetRow:
    def finite(name: str) -> list[float]:
        values = [getattr(row, name) for row in rows]
        return [value for value in values if value is not None and math.isfinite(value)] or [math.nan]

    frobenius, relative = finite("frobenius"), finite("relative")
    return TargetRow(
        target=target,
        modules=len(rows),
        ranks=distinct(row.rank for row in rows),
        scalings=distinct(row.scaling for row in rows if row.scaling is not None),
        frobenius_min=min(frobenius),
        frobenius_max=max(frobenius),
        frobenius_mean=fmean(frobenius),
        spectral_max=max(finite("spectral")),
        stable_rank_mean=fmean(finite("stable_rank")),
        rank_99_mean=fmean(finite("rank_99")),
        relative_mean=None if all(row.relative is None for row in rows) else fmean(relative),
    )
