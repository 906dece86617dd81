"""Check and open the bases and adapters given to a Python call."""

from __future__ import annotations

import math
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from itertools import count
from numbers import Real
from pathlib import Path
from typing import TypeAlias

from adapterkit.adapter.formats import holds_adapter, load
from adapterkit.adapter.formats.table import weights_names
from adapterkit.adapter.weights import Adapter, WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint, is_base, open_checkpoint
from adapterkit.base.rename_option import parse_rename
from adapterkit.errors import UsageError
from adapterkit.hub import hub_repo, resolve

AnyPath: TypeAlias = str | os.PathLike[str]
AnyModel: TypeAlias = AnyPath  # or a Hub id
AnyNames: TypeAlias = str | Iterable[str]
AnyPaths: TypeAlias = AnyPath | Iterable[AnyPath]
AnyAdapter: TypeAlias = AnyPath | Adapter
AnyWeighted: TypeAlias = AnyAdapter | tuple[AnyAdapter, float]
AnyAdapters: TypeAlias = AnyWeighted | Iterable[AnyWeighted] | Mapping[AnyPath, float]  # as `weighted` takes them


def open_base(base: AnyPath, where: Callable[[AnyPath], Path] = resolve, *, hint: str = "") -> Checkpoint:
    """Open the model `base` at `where(base)`. Raises UsageError, with `hint`, if it is an adapter."""
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise UsageError(f"base {base!r}: expected a path or a Hub id")
    path = where(base)
    checkpoint = open_checkpoint(path, hub_repo(base))
    if holds_adapter(path, checkpoint.tensors):
        raise UsageError(f"{base}: is an adapter, expected a model", hint=hint)
    return checkpoint


def open_adapters(
    adapters: AnyAdapters,
    scale: float = 1.0,
    alpha: float | None = None,
    scaling: float | None = None,
    where: Callable[[AnyPath], Path] = resolve,
) -> list[WeightedAdapter]:
    """Open the adapters given to a call at `where(adapter)`, with unique labels."""
    scale, named = number(scale, "scale"), weighted(adapters)
    check_strength((what for what, _ in named), alpha, scaling)
    return _unique_labels([_open(what, weight * scale, alpha, scaling, where) for what, weight in named])


def check_strength(adapters: Iterable[AnyAdapter], alpha: float | None, scaling: float | None) -> None:
    """Raise UsageError for an alpha or a scaling if every adapter is an `Adapter`, which has its own."""
    if (alpha is not None or scaling is not None) and all(isinstance(one, Adapter) for one in adapters):
        raise UsageError(
            "`alpha` and `scaling` are for adapters without a config, but no file of one is given",
            hint="omit `alpha` and `scaling`",
        )


def open_one(adapter: AnyWeighted) -> list[WeightedAdapter]:
    """Open the adapter of a call that takes one. Raises UsageError for several or none."""
    named = weighted(adapter)
    if len(named) != 1:
        raise UsageError(f"{len(named)} adapters: expected one")
    return open_adapters(named)


def weighted(adapters: AnyAdapters) -> list[tuple[AnyAdapter, float]]:
    """Normalize an adapter, a pair with its weight, a sequence of these, or a mapping of weights to a list of pairs.

    Raises UsageError for anything else.
    """
    if isinstance(adapters, str | os.PathLike | Adapter) or _is_pair(adapters):
        return [_pair(adapters)]
    if isinstance(adapters, Mapping):
        return [_pair(entry) for entry in adapters.items()]
    if not isinstance(adapters, Iterable) or isinstance(adapters, bytes | Set):  # a set has no order
        raise _no_adapter(adapters)
    return [_pair(entry) for entry in adapters]


def number(value: object, what: str) -> float:
    """`value` as a float. Raises UsageError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UsageError(f"{what} {value!r}: expected a finite number")
    return float(value)


def _is_pair(entry: object) -> bool:
    """Whether a tuple is an adapter and its weight, not two adapters."""
    return (
        isinstance(entry, tuple) and len(entry) == 2 and not isinstance(entry[1], str | os.PathLike | Adapter | tuple)
    )


def _pair(entry: object) -> tuple[AnyAdapter, float]:
    what, weight = entry if isinstance(entry, tuple | list) and len(entry) == 2 else (entry, 1.0)
    if not isinstance(what, str | os.PathLike | Adapter) or (not isinstance(what, Adapter) and not os.fspath(what)):
        raise _no_adapter(entry)
    return what, number(weight, f"weight of {what if not isinstance(what, Adapter) else 'an adapter'}:")


def _no_adapter(found: object) -> UsageError:
    return UsageError(
        f"adapters: found {reprlib.repr(found)}; expected a path, a Hub id or an Adapter, alone or as (adapter, "
        "weight), a sequence of these, or a mapping of paths to weights"
    )


def _open(
    what: AnyAdapter, weight: float, alpha: float | None, scaling: float | None, where: Callable[[AnyPath], Path]
) -> WeightedAdapter:
    if not math.isfinite(weight):
        raise UsageError(f"weight × scale is {weight}: expected a finite number")
    if isinstance(what, Adapter):
        return WeightedAdapter(what, weight, what.files[0].parent.name if what.files else "adapter")
    path = where(what)
    if is_base(path):
        raise UsageError(f"{what}: is a model, expected an adapter")
    adapter = load(path, alpha=alpha, scaling=scaling)
    generic = path.is_file() and path.name in weights_names()
    name = hub_repo(what) or (path.resolve().parent.name if generic else path.resolve().name)
    return WeightedAdapter(adapter, weight, name, path)


def _unique_labels(given: list[WeightedAdapter]) -> list[WeightedAdapter]:
    """Append a number to equal labels, different from all other labels."""
    times = Counter(entry.label for entry in given)
    taken, labelled = {label for label, number in times.items() if number == 1}, []
    for entry in given:
        label = entry.label
        if times[label] > 1:
            label = next(name for number in count(1) if (name := f"{entry.label} #{number}") not in taken)
            taken.add(label)
        labelled.append(replace(entry, label=label))
    return labelled


def renaming(rename: object) -> tuple[str, str] | None:
    """Parse a rename, `OLD=NEW` or a pair."""
    if rename is None:
        return None
    text = "=".join(map(str, rename)) if isinstance(rename, tuple | list) else rename
    if not isinstance(text, str):
        raise UsageError(f"rename {reprlib.repr(rename)}: expected (old, new)")
    return parse_rename(text)
