"""Find the targets of factors that apply to a parameter: a stack of experts, a tensor per expert, or one matrix.

Every expert of the base must have its update. Whether an expert's Δ = B·A is added as it is or transposed depends on
the version of PEFT and on the model; shapes tell, unless Δ is square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.adapter.peft_versions import adds_transposed
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.base.architectures import PER_EXPERT, experts_transposed
from adapterkit.base.target import Target
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight
from adapterkit.text import counted

Find = Callable[[str], Weight | None]


@dataclass(frozen=True)
class Stored:
    """A parameter in a base: the matrix of each expert, as tensors with the rows that belong to it (None: all)."""

    shape: tuple[int, ...]  # of a matrix
    matrices: tuple[tuple[tuple[Weight, tuple[int, int] | None], ...], ...]
    experts: bool = True  # False: one matrix, which is no expert

    def targets(self, transposed: bool) -> Iterator[Target]:
        """Yield the targets of Δ, expert by expert."""
        for number, tensors in enumerate(self.matrices):
            start = 0
            for weight, rows in tensors:
                span = None if len(tensors) == 1 else (start, start := start + weight.shape[0])
                yield Target(weight.name, rows, span, number if self.experts else None, transposed)

    def brief(self) -> str:
        weight, _ = self.matrices[0][0]
        return f"{weight.name} {weight.shape}"


def place_parameters(adapter: Adapter, find: Find, config: Mapping[str, Any]) -> dict[str, tuple[Target, ...]]:
    """Return the targets of every parameter that `adapter` has factors of; none if the base lacks the parameter.

    `find` looks a tensor up by its name in the model. Raises FitError if an expert has no update, if shapes differ, or
    if nothing tells whether a square Δ is transposed.
    """
    parameters = {name: weights for name, weights in adapter.modules.items() if weights.kind == "parameter"}
    stored = {name: found for name in parameters if (found := _stored(name, find))}
    for name, found in stored.items():
        _check(name, parameters[name], found)
    seen = {_told_by_shape(parameters[name], found) for name, found in stored.items()} - {None}
    targets: dict[str, tuple[Target, ...]] = dict.fromkeys(parameters, ())
    for name, found in stored.items():
        transposed = _told_by_shape(parameters[name], found)
        if transposed is None:
            transposed = _of_square(name, parameters[name], seen, adapter, config)
        targets[name] = tuple(found.targets(transposed))
    return targets


# --- the base --------------------------------------------------------------------------------------------------------


def _stored(name: str, find: Find) -> Stored | None:
    """Return a parameter of the base, whole or with a tensor per expert."""
    if (info := find(name)) is not None:
        if len(info.shape) == 3:
            experts, height, width = info.shape
            rows = ((number * height, (number + 1) * height) for number in range(experts))
            return Stored((height, width), tuple(((info, span),) for span in rows))
        return Stored(info.shape, (((info, None),),), experts=False)
    parent, _, leaf = name.rpartition(".")
    for parts in PER_EXPERT.get(leaf, ()):
        if any(find(f"{parent}.0.{part}.weight") for part in parts):
            return _apart(name, parent, parts, find)
    return None


def _apart(name: str, parent: str, parts: tuple[str, ...], find: Find) -> Stored:
    """Return a parameter that the base stores as a tensor for each expert and part."""
    experts: list[tuple[tuple[Weight, None], ...]] = []
    while True:
        names = [f"{parent}.{len(experts)}.{part}.weight" for part in parts]
        found = [info for part in names if (info := find(part)) is not None]
        if not found:
            break
        first = [info.shape for info, _ in experts[0]] if experts else [info.shape for info in found]
        shapes = [info.shape for info in found]
        if len(found) < len(parts):
            lacking = next(part for part in names if find(part) is None)
            raise FitError(f"{name}: the base has {found[0].name}, but no {lacking}")
        if shapes != first or any(len(shape) != 2 or shape[1] != first[0][1] for shape in shapes):
            raise FitError(
                f"{name}: the base's {', '.join(f'{info.name} {info.shape}' for info in found)} do not stack"
            )
        experts.append(tuple((info, None) for info in found))
    height = sum(info.shape[0] for info, _ in experts[0])
    return Stored((height, experts[0][0][0].shape[1]), tuple(experts))


def _check(name: str, weights: LoraWeights[LazyTensor], stored: Stored) -> None:
    """Raise FitError unless every expert of the base has its update and Δ has the shape of its matrix."""
    delta, count = (weights.out_features, weights.in_features), len(stored.matrices)
    if weights.experts != count:
        has = f"{counted(count, 'expert')} ({stored.brief()})" if stored.experts else f"one matrix ({stored.brief()})"
        raise FitError(
            f"{name}: the adapter has factors of {counted(weights.experts, 'expert')} (A is {tuple(weights.A.shape)}, "
            f"of rank {weights.rank}), the base has {has}: every expert needs its update",
            hint="check r and rank_pattern in adapter_config.json, and that the adapter was trained on this base",
        )
    if stored.shape not in (delta, delta[::-1]):
        raise FitError(
            f"{name}: Δ is {delta}, the base has {stored.brief()}. Was this adapter trained on another base?"
        )


# --- orientation -----------------------------------------------------------------------------------------------------


def _told_by_shape(weights: LoraWeights[LazyTensor], stored: Stored) -> bool | None:
    """Return whether Δ is transposed; None if it is a square Δ of several experts, whose shape does not tell.

    PEFT adds the Δ of a matrix, and of a single expert, as it is.
    """
    delta = (weights.out_features, weights.in_features)
    if delta[0] != delta[1]:
        return stored.shape != delta
    return False if weights.experts == 1 else None


def _of_square(
    name: str, weights: LoraWeights[LazyTensor], seen: set[bool | None], adapter: Adapter, config: Mapping[str, Any]
) -> bool:
    """Return whether a square Δ is transposed: as told by the user, the adapter's other parameters, or its config."""
    if adapter.orientation is not None:
        return adapter.orientation == "transposed"
    if len(seen) == 1:
        return bool(*seen)
    by_version = adds_transposed(adapter.peft_version, experts_transposed(config))
    if by_version is not None and not seen:
        return by_version
    writer = f"PEFT {adapter.peft_version}" if adapter.peft_version else "an unknown version of PEFT"
    model = f"type {config['model_type']}" if config.get("model_type") else "unknown type"
    reason = "the adapter's other parameters disagree" if seen else f"it was written by {writer} for a base of {model}"
    raise FitError(
        f"{name}: Δ is square ({weights.out_features} × {weights.in_features}), so its shape does not tell whether it "
        f"is stored transposed, and {reason}",
        hint="give `orientation='transposed'` if PEFT 0.18 or earlier wrote it, or if the model is like gpt-oss; "
        "otherwise `orientation='plain'`",
    )
