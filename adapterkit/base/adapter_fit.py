"""An adapter placed in a base: every module has a place of its own there, or it is explained why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from adapterkit.adapter.weights import Adapter, WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import supported
from adapterkit.base.quant.unread import unread_scheme
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.targets import Fit, fit
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight


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
            raise FitError(f"{base.path}: is quantized ({scheme}); {dequantizable()}") from error
        raise


def dequantizable() -> str:
    """What to say of a base that is quantized by a scheme that is not read."""
    return f"what can be dequantized is {supported()}. Merge into the 16-bit original it was made from."


def missing(
    one: WeightedAdapter, found: Fit, base: Checkpoint, tensors: Mapping[str, Weight], allow_partial: bool
) -> list[str]:
    """What of an adapter is skipped; raises FitError unless that is allowed and something is left."""
    landed = found.targets or found.replaced or found.tokens
    if found.missing and (scheme := unread_scheme(tensors, base.quantization)):
        raise FitError(f"{base.path}: is quantized ({scheme}); {dequantizable()}")
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
            refuse_overlaps("the adapter", places)
        except FitError:
            return False
        saved = ((adapter.replaced[name], tensors.get(at)) for name, at in places.replaced.items())
        return not places.missing and all(base is None or base.shape == value.shape for value, base in saved)

    return explain_missing(found.missing, tensors, fits)


def refuse_overlaps(label: str, found: Fit) -> None:
    """Raise FitError where two modules of one adapter land in the same rows of a tensor."""
    taken: dict[str, list[tuple[tuple[int, int] | None, str]]] = defaultdict(list)
    for module, targets in found.targets.items():
        for target in targets:
            for rows, other in taken[target.tensor]:
                if rows is None or target.rows is None or (rows[0] < target.rows[1] and target.rows[0] < rows[1]):
                    raise FitError(f"{label}: {other} and {module} both land in {target.tensor}")
            taken[target.tensor].append((target.rows, module))


def _count(adapter: Adapter) -> str:
    return f"{len(adapter.modules) + len(adapter.replaced) + len(adapter.tokens)} modules and tensors"
