"""What adapters change in a base, by tensor: gathered over all of them, and checked to go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.adapter import Adapter
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import FitError
from adapterkit.plan import Addition, Delta, Given, Replacement
from adapterkit.quant import SUPPORTED
from adapterkit.quant.unread import unread_scheme
from adapterkit.renames import explain_missing
from adapterkit.targets import Fit, fit
from adapterkit.tensorfile import FLOAT_DTYPES, Weight

DEQUANTIZED = f"what can be dequantized is {SUPPORTED}. Merge into the 16-bit original it was made from."


@dataclass
class Changes:
    """What happens to each base tensor, gathered over all adapters."""

    deltas: dict[str, list[Delta]] = field(default_factory=lambda: defaultdict(list))
    replaced: dict[str, list[Replacement]] = field(default_factory=lambda: defaultdict(list))
    added: dict[str, list[Addition]] = field(default_factory=lambda: defaultdict(list))

    def touch(self, name: str) -> bool:
        return any(name in kind for kind in (self.deltas, self.replaced, self.added))

    def add(self, more: Changes) -> None:
        """Add what another adapter changes."""
        for name, deltas in more.deltas.items():
            self.deltas[name] += deltas
        for name, replacements in more.replaced.items():
            self.replaced[name] += replacements
        for name, additions in more.added.items():
            self.added[name] += additions


# --- checks ----------------------------------------------------------------------------------------------------------


def refuse_broken(one: Given) -> None:
    fatal = [problem for problem in one.adapter.problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more: see adapterkit inspect)" if len(fatal) > 1 else ""
        raise FitError(f"{one.label}: {fatal[0]}{more}")
    if one.adapter.unread:
        names = ", ".join(info.name for info in one.adapter.unread[:3])
        raise FitError(f"{one.label}: {len(one.adapter.unread)} tensors that no reader knows what to do with: {names}")
    if not (one.adapter.modules or one.adapter.replaced or one.adapter.tokens):
        raise FitError(f"{one.label}: holds no weights at all")


def place(
    adapter: Adapter, tensors: Mapping[str, Weight], base: Checkpoint, rename: tuple[str, str] | None = None
) -> Fit:
    """Where `adapter` lands, as `targets.fit` finds it.

    Raises FitError, which names the scheme where the base is quantized by one that is not read.
    """
    try:
        return fit(adapter, tensors, base.config, rename)
    except FitError as error:
        if scheme := unread_scheme(tensors, base.quantization):
            raise FitError(f"{base.path}: is quantized ({scheme}); {DEQUANTIZED}") from error
        raise


def check_target(name: str, tensors: Mapping[str, Weight], base: Checkpoint, changes: Changes) -> None:
    """The tensor can be computed with, and no two modules of one adapter, nor two replacements, meet in it."""
    info = tensors.get(name)
    if info is not None and info.dtype not in FLOAT_DTYPES:
        scheme = unread_scheme(tensors, base.quantization) or f"{info.dtype} weights"
        raise FitError(f"{name}: is {info.dtype}: the base is quantized ({scheme}); {DEQUANTIZED}")
    whole = [change for change in changes.replaced.get(name, ()) if change.rows is None]
    if len(whole) > 1:
        raise FitError(f"{name}: {len(whole)} adapters replace it outright (modules_to_save); merge one of them only")
    for change in changes.replaced.get(name, ()):
        if change.values.dtype not in FLOAT_DTYPES:
            raise FitError(f"{name}: the adapter replaces it by {change.values.dtype}; expected floating point weights")
        if info is None:
            continue
        expected = info.shape if change.rows is None else (len(change.rows), *info.shape[1:])
        if change.values.shape != expected:
            resized = change.values.shape[1:] == info.shape[1:]
            hint = " Resize the base's embeddings as in training first." if resized else ""
            raise FitError(f"{name}: the adapter brings {change.values.shape}, the base has {info.shape}.{hint}")
        if change.rows and max(change.rows) >= info.shape[0]:
            raise FitError(f"{name}: trained token {max(change.rows)} is beyond the base's {info.shape[0]} rows")


def missing(one: Given, found: Fit, base: Checkpoint, tensors: Mapping[str, Weight], allow_partial: bool) -> list[str]:
    """What of an adapter is skipped; raises FitError unless that is allowed and something is left."""
    landed = found.targets or found.replaced or found.tokens
    if found.missing and (scheme := unread_scheme(tensors, base.quantization)):
        raise FitError(f"{base.path}: is quantized ({scheme}); {DEQUANTIZED}")
    if found.missing and not (allow_partial and landed):
        raise FitError(
            f"{one.label}: {len(found.missing)} of {_count(one.adapter)} have no place in {base.name}: "
            f"{explain(one.adapter, found, tensors, base.config)}"
        )
    return [f"{one.label}: {name}" for name in found.missing]


def explain(adapter: Adapter, found: Fit, tensors: Mapping[str, Weight], config: Mapping[str, Any]) -> str:
    """Why names have no place, with a rename that was tried and gives everything one, if there is such."""

    def fits(rename: tuple[str, str]) -> bool:
        try:
            places = fit(adapter, tensors, config, rename)
            gather(0, Given(adapter), places)
        except FitError:
            return False
        saved = ((adapter.replaced[name], tensors.get(at)) for name, at in places.replaced.items())
        return not places.missing and all(base is None or base.shape == value.shape for value, base in saved)

    return explain_missing(found.missing, tensors, fits)


def drift_note(one: Given, found: Fit) -> list[str]:
    renames = ", ".join(f"{old or '(nothing)'} → {new or '(nothing)'}" for old, new in found.drift.items())
    prefix = f"{one.label}: names its modules by another prefix than the base; matched by "
    return [prefix + renames] if renames else []


def idle_note(one: Given) -> list[str]:
    """What of an adapter changes nothing, as far as headers tell."""
    modules = one.adapter.modules
    idle = [name for name, weights in modules.items() if weights.scaling == 0 and weights.magnitude is None]
    if one.weight == 0:
        return [f"{one.label}: has the weight 0, so that it changes nothing"]
    return [f"{one.label}: {len(idle)} of {len(modules)} modules have an alpha of 0 and change nothing"] if idle else []


def _count(adapter: Adapter) -> str:
    return f"{len(adapter.modules) + len(adapter.replaced) + len(adapter.tokens)} modules and tensors"


# --- gathering -------------------------------------------------------------------------------------------------------


def gather(number: int, one: Given, found: Fit) -> Changes:
    """What the adapter of that `number` changes; two of its modules in the same rows are refused."""
    changes = Changes()
    taken: dict[str, list[tuple[tuple[int, int] | None, str]]] = defaultdict(list)
    for module, places in found.targets.items():
        weights = one.adapter.modules[module]
        for place in places:
            for rows, other in taken[place.tensor]:
                if rows is None or place.rows is None or (rows[0] < place.rows[1] and place.rows[0] < rows[1]):
                    raise FitError(f"{one.label}: {other} and {module} both land in {place.tensor}")
            taken[place.tensor].append((place.rows, module))
            changes.deltas[place.tensor].append(Delta(number, module, weights, one.weight, place))
        if module in found.biases:
            bias = weights.bias
            assert bias is not None
            changes.added[found.biases[module]].append(Addition(bias, one.weight * weights.scaling))
    for name, tensor in found.replaced.items():
        changes.replaced[tensor].append(Replacement(one.adapter.replaced[name], one.weight))
    for module, tensor in found.tokens.items():
        indices, values = one.adapter.tokens[module]
        changes.replaced[tensor].append(Replacement(values, one.weight, indices))
    return changes


def ledger_of(found: Fit) -> dict[str, tuple[str, ...]]:
    """Where each module and tensor of the adapter went."""
    ledger = {module: tuple(dict.fromkeys(t.tensor for t in places)) for module, places in found.targets.items()}
    for module, bias in found.biases.items():
        ledger[module] += (bias,)
    return ledger | {name: (tensor,) for name, tensor in (*found.replaced.items(), *found.tokens.items())}
