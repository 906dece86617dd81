"""Check and open the bases and adapters given to a Python call."""

from __future__ import annotations

import math
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from numbers import Real
from pathlib import Path
from typing import TypeAlias

from adapterkit.adapter.formats import holds_adapter, load
from adapterkit.adapter.formats.table import weights_names
from adapterkit.adapter.module_patterns import matches
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import Checkpoint, is_adapter, is_base, open_checkpoint
from adapterkit.base.rename_option import parse_rename
from adapterkit.errors import UsageError
from adapterkit.hub import hub_repo, resolve
from adapterkit.text import nearest

AnyPath: TypeAlias = str | os.PathLike[str]
AnyModel: TypeAlias = AnyPath  # or a Hub id
AnyNames: TypeAlias = str | Iterable[str]
AnyPaths: TypeAlias = AnyPath | Iterable[AnyPath]
AnyAdapter: TypeAlias = AnyPath | Adapter
AnyWeighted: TypeAlias = AnyAdapter | tuple[AnyAdapter, float]
AnyAdapters: TypeAlias = AnyWeighted | Iterable[AnyWeighted] | Mapping[AnyPath, float]  # as `weighted` takes them
AnyWeights: TypeAlias = Mapping[str, float] | None  # by adapter and modules, as ADAPTER:MODULES


def open_base(base: AnyPath, where: Callable[[AnyPath], Path] = resolve, *, hint: str = "") -> Checkpoint:
    """Open the model `base` at `where(base)`. Raises UsageError, with `hint`, if it is an adapter."""
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise UsageError(f"base {base!r}: expected a path or a Hub id")
    path, adapter = where(base), UsageError(f"{base}: is an adapter, expected a model", hint=hint)
    if is_adapter(path):
        raise adapter
    checkpoint = open_checkpoint(path, hub_repo(base))
    if holds_adapter(path, checkpoint.tensors):
        raise adapter
    return checkpoint


def order_hint(adapters: Sequence[AnyAdapter], where: Callable[[AnyPath], Path]) -> str:
    """Return what to do if the base of a merge with these `adapters` is an adapter."""
    paths = (one for one in adapters if not isinstance(one, Adapter))
    model = next((one for one in paths if is_base(where(one))), None)
    return "give the base first, then the adapters" if model is None else f"{model} is a model: swap the two"


def open_adapters(
    adapters: AnyAdapters,
    scale: float = 1.0,
    alpha: float | None = None,
    scaling: float | None = None,
    where: Callable[[AnyPath], Path] = resolve,
    weights: AnyWeights = None,
    orientation: str | None = None,
) -> list[WeightedAdapter]:
    """Open the adapters given to a call at `where(adapter)`, with unique labels and their `weights` by module."""
    scale, named = number(scale, "scale"), weighted(adapters)
    check_strength((what for what, _ in named), alpha, scaling)
    opened = [_open(what, weight * scale, alpha, scaling, where) for what, weight in named]
    given = oriented(_unique_labels(opened), orientation)
    return _weigh_modules(given, [what for what, _ in named], weights, scale)


def oriented(adapters: Iterable[WeightedAdapter], orientation: str | None) -> list[WeightedAdapter]:
    """Set the orientation of the adapters, if one is given."""
    if orientation is None:
        return list(adapters)
    return [replace(one, adapter=replace(one.adapter, orientation=orientation)) for one in adapters]


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


# --- weights by module -----------------------------------------------------------------------------------------------


def _weigh_modules(
    given: Sequence[WeightedAdapter], named: Sequence[AnyAdapter], weights: AnyWeights, scale: float
) -> list[WeightedAdapter]:
    """Add `weights` by module, times `scale`, to adapters that are `named` in the call.

    A key is an adapter's path or name, a colon, and a pattern of module names. Raises UsageError for a key that names
    no adapter of the call and for a pattern that no module takes its weight from.
    """
    if weights is not None and not isinstance(weights, Mapping):
        raise UsageError(f"`weights` {weights!r}: expected a mapping of ADAPTER:MODULES to weights")
    names = [list(_names(one, what)) for one, what in zip(given, named, strict=True)]
    found: list[list[tuple[str, float]]] = [[] for _ in given]
    for key, weight in (weights or {}).items():
        index, pattern = _parse_weight(key, names)
        scaled = number(weight, f"`weights` {key}:") * scale
        found[index].append((pattern, number(scaled, f"`weights` {key} × scale:")))
    weighed = [replace(one, module_weights=tuple(by_module)) for one, by_module in zip(given, found, strict=True)]
    for one in weighed:
        _check_weights(one)
    return weighed


def _names(one: WeightedAdapter, what: object) -> Iterator[str]:
    """The names of an adapter in a key: its label, and its path or Hub id as given."""
    yield one.label
    if isinstance(what, str | os.PathLike):
        yield os.fspath(what)


def _parse_weight(key: object, names: Sequence[Sequence[str]]) -> tuple[int, str]:
    """The index of the adapter that a key names, the longest name first, and the key's pattern."""
    known = sorted({name for several in names for name in several}, key=len, reverse=True)
    name = next((name for name in known if isinstance(key, str) and key.startswith(f"{name}:")), None)
    if not isinstance(key, str) or name is None:
        labels = [several[0] for several in names]
        near = nearest(str(key).rpartition(":")[0], known)
        example = f"expected ADAPTER:MODULES, for example {labels[0]}:layers.0-9" if labels else ""
        raise UsageError(f"`weights` {key}: names none of the adapters ({', '.join(labels)})", hint=near or example)
    having = [index for index, several in enumerate(names) if name in several]
    if len(having) > 1:
        labels = [names[index][0] for index in having]
        raise UsageError(f"`weights` {key}: {name} is given {len(having)} times", hint=f"use {' or '.join(labels)}")
    return having[0], key.removeprefix(f"{name}:")


def _check_weights(one: WeightedAdapter) -> None:
    """Raise UsageError for a pattern that matches no module, or only modules that later patterns match."""
    for by_module in one.weight_facts()["module_weights"]:
        pattern, names = by_module["pattern"], one.names()
        if by_module["modules"]:
            continue
        if any(matches(pattern, name) for name in names):
            raise UsageError(
                f"`weights` {one.label}:{pattern}: later patterns match all of its modules, so it has no effect",
                hint="the last pattern that matches a module decides its weight: give specific patterns last",
            )
        near = get_close_matches(pattern.strip("*."), dict.fromkeys(_runs(pattern.strip("*."), names)), n=3, cutoff=0.0)
        raise UsageError(
            f"`weights` {one.label}:{pattern}: matches no module of the adapter", hint=f"nearest: {', '.join(near)}"
        )


def _runs(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """The runs of segments in `names` that are as long as the pattern, for suggestions."""
    size = pattern.count(".") + 1
    for name in names:
        segments = name.split(".")
        yield from (".".join(segments[at : at + size]) for at in range(max(1, len(segments) - size + 1)))


# --- renames ---------------------------------------------------------------------------------------------------------


def renaming(rename: object) -> tuple[str, str] | None:
    """Parse a rename, `OLD=NEW` or a pair."""
    if rename is None:
        return None
    text = "=".join(map(str, rename)) if isinstance(rename, tuple | list) else rename
    if not isinstance(text, str):
        raise UsageError(f"rename {reprlib.repr(rename)}: expected (old, new)")
    return parse_rename(text)
