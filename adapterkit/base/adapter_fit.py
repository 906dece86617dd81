"""Fit an adapter to a base: find a target for every module, or explain why there is none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import count
from typing import Any

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.architectures import SHARED_MODULES
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import supported_schemes
from adapterkit.base.quant.unsupported import unsupported_scheme
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.targets import Fit, fit
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight

EXPERT = re.compile(r"(?P<experts>.+\.experts)(?:\.[a-z_]+)?\.(?P<number>\d+)(?=\.|$)")  # a module of one expert


def place_adapter(
    adapter: Adapter, tensors: Mapping[str, Weight], base: Checkpoint, rename: tuple[str, str] | None = None
) -> Fit:
    """Find the targets of `adapter` in the base, as `targets.fit` does.

    Raises FitError, which names the quantization scheme if the base uses an unsupported one.
    """
    try:
        return fit(adapter, tensors, base.config, rename)
    except FitError as error:
        if scheme := unsupported_scheme(tensors, base.quantization):
            raise FitError(f"{base.path}: is quantized ({scheme}); {merge_into_original()}") from error
        raise


def merge_into_original() -> str:
    """Return the advice for a base quantized by an unsupported scheme."""
    return f"supported schemes: {supported_schemes()}. Merge into the 16-bit model that it was made from."


def check_missing(
    one: WeightedAdapter, found: Fit, base: Checkpoint, tensors: Mapping[str, Weight], allow_partial: bool
) -> list[str]:
    """Return the parts of an adapter to skip; raises FitError unless that is allowed and others remain."""
    matched = found.targets or found.replaced or found.tokens
    if found.missing and (scheme := unsupported_scheme(tensors, base.quantization)):
        raise FitError(f"{base.path}: is quantized ({scheme}); {merge_into_original()}")
    if found.missing and not (allow_partial and matched):
        shared = SHARED_MODULES.get(str(base.config.get("model_type")))
        if shared and (name := next((name for name in found.missing if f".{shared}." in f"{name}."), None)):
            raise FitError(
                f"{one.label}: changes {name}, one of several modules that share the weights of one {shared} in "
                f"{base.name}: merging an adapter that changes them separately is not supported"
            )
        raise FitError(
            f"{one.label}: {len(found.missing)} of {_count(one.adapter)} not found in {base.name}: "
            f"{explain_misfit(one.adapter, found, tensors, base.config)}"
        )
    if not allow_partial and (idle := _idle_experts(found, tensors)):
        raise FitError(
            f"{one.label}: {idle}: every expert needs its update",
            hint="check that the adapter was trained on this base; `allow_partial=True` leaves the others unchanged",
        )
    return [f"{one.label}: {name}" for name in found.missing]


def _idle_experts(found: Fit, tensors: Mapping[str, Weight]) -> str:
    """Describe experts without a module if the others are the first ones in every layer, as of a smaller model's."""
    trained: defaultdict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = {}
    for module, targets in found.targets.items():
        if match := EXPERT.match(module):
            trained[match["experts"]].add(int(match["number"]))
            weight = tensors[targets[0].tensor]
            if len(weight.shape) == 3:
                counts[match["experts"]] = weight.shape[0]
            elif match["experts"] not in counts and (at := EXPERT.match(weight.name)):
                names = (f"{at['experts']}.{number}{weight.name[at.end('number') :]}" for number in count())
                counts[match["experts"]] = next(number for number, name in enumerate(names) if name not in tensors)
    first = next(iter(trained), "")
    sizes = {len(numbers) if numbers == {*range(len(numbers))} else 0 for numbers in trained.values()}
    if len(sizes) != 1 or not 1 < max(sizes) < min((counts.get(name, 0) for name in trained), default=0):
        return ""
    return f"has modules of {max(sizes)} experts, the base has {counts[first]} experts ({first})"


def explain_misfit(adapter: Adapter, found: Fit, tensors: Mapping[str, Weight], config: Mapping[str, Any]) -> str:
    """Explain why names are missing from the base; suggests a rename if one was tried and makes everything fit."""

    def fits(rename: tuple[str, str]) -> bool:
        try:
            places = fit(adapter, tensors, config, rename)
            check_overlaps("the adapter", places)
        except FitError:
            return False
        saved = ((adapter.replaced[name], tensors.get(at)) for name, at in places.replaced.items())
        return not places.missing and all(base is None or base.shape == value.shape for value, base in saved)

    return explain_missing(found.missing, tensors, fits)


def check_overlaps(label: str, found: Fit) -> None:
    """Raise FitError if two modules of one adapter map to the same rows of a tensor."""
    taken: dict[str, list[tuple[tuple[int, int] | None, str]]] = defaultdict(list)
    for module, targets in found.targets.items():
        for target in targets:
            for rows, other in taken[target.tensor]:
                if rows is None or target.rows is None or (rows[0] < target.rows[1] and target.rows[0] < rows[1]):
                    raise FitError(f"{label}: {other} and {module} both map to {target.tensor}")
            taken[target.tensor].append((target.rows, module))


def _count(adapter: Adapter) -> str:
    return f"{len(adapter.modules) + len(adapter.replaced) + len(adapter.tokens)} modules and tensors"
