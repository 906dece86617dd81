"""Changes to a base's tensors, collected over all adapters and checked for conflicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.base.adapter_fit import check_overlaps, merge_into_original
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant.unsupported import unsupported_scheme
from adapterkit.base.targets import Fit
from adapterkit.errors import FitError
from adapterkit.files.safetensors import FLOAT_DTYPES, Weight
from adapterkit.merging.plan.edits import Addition, ModuleUpdate, Replacement
from adapterkit.text import counted


@dataclass
class Changes:
    """Changes by base tensor, collected over all adapters."""

    deltas: dict[str, list[ModuleUpdate]] = field(default_factory=lambda: defaultdict(list))
    replaced: dict[str, list[Replacement]] = field(default_factory=lambda: defaultdict(list))
    added: dict[str, list[Addition]] = field(default_factory=lambda: defaultdict(list))

    def touches(self, name: str) -> bool:
        return any(name in kind for kind in (self.deltas, self.replaced, self.added))

    def update(self, other: Changes) -> None:
        """Add the changes of another adapter."""
        for name, deltas in other.deltas.items():
            self.deltas[name] += deltas
        for name, replacements in other.replaced.items():
            self.replaced[name] = _in_order([*self.replaced[name], *replacements])
        for name, additions in other.added.items():
            self.added[name] += additions


def _in_order(replaced: list[Replacement]) -> list[Replacement]:
    """Replacements of a tensor, those of single rows last; a layer that several adapters store alike counts once."""
    layers, whole, rows = list[Replacement](), list[Replacement](), list[Replacement]()
    for change in replaced:
        if change.rows is not None:
            rows.append(change)
        elif not change.of_base:
            whole.append(change)
        elif not any(change.values.equals(layer.values) for layer in layers):
            layers.append(change)
    return [*layers, *whole, *rows]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_target(name: str, tensors: Mapping[str, Weight], base: Checkpoint, changes: Changes) -> None:
    """Raise FitError unless the tensor is floating point, replaced at most once, and by values of its shape."""
    info = tensors.get(name)
    if info is not None and info.dtype not in FLOAT_DTYPES:
        scheme = unsupported_scheme(tensors, base.quantization) or f"{info.dtype} weights"
        raise FitError(
            f"{name}: unsupported dtype {info.dtype}: the base is quantized ({scheme}); {merge_into_original()}"
        )
    whole = [change for change in changes.replaced.get(name, ()) if change.rows is None]
    if len(whole) > 1:
        how = "modules_to_save" if any(not change.of_base for change in whole) else "resized before training"
        raise FitError(f"{name}: {len(whole)} adapters replace this tensor ({how}); merge only one of them")
    rows = Counter(row for change in changes.replaced.get(name, ()) for row in set(change.rows or ()))
    twice = [row for row, count in rows.items() if count > 1]
    if twice or (rows and any(not change.of_base for change in whole)):
        where = f"row {min(twice)}" if twice else "this tensor, some only rows of it"
        raise FitError(f"{name}: several adapters replace {where}; merge only one of them")
    for change in changes.replaced.get(name, ()):
        if change.values.dtype not in FLOAT_DTYPES:
            raise FitError(f"{name}: the adapter's tensor is {change.values.dtype}; expected a floating-point dtype")
        if info is None:
            continue
        expected = info.shape if change.rows is None else (len(change.rows), *info.shape[1:])
        if change.values.shape != expected:
            resized = change.values.shape[1:] == info.shape[1:]
            hint = "resize the base's embeddings first, as in training" if resized else ""
            raise FitError(
                f"{name}: the adapter's tensor has shape {change.values.shape}, the base's {info.shape}", hint=hint
            )
        if change.rows and max(change.rows) >= info.shape[0]:
            raise FitError(
                f"{name}: trained token {max(change.rows)} is out of range: the base has {info.shape[0]} rows"
            )


def prefix_note(given: WeightedAdapter, found: Fit, tensors: Mapping[str, Weight]) -> list[str]:
    renames = ", ".join(f"{old or '(nothing)'} → {new or '(nothing)'}" for old, new in found.prefix_map.items())
    notes = [f"{given.label}: module prefix differs from the base's, matched as {renames}"] if renames else []
    if "" in found.prefix_map.values() and any(name not in tensors for name in found.replaced.values()):
        notes.append("the output has a head beside names without a prefix, which transformers 5 and later load")
    return notes


def counter_note(given: WeightedAdapter) -> list[str]:
    """A note on counters of batches in saved modules, which only training reads."""
    counters = sum(_is_counter(name, given) for name in given.adapter.replaced)
    return (
        [f"{given.label}: leaves {counted(counters, 'counter')} of batches (num_batches_tracked)"] if counters else []
    )


def _is_counter(name: str, given: WeightedAdapter) -> bool:
    return name.endswith("num_batches_tracked") and given.adapter.replaced[name].dtype not in FLOAT_DTYPES


def idle_note(given: WeightedAdapter) -> list[str]:
    """A note on modules that change nothing, found from headers alone."""
    modules = given.adapter.modules
    idle = [name for name, weights in modules.items() if weights.scaling == 0 and weights.magnitude is None]
    zero = [name for name in given.names() if given.weight_of(name) == 0]
    if zero:
        part = "" if len(zero) == len(given.names()) else f" in {counted(len(zero), 'module')}"
        return [f"{given.label}: weight 0 changes nothing{part}"]
    return [f"{given.label}: {len(idle)} of {len(modules)} modules have alpha 0 and change nothing"] if idle else []


# --- collecting ------------------------------------------------------------------------------------------------------


def changes_of(number: int, given: WeightedAdapter, found: Fit) -> Changes:
    """The changes of adapter `number`. Raises FitError if two of its modules target the same rows."""
    changes = Changes()
    check_overlaps(given.label, found)
    for module, targets in found.targets.items():
        weights = given.adapter.modules[module]
        for target in targets:
            changes.deltas[target.tensor].append(ModuleUpdate(number, module, weights, given.weight_of(module), target))
        if module in found.biases:
            bias = weights.bias
            assert bias is not None
            changes.added[found.biases[module]].append(Addition(bias, given.weight_of(module) * weights.scaling))
    for name, tensor in found.replaced.items():
        if _is_counter(name, given):
            continue
        values, of_base = given.adapter.replaced[name], name not in given.adapter.new_tensors
        changes.replaced[tensor].append(Replacement(values, given.weight_of(name), of_base=of_base))
    for module, tensor in found.tokens.items():
        indices, values = given.adapter.tokens[module]
        changes.replaced[tensor].append(Replacement(values, given.weight_of(module), indices))
    return changes


def ledger_of(found: Fit) -> dict[str, tuple[str, ...]]:
    """Map each module and tensor of the adapter to the base tensors that it changes."""
    ledger = {module: tuple(dict.fromkeys(t.tensor for t in places)) for module, places in found.targets.items()}
    for module, bias in found.biases.items():
        ledger[module] += (bias,)
    return ledger | {name: (tensor,) for name, tensor in (*found.replaced.items(), *found.tokens.items())}
