"""Combine adapters into one, module by module, and report the error of truncation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapter.fingerprint import agreed
from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra.truncation import Limit
from adapterkit.combining.checks import check_fit, check_rank, check_supported, check_truncation, check_whole
from adapterkit.combining.method import Value
from adapterkit.combining.methods import DEFAULT, METHODS
from adapterkit.combining.orientation import aligned, has_stacks
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.combining.whole_tensors import WholeTensors, pick_whole_tensors

if TYPE_CHECKING:
    from adapterkit.combining.batches import Weights


@dataclass(frozen=True)
class Combination:
    """Adapters that fit each other and the method that combines them; made by `plan_combination`."""

    adapters: tuple[WeightedAdapter, ...]
    method: str
    limit: Limit | None
    settings: Mapping[str, Value]
    whole_tensors: WholeTensors
    notes: tuple[str, ...]
    pad: bool = False  # zero-pad modules of lower rank than the limit
    uniform: bool = False  # give every module the highest rank that one of them needs

    @property
    def modules(self) -> int:
        return len(_modules(self.adapters))

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Combine the modules of all adapters: an event per module, then the result."""
        from adapterkit.combining.batches import batches, combine_batch

        if self.uniform:
            yield from _uniform_steps(self)
            return
        modules, method = _modules(self.adapters), METHODS[self.method]
        done: dict[str, tuple[Weights, ModuleDone]] = {}
        most = 1 if method.elementwise else None  # one module takes seconds, so each is an event of its own
        for batch in batches(self.adapters, modules, most):
            for one in combine_batch(self.adapters, batch, method, self.limit, self.settings):
                weights = self._padded(one.weights)
                row = ModuleDone(one.name, weights.rank, one.energy, one.discarded, len(done) + 1, len(modules))
                done[one.name] = weights, row
                yield row
        lazy = {name: _lazy(done[name][0]) for name in modules}
        rows = tuple(done[name][1] for name in modules)
        yield AdapterMade(_adapter_of(self, lazy), rows, tuple(_zero_notes(rows)))

    def _padded(self, weights: Weights) -> Weights:
        rank = self.limit.rank if self.pad and self.limit is not None else None
        if rank is None or weights.rank >= rank:
            return weights
        from adapterkit.algebra.lowrank import Product
        from adapterkit.combining.batches import weights_of

        return replace(weights_of(Product.of(weights).padded(rank), weights), bias=weights.bias)


def plan_combination(
    adapters: Sequence[WeightedAdapter],
    method: str = DEFAULT,
    *,
    limit: Limit | None = None,
    options: Mapping[str, Value] | None = None,
    seed: int | None = None,
    saved: str = "error",
    pad: bool = False,
    uniform: bool = False,
) -> Combination:
    """Plan to combine all modules of the adapters by `method`, checked from headers.

    Without a `limit` the result is exact, except for methods that always truncate: those truncate to the highest rank
    among the adapters. Raises UsageError for options that the method does not have, FitError for adapters that do not
    fit each other.
    """
    chosen = METHODS[method]
    settings = chosen.settings(options or {}, seed)
    check_truncation(chosen, limit)
    for one in adapters:
        check_mergeable(one)
    adapters = aligned(adapters)
    modules = _modules(adapters)
    check_supported(adapters, chosen)
    check_fit(adapters, modules)
    if limit is not None and limit.rank is not None:
        check_rank(adapters, modules, limit.rank, pad)
    whole_tensors = pick_whole_tensors(adapters, saved)
    check_whole(adapters, whole_tensors)
    notes = [*_difference_notes(adapters, modules), *(whole_tensors.notes if len(adapters) > 1 else ())]
    return Combination(tuple(adapters), method, limit, settings, whole_tensors, tuple(notes), pad, uniform)


def _uniform_steps(plan: Combination) -> Iterator[ModuleDone | AdapterMade]:
    """Combine twice: once to find the highest rank that the limit needs in a module, then with that rank in all."""
    *_, found = replace(plan, uniform=False).steps()
    assert isinstance(found, AdapterMade)
    rank = max((row.rank for row in found.modules), default=1)
    check_rank(plan.adapters, _modules(plan.adapters), rank, pad=True)
    yield from replace(plan, limit=Limit(rank=rank), pad=True, uniform=False).steps()


def _modules(adapters: Sequence[WeightedAdapter]) -> dict[str, None]:
    """The modules that any of the adapters has, in order."""
    return {name: None for one in adapters for name in one.adapter.modules}


def _adapter_of(plan: Combination, modules: dict[str, LoraWeights[LazyTensor]]) -> Adapter:
    """The new adapter: combined modules, whole tensors, and the settings of the adapters it is made from."""
    sources = [one.adapter for one in plan.adapters]
    replaced, tokens = plan.whole_tensors.read()
    return Adapter(
        "", modules, replaced, tokens, frozenset().union(*(one.new_tensors for one in sources)),
        any(one.ensure_weight_tying for one in sources),
        next((one.base_model for one in sources if one.base_model), None),
        agreed(one.base_fingerprint for one in sources) or {},
        task=next((one.task for one in sources if one.task), None),
        peft_version=next((one.peft_version for one in sources if has_stacks(one)), None),
    )  # fmt: skip


def _lazy(weights: Weights) -> LoraWeights[LazyTensor]:
    bias = None if weights.bias is None else LazyTensor.of(weights.bias)
    return LoraWeights(
        LazyTensor.of(weights.A), LazyTensor.of(weights.B), weights.scaling, weights.alpha, None, bias, weights.kind,
        weights.experts, weights.fan_in_fan_out,
    )  # fmt: skip


def _difference_notes(adapters: Sequence[WeightedAdapter], modules: Mapping[str, None]) -> list[str]:
    """Notes on modules that some adapters lack, and on different bases."""
    notes = []
    partial = [name for name in modules if sum(name in one.adapter.modules for one in adapters) < len(adapters)]
    if partial:
        notes.append(
            f"{len(partial)} of {len(modules)} modules are missing from some adapters (first: {partial[0]}); "
            "missing modules count as zero"
        )
    bases = {one.adapter.base_model: one.label for one in adapters if one.adapter.base_model}
    if len(bases) > 1:
        found = ", ".join(f"{base} ({label})" for base, label in bases.items())
        notes.append(f"the adapters name different base models: {found}")
    if agreed(one.adapter.base_fingerprint for one in adapters) is None:
        notes.append("the adapters were made for bases with different weights")
    return notes


def _zero_notes(rows: Sequence[ModuleDone]) -> list[str]:
    """A note on modules whose result is zero."""
    zero = [row.name for row in rows if row.energy == 0]
    if not zero:
        return []
    where = "every module" if len(zero) == len(rows) else f"{len(zero)} of {len(rows)} modules (first: {zero[0]})"
    return [f"the result is zero in {where}: the adapters cancel out or are zero"]
