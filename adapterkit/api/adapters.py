"""What `import adapterkit` offers for adapters alone: combined, resized and compared, without a base.

>>> adapterkit.combine(["a", ("b", 0.3)], "out", method="svd", rank=16).error  # relative to the exact sum
>>> adapterkit.resize("adapter", "out", energy=0.99)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from adapterkit.adapter.weights import WeightedAdapter
from adapterkit.algebra.lowrank import Limit
from adapterkit.api.inputs import AnyAdapter, AnyAdapters, AnyPath, open_adapters, open_base, open_one
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.combining.combine import Combined, ModuleDone, Planned, check_limit
from adapterkit.combining.combine import combine as run_combine
from adapterkit.combining.compare import Pair
from adapterkit.combining.compare import compare as run_compare
from adapterkit.combining.convert import rescale, to_dora, to_lora
from adapterkit.combining.extract import extract as run_extract
from adapterkit.combining.write import write_adapter
from adapterkit.errors import UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.files.staging import Destination
from adapterkit.merging.plan.types import inputs_of

ADAPTER_KINDS = ("dora", "lora", "rslora")
OnModule = Callable[[Planned | ModuleDone], None]  # first the plan: what raises then keeps anything from being done


def combine(
    adapters: AnyAdapters,
    out: AnyPath,
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    options: Mapping[str, float | str] | None = None,
    seed: int | None = None,
    saved: str = "error",
    overwrite: bool = False,
    on_module: OnModule = lambda _: None,
) -> Combined:
    """Combine adapters, each alone or with its weight, into one that is written to `out`.

    `method` is one of `combining.METHODS`, `options` are its own; `rank` or the least one that keeps `energy` of
    `‖Δ‖_F²` truncates the result optimally; `seed` is that of dropped elements. `saved` says what to do with tensors
    that several adapters hold whole: error, first or average. Raises UsageError and FitError before anything is
    written.
    """
    given = open_adapters(adapters)
    if not given:
        raise UsageError("no adapter given: there is nothing to combine")
    limit = Limit(rank, energy) if rank is not None or energy is not None else None
    target = _checked(out, overwrite, *given)
    steps = run_combine(given, method, limit=limit, options=options, seed=seed, saved=saved)
    result = _finished(steps, on_module)
    how = f"{method}{_of(limit)}{''.join(f', {name} {value}' for name, value in (options or {}).items())}"
    _write(result, target, f"combined by {how}", given)
    return result


def resize(
    adapter: AnyAdapter,
    out: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    uniform: bool = False,
    overwrite: bool = False,
    on_module: OnModule = lambda _: None,
) -> Combined:
    """Change an adapter's rank: to `rank`, padding what has less, or module by module to what keeps enough.

    Enough is `energy` of `‖Δ‖_F²`, or all but a relative `error`; `uniform` gives every module the greatest rank that
    one of them needs.
    """
    if rank is None and energy is None and error is None:
        raise UsageError("say how much to keep: a rank, an energy or an error")
    if uniform and rank is not None:
        raise UsageError("a rank is the same for every module already: uniform goes with energy or error")
    limit = Limit(rank, energy, error)
    check_limit(limit)
    given = open_one(adapter)
    target = _checked(out, overwrite, *given)
    if uniform:
        needed = _finished(run_combine(given, "linear", limit=limit), lambda _: None)
        limit = Limit(rank=max((row.rank for row in needed.modules), default=1))
    result = _finished(run_combine(given, "linear", limit=limit, pad=limit.rank is not None), on_module)
    _write(result, target, f"resized{_of(limit)}", given)
    return result


def compare(adapters: AnyAdapters) -> list[Pair]:
    """How alike every two of the adapters are, in all and module by module; see `combining.compare.Alike`."""
    given = open_adapters(adapters)
    check_cached(file for one in given for file in one.adapter.files)
    return list(run_compare(given))


def convert(
    adapter: AnyAdapter,
    out: AnyPath,
    *,
    to: str,
    base: AnyPath | None = None,
    initial: AnyAdapter | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    on_module: OnModule = lambda _: None,
) -> Combined:
    """Make an adapter another kind: `dora`, `lora` or `rslora`.

    To DoRA from LoRA, exactly, and back to LoRA, as nearly as `rank` or `energy` allow, needs the `base`. To LoRA from
    an adapter whose `initial` state changed the base (PiSSA, OLoRA): `s·(B·A − B₀·A₀)`, exactly, or truncated. Else
    `lora` and `rslora` describe the same factors by another scaling. Raises UsageError for what does not go together.
    """
    if to not in ADAPTER_KINDS:
        raise UsageError(f"to {to!r}: expected one of {', '.join(ADAPTER_KINDS)}")
    [one] = open_one(adapter)
    dora = any(weights.magnitude is not None for weights in one.adapter.modules.values())
    back = dora and to == "lora"
    limit = Limit(rank, energy) if rank is not None or energy is not None else None
    check_limit(limit)
    if (to == "dora" or back) is not (base is not None):
        wants = f"converting {'from' if back else 'to'} DoRA takes the base, for its norms"
        raise UsageError(f"{one.label}: {wants if base is None else f'converting it to {to} takes no base'}")
    if initial is not None and (base is not None or to != "lora"):
        raise UsageError("an initial adapter is taken off a LoRA adapter, to make a LoRA adapter")
    if back and limit is None:
        raise UsageError(f"{one.label}: DoRA's update has full rank: convert it to lora, with a rank or an energy")
    if limit is not None and not back and initial is None:
        raise UsageError(f"converting to {to} keeps everything: rank and energy are for what cannot be kept")
    if seed is not None and not back:
        raise UsageError("only the conversion from DoRA begins by chance: nothing else takes a seed")
    before = [] if initial is None else open_one(initial)
    given = open_adapters([(one.adapter, 1.0), (before[0].adapter, -1.0)]) if before else [one]
    model = None if base is None else open_base(base)
    target = _checked(out, overwrite, one, *before, *([model] if model else []))
    result = _finished(_conversion(given, to, model, limit, seed or 0), on_module)
    _write(result, target, f"converted to {to}{_of(limit)}", given, () if model is None else (model,))
    return result


def _conversion(
    given: Sequence[WeightedAdapter], to: str, base: Checkpoint | None, limit: Limit | None, seed: int
) -> Iterator[Planned | ModuleDone | Combined]:
    """The steps of a conversion that makes sense: with a base to or from DoRA, of two adapters their difference."""
    if base is None:
        if len(given) > 1:
            return run_combine(given, "linear", limit=limit, saved="first")
        return iter([Planned(len(given[0].adapter.modules)), rescale(given[0], to == "rslora")])
    if to == "dora":
        return to_dora(given[0], base)
    assert limit is not None
    return to_lora(given[0], base, limit, seed)


def extract(
    base: AnyPath,
    tuned: AnyPath,
    out: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    whole: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    on_module: OnModule = lambda _: None,
) -> Combined:
    """Write the adapter that makes `tuned` of `base`, as nearly as `rank` or `energy` allow."""
    if rank is None and energy is None:
        raise UsageError("say how much to keep: a rank or an energy")
    limit = Limit(rank, energy)
    check_limit(limit)
    one, other = open_base(base), open_base(tuned)
    target = _checked(out, overwrite, one, other)
    result = _finished(run_extract(one, other, limit, whole=whole, seed=seed), on_module)
    _write(result, target, f"extracted from {other.name} over {one.name}{_of(limit)}", [], (one, other))
    return result


def _finished(steps: Iterator[Planned | ModuleDone | Combined], on_module: OnModule) -> Combined:
    for step in steps:
        if isinstance(step, Combined):
            return step
        on_module(step)
    raise AssertionError("a combination ends with its result")


def _checked(out: AnyPath, overwrite: bool, *inputs: Checkpoint | WeightedAdapter) -> Destination:
    """Where the new adapter goes, once it may be written."""
    target = Destination(Path(out).expanduser(), inputs_of(*inputs), overwrite=overwrite)
    target.check()
    return target


def _of(limit: Limit | None) -> str:
    """What a limit asks for, in words."""
    if limit is None:
        return ""
    facts = {"rank": limit.rank, "energy": limit.energy, "error": limit.error}
    return " to " + next(f"{name} {value}" for name, value in facts.items() if value is not None)


def _write(
    result: Combined, out: Destination, made: str, given: Sequence[WeightedAdapter], models: Sequence[Checkpoint] = ()
) -> None:
    rows = {row.name: {"rank": row.rank, "error": row.error} for row in result.modules}
    facts = {"relative_error": result.error, "modules": rows}
    write_adapter(result.adapter, out, made, given, facts, result.notes, models)
