"""Find the target of each adapter module in a base: the tensor, its rows, the expert, and the orientation.

Modules are found by name (exact, then by known prefix differences, then by the tables of fused and per-expert layouts).
Shapes decide the rest; ambiguous cases are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.base.architectures import (
    CONV1D_MODELS,
    CONV1D_NAMES,
    FUSED,
    HEAD_MODULES,
    NORMED_EMBEDDINGS,
    PREFIX_MAPS,
    SEGMENTS,
)
from adapterkit.base.checkpoint_names import names_in_model
from adapterkit.base.expert_modules import place_in_stack
from adapterkit.base.parameters import place_parameters
from adapterkit.base.rename_option import apply_rename
from adapterkit.base.target import Target
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight


@dataclass(frozen=True)
class Fit:
    """The targets of an adapter in a base, by module and by replaced tensor, and the names without one."""

    targets: dict[str, tuple[Target, ...]]
    biases: dict[str, str] = field(default_factory=dict)  # module -> the base's bias tensor
    replaced: dict[str, str] = field(default_factory=dict)  # the adapter's tensor -> the base's
    tokens: dict[str, str] = field(default_factory=dict)  # the adapter's embedding -> the base's tensor
    missing: tuple[str, ...] = ()  # modules and tensors that are not in the base
    prefix_map: dict[str, str] = field(default_factory=dict)  # the row of PREFIX_MAPS that was used


def fit(
    adapter: Adapter,
    tensors: Mapping[str, Weight],
    config: Mapping[str, Any],
    rename: tuple[str, str] | None = None,
) -> Fit:
    """Find the targets of everything in `adapter` among the base's `tensors`.

    Raises FitError if a name matches but its shape doesn't, if the orientation is ambiguous, or if the factors are no
    update of the weight.
    """
    embeddings = [name for name, weights in adapter.modules.items() if weights.kind == "embedding"]
    if config.get("model_type") in NORMED_EMBEDDINGS and (trained := [*embeddings, *adapter.tokens]):
        raise FitError(
            f"{trained[0]}: the model normalizes the rows of its embedding, but PEFT adds to normalized ones: no "
            "weight gives the model that was trained",
            hint="train the embedding whole, in modules_to_save",
        )
    best: Fit | None = None
    least = (0, 0)  # missing names, and tensors that would be new
    in_model = names_in_model(config)
    stored = dict(tensors) if in_model is str else {in_model(name): info for name, info in tensors.items()}
    for prefix_map in (*PREFIX_MAPS, *_stem_maps(adapter, stored)):
        names = _Names(tensors, stored, in_model, prefix_map, rename)
        try:
            candidate = _fit_names(adapter, names, config)
        except FitError:
            if best is not None and not best.missing:
                continue
            raise
        lacks = len(candidate.missing), sum(base not in tensors for base in candidate.replaced.values())
        if lacks == (0, 0):
            return candidate
        if best is None or lacks < least:
            best, least = candidate, lacks
    assert best is not None
    return best


# --- names -----------------------------------------------------------------------------------------------------------


def _stem_maps(adapter: Adapter, stored: Mapping[str, Weight]) -> Iterator[dict[str, str]]:
    """Yield prefix maps between a model with a head, whose modules are in `bert.` or the like, and one without."""
    own = {name.partition(".")[0] for name in (*adapter.modules, *adapter.tokens)}
    of_base = dict.fromkeys(name.partition(".")[0] for name in stored)
    if len(own) == 1 and own.isdisjoint(of_base):
        yield {f"{next(iter(own))}.": ""}
    if own.isdisjoint(of_base):
        yield from ({"": f"{stem}."} for stem in of_base if stem not in HEAD_MODULES)


PERMUTED = re.compile(r"(\w+(\.weight|\.bias)?)$")  # the last name of a parameter, with that of its module


@dataclass(frozen=True)
class _Names:
    """Looks up the adapter's names in the base, through one prefix map and the user's rename.

    An adapter has the names in the model, either of transformers 5, or of transformers 4, which are mostly those on
    disk; `in_model` converts the latter to the former.
    """

    tensors: Mapping[str, Weight]
    stored: Mapping[str, Weight]  # the same by the names in the model
    in_model: Callable[[str], str]
    prefix_map: dict[str, str]
    rename: tuple[str, str] | None
    segments: dict[str, bool] = field(default_factory=dict)  # a cache for `lacks`

    def find(self, name: str) -> Weight | None:
        """Return the base's tensor for a tensor's name in the adapter's model.

        Raises FitError if the base stores it with its rows in another order.
        """
        info = self._find(name)
        if info is None and (permuted := self._find(PERMUTED.sub(r"permuted_\1", name))) is not None:
            raise FitError(
                f"{name}: the base stores its rows in another order ({permuted.name}), which is not supported"
            )
        return info

    def _find(self, name: str) -> Weight | None:
        mapped = self.mapped(name)
        info = self.stored.get(mapped)
        if info is None and self.in_model is not str:
            info = self.stored.get(self.in_model(mapped)) or self.stored.get(self.mapped(self.in_model(name)))
        return info or self.tensors.get(mapped)

    def mapped(self, name: str) -> str:
        name = apply_rename(name, self.rename)
        for in_memory, on_disk in SEGMENTS.items():
            if f".{in_memory}." in name and self.lacks(f".{in_memory}.") and not self.lacks(f".{on_disk}."):
                name = apply_rename(name, (in_memory, on_disk))
        for old in sorted(self.prefix_map, key=len, reverse=True):
            if name.startswith(old) and not (old == "" and name.split(".")[0] in HEAD_MODULES):
                return self.prefix_map[old] + name.removeprefix(old)
        return name

    def lacks(self, segment: str) -> bool:
        """Return whether no tensor name of the base contains `segment`."""
        if segment not in self.segments:
            self.segments[segment] = not any(segment in name for name in self.stored)
        return self.segments[segment]


def _fit_names(adapter: Adapter, names: _Names, config: Mapping[str, Any]) -> Fit:
    targets: dict[str, tuple[Target, ...]] = {}
    biases, replaced, tokens, missing = {}, {}, {}, []
    orientations = _Orientations(config)
    parameters = place_parameters(adapter, names.find, config)
    found = {module: _find(module, names) for module in adapter.modules if module not in parameters}
    for module in found:
        orientations.learn(adapter.modules[module], found[module])
    for module, weights in adapter.modules.items():
        if module in parameters:
            places = parameters[module]
        else:
            places = _places(module, weights, found[module], names, config, orientations)
        if not places:
            missing.append(module)
            continue
        targets[module] = places
        if weights.bias is not None:
            if (info := names.find(f"{module}.bias")) is None or info.shape != weights.bias.shape:
                base_bias = "no bias" if info is None else f"a bias of {info.shape}"
                raise FitError(
                    f"{module}: the adapter has a lora_bias of {weights.bias.shape}, but the base has {base_bias}"
                )
            biases[module] = info.name
    for name in adapter.replaced:
        info = names.find(name)
        if info is None and name.endswith(".decoder.bias"):  # BERT's, which is tied to the bias of the whole head
            info = names.find(name.removesuffix("decoder.bias") + "bias")
        if info is not None or name in adapter.new_tensors:
            replaced[name] = names.mapped(name) if info is None else info.name
        else:
            missing.append(name)
    for module in adapter.tokens:
        if (info := names.find(f"{module}.weight")) is not None:
            tokens[module] = info.name
        else:
            missing.append(module)
    return Fit(targets, biases, replaced, tokens, tuple(missing), names.prefix_map)


def _find(module: str, names: _Names) -> list[Weight]:
    """Return the base tensor of the module's own name, if there is one."""
    return [info for leaf in (".weight", "", ".in_proj_weight") if (info := names.find(module + leaf))][:1]


# --- shapes ----------------------------------------------------------------------------------------------------------


class _Orientations:
    """Determines whether linear weights are stored (out, in) or (in, out), from the modules that are not square."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type = config.get("model_type")
        self.seen: set[bool] = set()

    def learn(self, weights: LoraWeights[LazyTensor], found: list[Weight]) -> None:
        shape = (weights.out_features, weights.in_features)
        conclusive = weights.kind == "linear" and len(found) == 1 and shape[0] != shape[1]
        if conclusive and found[0].shape in (shape, shape[::-1]):
            self.seen.add(found[0].shape != shape)

    def of_square(self, module: str, weights: LoraWeights[LazyTensor]) -> bool:
        """Return whether a square weight is stored transposed, by architecture or else by the other modules."""
        if self.model_type is not None:
            return self.model_type in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_NAMES
        evidence = self.seen | {weights.fan_in_fan_out}
        if len(evidence) == 1:
            return evidence.pop()
        raise FitError(
            f"{module}: the weight is square, and other modules and fan_in_fan_out disagree about whether it is stored "
            "transposed. Put the base's config.json beside its weights, so that the architecture is known."
        )


def _places(
    module: str,
    weights: LoraWeights[LazyTensor],
    found: list[Weight],
    names: _Names,
    config: Mapping[str, Any],
    orientations: _Orientations,
) -> tuple[Target, ...]:
    """Return the targets of one module; empty if the base has no such name."""
    if found:
        return (Target(found[0].name, transposed=_transposed(module, weights, found[0], orientations)),)
    return (
        _place_in_fused(module, weights, names, config)
        or _place_over_parts(module, weights, names)
        or place_in_stack(module, weights, names.find, config)
    )


def _transposed(module: str, weights: LoraWeights[LazyTensor], info: Weight, orientations: _Orientations) -> bool:
    """Return whether Δ is added transposed; raises FitError if the shapes don't match."""
    delta = (weights.out_features, weights.in_features)
    if weights.kind == "embedding":
        if info.shape == delta[::-1]:
            return True
    elif weights.kind == "conv":
        if info.shape[2:] == weights.A.shape[2:] and info.shape[:2] == (delta[0], weights.A.shape[1]):
            return False
        groups = weights.A.shape[1] // info.shape[1] if len(info.shape) == len(weights.A.shape) and info.shape[1] else 0
        if groups > 1 and groups * info.shape[1] == weights.A.shape[1]:
            raise FitError(f"{module}: is a convolution with {groups} groups ({info.shape}), which is not supported")
    elif info.shape in (delta, (*delta, 1), (*delta, 1, 1)):
        return orientations.of_square(module, weights) if info.shape == delta == delta[::-1] else False
    elif info.shape == delta[::-1]:
        return True
    stored = {"embedding": delta[::-1], "conv": (delta[0], *weights.A.shape[1:])}.get(weights.kind, delta)
    in_layer = any(part.isdecimal() for part in module.split("."))
    resized = info.shape[1:] == stored[1:] and not in_layer
    raise FitError(
        f"{module}: Δ is {stored}, the base weight is {info.shape}. Was this adapter trained on another base?",
        hint="resize the base's embeddings first, as in training" if resized else "",
    )


def _place_in_fused(
    module: str, weights: LoraWeights[LazyTensor], names: _Names, config: Mapping[str, Any]
) -> tuple[Target, ...]:
    """Place a split module in a fused base: q_proj is a row range of qkv_proj."""
    parent, _, leaf = module.rpartition(".")
    for fused, parts in FUSED.items():
        if leaf not in parts:
            continue
        info = names.find(f"{parent}.{fused}.weight") or names.find(f"{parent}.{fused}_weight")
        if info is None or len(info.shape) < 2:
            continue
        sizes = _part_sizes(parts, info.shape[0], weights.out_features, config)
        index = parts.index(leaf)
        if sizes is None or sizes[index] != weights.out_features or info.shape[1:] != (weights.in_features,):
            raise FitError(
                f"{module}: Δ is {(weights.out_features, weights.in_features)}; in the base it is part of {info.name} "
                f"{info.shape}, " + (f"rows split {sizes}" if sizes else "but its config does not define the row split")
            )
        start = sum(sizes[:index])
        return (Target(info.name, rows=(start, start + sizes[index])),)
    return ()


def _part_sizes(parts: tuple[str, ...], rows: int, part: int, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the number of rows of each part of a fused projection, or None if the config doesn't define it.

    One `part` of the size of a third means that all are, since k and v always have the same size.
    """
    if len(parts) != 3 or part * 3 == rows:
        return (rows // len(parts),) * len(parts)
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    groups, size = config.get("num_key_value_heads"), config.get("head_dim")
    if any(value is not None and (type(value) is not int or value < 1) for value in (heads, width, groups, size)):
        return None
    if heads is None:
        return (rows // 3,) * 3 if rows % 3 == 0 and groups is None else None
    groups, size = groups or heads, size or (width or 0) // heads
    sizes = (heads * size, groups * size, groups * size)
    return sizes if sum(sizes) == rows else None


def _place_over_parts(module: str, weights: LoraWeights[LazyTensor], names: _Names) -> tuple[Target, ...]:
    """Place a fused module in a split base: each part gets its rows of Δ."""
    parent, _, leaf = module.rpartition(".")
    infos = [names.find(f"{parent}.{part}.weight") for part in FUSED.get(leaf, ())]
    found = [info for info in infos if info is not None and len(info.shape) > 1]
    return _over_rows(found, weights) if found and len(found) == len(infos) else ()


def _over_rows(infos: list[Weight], weights: LoraWeights[LazyTensor]) -> tuple[Target, ...]:
    rows, width = sum(info.shape[0] for info in infos), weights.in_features
    if rows != weights.out_features or any(info.shape[1:] != (width,) for info in infos):
        shapes = ", ".join(f"{info.name} {info.shape}" for info in infos)
        raise FitError(f"Δ is {(weights.out_features, width)}, which cannot be split into {shapes}")
    targets, start = [], 0
    for info in infos:
        targets.append(Target(info.name, delta_rows=(start, start + info.shape[0])))
        start += info.shape[0]
    return tuple(targets)
