"""What adapters change in a base, by tensor: gathered over all of them, and checked to go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterkit.adapter.weights import WeightedAdapter
from adapterkit.base.adapter_fit import check_overlaps, merge_into_original
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant.unsupported import unsupported_scheme
from adapterkit.base.targets import Fit
from adapterkit.errors import FitError
from adapterkit.files.safetensors import FLOAT_DTYPES, Weight
from adapterkit.merging.plan.edits import Addition, ModuleUpdate, Replacement


@dataclass
class Changes:
    """What happens to each base tensor, gathered over all adapters."""

    deltas: dict[str, list[ModuleUpdate]] = field(default_factory=lambda: defaultdict(list))
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


def check_target(name: str, tensors: Mapping[str, Weight], base: Checkpoint, changes: Changes) -> None:
    """The tensor can be computed with, and no two modules of one adapter, nor two replacements, meet in it."""
    info = tensors.get(name)
    if info is not None and info.dtype not in FLOAT_DTYPES:
        scheme = unsupported_scheme(tensors, base.quantization) or f"{info.dtype} weights"
        raise FitError(f"{name}: is {info.dtype}: the base is quantized ({scheme}); {merge_into_original()}")
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


def prefix_note(one: WeightedAdapter, found: Fit) -> list[str]:
    renames = ", ".join(f"{old or '(nothing)'} → {new or '(nothing)'}" for old, new in found.prefix_map.items())
    prefix = f"{one.label}: names its modules by another prefix than the base; matched by "
    return [prefix + renames] if renames else []


def idle_note(one: WeightedAdapter) -> list[str]:
    """What of an adapter changes nothing, as far as headers tell."""
    modules = one.adapter.modules
    idle = [name for name, weights in modules.items() if weights.scaling == 0 and weights.magnitude is None]
    if one.weight == 0:
        return [f"{one.label}: has the weight 0, so that it changes nothing"]
    return [f"{one.label}: {len(idle)} of {len(modules)} modules have an alpha of 0 and change nothing"] if idle else []


# --- gathering -------------------------------------------------------------------------------------------------------


def gather(number: int, one: WeightedAdapter, found: Fit) -> Changes:
    """What the adapter of that `number` changes; two of its modules in the same rows are refused."""
    changes = Changes()
    check_overlaps(one.label, found)
    for module, targets in found.targets.items():
        weights = one.adapter.modules[module]
        for target in targets:
            changes.deltas[target.tensor].append(ModuleUpdate(number, module, weights, one.weight, target))
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
