"""The Python calls that make adapters from adapters or models, and compare them.

>>> adapterkit.combine(["a", ("b", 0.3)], "out", method="svd", rank=16).error  # relative to the exact sum
>>> adapterkit.resize("adapter", "out", energy=0.99)
>>> plan = adapterkit.plan_extract("base", "finetuned", "out", rank=8)  # checked from headers; nothing is written
>>> for event in adapterkit.run(plan): ...  # ModuleDone …, then AdapterMade
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.algebra.truncation import Limit
from adapterkit.api.inputs import AnyAdapter, AnyPath, open_adapters, open_base, open_one
from adapterkit.api.options.adapters import (
    CombineCall,
    CombineOptions,
    CompareOptions,
    ConvertCall,
    ConvertOptions,
    ExtractCall,
    ExtractOptions,
    ResizeCall,
    ResizeOptions,
)
from adapterkit.api.progress import downloads_shown, progress_bar
from adapterkit.api.run import in_one_call
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.combining.checks import check_limit
from adapterkit.combining.combine import plan_combination
from adapterkit.combining.convert import Rescale, ToDora, ToLora, placed_in
from adapterkit.combining.extract import Extraction
from adapterkit.combining.factor_saved import plan_factors
from adapterkit.combining.initial_factors import INITIAL, Rebase
from adapterkit.combining.plan import AdapterMade, AdapterPlan, Work
from adapterkit.errors import UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.files.staging import Destination
from adapterkit.merging.plan.types import inputs_of
from adapterkit.options import takes

if TYPE_CHECKING:
    from adapterkit.combining.compare import Pair


@takes(CombineOptions)
def plan_combine(o: CombineOptions) -> AdapterPlan:
    """Plan to combine weighted adapters into one; nothing is written.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: The method has no such option, or `rank` and `energy` contradict each other.
        MissingFileError: An adapter does not exist.
        FitError: Shapes differ, or several adapters store the same tensor whole; see `saved`.
        OutputExistsError: `out` exists, and is not to be replaced.
    """
    given = open_adapters(o.adapters, weights=o.weights)
    if not given:
        raise UsageError("no adapters to combine")
    limit = Limit(o.rank, o.energy) if o.rank is not None or o.energy is not None else None
    target = _checked(o.out, o.overwrite, *given)
    work = plan_combination(given, o.method, limit=limit, options=o.options, seed=o.seed, saved=o.saved)
    how = f"{o.method}{_limit_text(limit)}{''.join(f', {name} {value}' for name, value in (o.options or {}).items())}"
    return AdapterPlan(work, f"combined by {how}", target, tuple(given), format=o.format)


@takes(CombineCall)
def combine(o: CombineCall) -> AdapterMade:
    """Combine adapters in one call: `plan_combine`, then `run` to its end.

    Returns:
        The adapter, where it was written, and per module its rank and relative error.

    Raises:
        AdapterkitError: See `plan_combine` and `run`; nothing is left behind.
    """
    return in_one_call(plan_combine.of, o, AdapterMade)


@takes(ResizeOptions)
def plan_resize(o: ResizeOptions) -> AdapterPlan:
    """Plan to change an adapter's rank: to `rank`, zero-padded if needed, or to the lowest sufficient rank per module.

    A rank is sufficient if it retains a share `energy` of `‖Δ‖_F²`, or has at most the relative `error`. `uniform`
    gives every module the highest rank that one of them needs. Nothing is written.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: None of `rank`, `energy` and `error` is given, or they contradict each other.
        MissingFileError: The adapter does not exist.
        OutputExistsError: `out` exists, and is not to be replaced.
    """
    if o.rank is None and o.energy is None and o.error is None:
        raise UsageError("no new rank given", hint="give `rank`, `energy` or `error`")
    if o.uniform and o.rank is not None:
        raise UsageError("`uniform` has no effect with `rank`", hint="omit `uniform`")
    limit = Limit(o.rank, o.energy, o.error)
    check_limit(limit)
    given = open_one(o.adapter)
    target = _checked(o.out, o.overwrite, *given)
    work = plan_combination(given, limit=limit, pad=limit.rank is not None, uniform=o.uniform)
    alike = ", the same rank for every module" if o.uniform else ""
    return AdapterPlan(work, f"resized{_limit_text(limit)}{alike}", target, tuple(given), format=o.format)


@takes(ResizeCall)
def resize(o: ResizeCall) -> AdapterMade:
    """Change an adapter's rank in one call: `plan_resize`, then `run` to its end.

    Returns:
        The adapter, where it was written, and per module its rank and relative error.

    Raises:
        AdapterkitError: See `plan_resize` and `run`; nothing is left behind.
    """
    return in_one_call(plan_resize.of, o, AdapterMade)


@takes(CompareOptions)
def compare(o: CompareOptions) -> list[Pair]:
    """Compare every pair of adapters by their weighted Δs, in total and per module.

    Returns:
        A `Pair` for every two adapters: cosine similarity, distance, subspace overlap and sign conflicts.

    Raises:
        UsageError: Fewer than two adapters are given.
        MissingFileError: An adapter does not exist.
        FitError: Shapes differ, or a pair shares no module.
    """
    from adapterkit.combining.compare import compare as run_compare

    with downloads_shown(o.progress):
        given = open_adapters(o.adapters)
    check_cached(file for entry in given for file in entry.adapter.files)
    with progress_bar("comparing", "modules", o.progress) as show:
        return list(run_compare(given, show))


@takes(ConvertOptions)
def plan_convert(o: ConvertOptions) -> AdapterPlan:
    """Plan to convert an adapter to `dora`, `lora` or `rslora`; nothing is written.

    LoRA to DoRA (exact) and DoRA to LoRA (truncated by `rank` or `energy`) need the `base`. An adapter whose `initial`
    state changed the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) becomes the LoRA `s·(B·A − B₀·A₀)`, exact or truncated;
    for PiSSA and OLoRA the `base` also does. Between `lora` and `rslora`, only the stored scaling changes.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: Arguments don't fit the conversion.
        MissingFileError: The adapter, `base` or `initial` does not exist.
        FitError: The adapter doesn't fit the base.
        OutputExistsError: `out` exists, and is not to be replaced.
    """
    one = _open_unweighted(o.adapter)
    limit = Limit(o.rank, o.energy) if o.rank is not None or o.energy is not None else None
    check_limit(limit)
    back = _check_conversion(o, one, limit)
    before = [] if o.initial is None else [_open_unweighted(o.initial)]
    signed = [(one, 1.0), *((start, -1.0) for start in before)]
    given = open_adapters([(each.adapter.given("initial"), sign) for each, sign in signed]) if before else [one]
    models = [] if o.base is None else [open_base(o.base)]
    target = _checked(o.out, o.overwrite, one, *before, *models)
    work: Work
    if before:
        work = plan_combination(given, limit=limit, saved="first")
    elif o.saved == "factors":
        assert limit is not None
        work = plan_factors(one, models[0], limit, o.to == "rslora", o.seed or 0)
    elif models and o.to == "lora" and not back:
        one = replace(one, adapter=one.adapter.given("base"))
        work = Rebase(placed_in(models[0], one, dora=False), one.adapter.initialization)
    elif not models:
        work = Rescale(one, o.to == "rslora")
    elif back:
        assert limit is not None
        work = ToLora(placed_in(models[0], one, dora=True), limit, o.seed or 0)
    else:
        work = ToDora(placed_in(models[0], one, dora=False))
    made = f"converted to {o.to}{_limit_text(limit)}" + ", saved modules to factors" * (o.saved == "factors")
    return AdapterPlan(work, made, target, tuple(given), tuple(models), o.format)


def _open_unweighted(adapter: AnyAdapter) -> WeightedAdapter:
    """Open an adapter that is converted as it is. Raises UsageError if it is given with a weight."""
    [one] = open_one(adapter)
    if one.weight != 1.0:
        raise UsageError(f"{one.label}: weight {one.weight:g}: converting takes no weight", hint="omit the weight")
    return one


def _check_conversion(o: ConvertOptions, one: WeightedAdapter, limit: Limit | None) -> bool:
    """Whether the conversion is from DoRA to LoRA. Raises UsageError for options that contradict each other."""
    back = o.to == "lora" and any(weights.magnitude is not None for weights in one.adapter.modules.values())
    factors = o.saved == "factors"
    if factors and (o.to == "dora" or back or o.initial is not None):
        raise UsageError(
            f"{one.label}: `saved=factors` converts LoRA to LoRA, without other changes",
            hint="convert the adapter to lora first, then its saved modules",
        )
    rebased = o.to == "lora" and not (back or factors or o.initial) and one.adapter.initialization in INITIAL
    if (o.to == "dora" or back or factors) is not (o.base is not None) and not rebased:
        if o.base is None:
            kinds = "saved modules" if factors else "from DoRA" if back else "to DoRA"
            raise UsageError(f"{one.label}: converting {kinds} needs the base model", hint="give `base`")
        raise UsageError(f"{one.label}: converting to {o.to} needs no base model", hint="omit `base`")
    if o.initial is not None and (o.base is not None or o.to != "lora"):
        raise UsageError("`initial` converts to LoRA, without a base model", hint="give `to='lora'` and no `base`")
    if back and limit is None:
        raise UsageError(
            f"{one.label}: the update of DoRA has full rank", hint="give `rank` or `energy` to truncate it"
        )
    if factors and limit is None:
        raise UsageError(
            f"{one.label}: saved modules change at full rank", hint="give `rank` or `energy` to truncate it"
        )
    if limit is not None and not back and not factors and o.initial is None:
        raise UsageError(f"converting to {o.to} is exact and truncates nothing", hint="omit `rank` and `energy`")
    if o.seed is not None and not back and not factors:
        raise UsageError("only converting from DoRA or saved modules takes a `seed`", hint="omit `seed`")
    return back


@takes(ConvertCall)
def convert(o: ConvertCall) -> AdapterMade:
    """Convert an adapter in one call: `plan_convert`, then `run` to its end.

    Returns:
        The adapter, where it was written, and per module its rank and relative error.

    Raises:
        AdapterkitError: See `plan_convert` and `run`; nothing is left behind.
    """
    return in_one_call(plan_convert.of, o, AdapterMade)


@takes(ExtractOptions)
def plan_extract(o: ExtractOptions) -> AdapterPlan:
    """Plan to extract an adapter from the difference of `finetuned` and `base`, truncated by `rank` or `energy`.

    With `whole`, other tensors that differ are stored whole. Nothing is written.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: Neither `rank` nor `energy` is given.
        MissingFileError: A model does not exist.
        FitError: Their tensors have different names or shapes.
        OutputExistsError: `out` exists, and is not to be replaced.
    """
    if o.rank is None and o.energy is None:
        raise UsageError("no rank given", hint="give `rank` or `energy`")
    limit = Limit(o.rank, o.energy)
    check_limit(limit)
    before, after = open_base(o.base), open_base(o.finetuned)
    target = _checked(o.out, o.overwrite, before, after)
    work = Extraction(before, after, limit, o.whole, o.seed)
    made = f"extracted from {after.name} over {before.name}{_limit_text(limit)}"
    return AdapterPlan(work, made, target, models=(before, after), format=o.format)


@takes(ExtractCall)
def extract(o: ExtractCall) -> AdapterMade:
    """Extract an adapter in one call: `plan_extract`, then `run` to its end.

    Returns:
        The adapter, where it was written, and per module its rank and relative error.

    Raises:
        AdapterkitError: See `plan_extract` and `run`; nothing is left behind.
    """
    return in_one_call(plan_extract.of, o, AdapterMade)


def _checked(out: AnyPath, overwrite: bool, *inputs: Checkpoint | WeightedAdapter) -> Destination:
    """The checked destination of the new adapter."""
    target = Destination(Path(out).expanduser(), inputs_of(*inputs), overwrite=overwrite)
    target.check()
    return target


def _limit_text(limit: Limit | None) -> str:
    """A limit as text, such as ` to rank 8`."""
    if limit is None:
        return ""
    facts = {"rank": limit.rank, "energy": limit.energy, "error": limit.error}
    return " to " + next(f"{name} {value}" for name, value in facts.items() if value is not None)
