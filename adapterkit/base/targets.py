"""Where each module of an adapter lands in a base: which tensor, which rows, which expert, which way round.

Names come first (exactly, then by known drifts between training and checkpoint names, then by the tables of fused and
per-expert layouts), shapes decide everything else, and what neither decides is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.base.architectures import CONV1D_MODELS, CONV1D_NAMES, DRIFTS, FUSED, HEAD_MODULES, PER_EXPERT, SEGMENTS
from adapterkit.base.rename_option import apply_rename
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight

# --- the types -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A place for (part of) a module's Δ: `tensor[rows] += Δ[of]`, transposed where the base is stored (in, out).

    `rows` are rows of the tensor seen as a matrix (an expert is a range of them); None means all. `of` are rows of Δ
    itself, before any transposition; `expert` says which one's factors.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    of: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Fit:
    """How an adapter lands on a base: targets by module, and by tensor what is replaced; the rest has no place."""

    targets: dict[str, tuple[Target, ...]]
    biases: dict[str, str] = field(default_factory=dict)  # module -> the base's bias tensor
    replaced: dict[str, str] = field(default_factory=dict)  # the adapter's tensor -> the base's
    tokens: dict[str, str] = field(default_factory=dict)  # the adapter's embedding -> the base's tensor
    missing: tuple[str, ...] = ()  # modules and tensors that the base has no place for
    drift: dict[str, str] = field(default_factory=dict)


def fit(
    adapter: Adapter,
    tensors: Mapping[str, Weight],
    config: Mapping[str, Any],
    rename: tuple[str, str] | None = None,
) -> Fit:
    """Find the place of everything in `adapter` among the base's `tensors`.

    Raises FitError where a name is found but its shape does not fit, or where shapes cannot decide the orientation.
    """
    best: Fit | None = None
    least = (0, 0)  # names without a place, and tensors that would be new
    for drift in DRIFTS:
        names = _Names(tensors, drift, rename)
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


@dataclass(frozen=True)
class _Names:
    """Looks the adapter's names up in the base, by one drift and the user's rename."""

    tensors: Mapping[str, Weight]
    drift: dict[str, str]
    rename: tuple[str, str] | None
    segments: dict[str, bool] = field(default_factory=dict)  # what `lacks` found

    def to_base(self, name: str) -> str:
        name = apply_rename(name, self.rename)
        for ours, theirs in SEGMENTS.items():
            if f".{ours}." in f"{name}." and self.lacks(f".{ours}.") and not self.lacks(f".{theirs}."):
                name = apply_rename(name, (ours, theirs))
        for old in sorted(self.drift, key=len, reverse=True):
            if f"{name}.".startswith(old) and not (old == "" and name.split(".")[0] in HEAD_MODULES):
                return (self.drift[old] + f"{name}.".removeprefix(old)).removesuffix(".")
        return name

    def find(self, name: str) -> Weight | None:
        return self.tensors.get(name)

    def lacks(self, segment: str) -> bool:
        """Whether no tensor of the base has `segment` in its name."""
        if segment not in self.segments:
            self.segments[segment] = not any(segment in name for name in self.tensors)
        return self.segments[segment]


def _fit_names(adapter: Adapter, names: _Names, config: Mapping[str, Any]) -> Fit:
    targets: dict[str, tuple[Target, ...]] = {}
    biases, replaced, tokens, missing = {}, {}, {}, []
    orientations = _Orientations(config)
    found = {module: _find(names.to_base(module), weights, names) for module, weights in adapter.modules.items()}
    for module, weights in adapter.modules.items():
        orientations.learn(weights, found[module])
    for module, weights in adapter.modules.items():
        places = _places(module, names.to_base(module), weights, found[module], names, config, orientations)
        if not places:
            missing.append(module)
            continue
        targets[module] = places
        if weights.bias is not None:
            bias = names.to_base(module) + ".bias"
            if (info := names.find(bias)) is None or info.shape != weights.bias.shape:
                at = "no bias" if info is None else f"a bias of {info.shape}"
                raise FitError(f"{module}: the adapter has a lora_bias of {weights.bias.shape}, the base has {at}")
            biases[module] = bias
    for name in adapter.replaced:
        base = names.to_base(name)
        if base in names.tensors or _is_new(name, adapter):
            replaced[name] = base
        else:
            missing.append(name)
    for module in adapter.tokens:
        base = names.to_base(module) + ".weight"
        if base in names.tensors:
            tokens[module] = base
        else:
            missing.append(module)
    return Fit(targets, biases, replaced, tokens, tuple(missing), names.drift)


def _is_new(tensor: str, adapter: Adapter) -> bool:
    return any(f".{entry}." in f".{tensor}." for entry in adapter.new_modules)


def _find(base: str, weights: LoraWeights[LazyTensor], names: _Names) -> list[Weight]:
    """The base tensors by the module's own name that its Δ could be meant for."""
    base = base.replace(".base_layer", "")
    if weights.parameters != ("weight",):
        return [info for leaf in weights.parameters if (info := names.find(f"{base}.{leaf}"))]
    return [info for leaf in (".weight", "", ".in_proj_weight") if (info := names.find(base + leaf))][:1]


# --- shapes ----------------------------------------------------------------------------------------------------------


class _Orientations:
    """Whether linear weights are stored (out, in) or (in, out), learned from the modules that are not square."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type = config.get("model_type")
        self.seen: set[bool] = set()

    def learn(self, weights: LoraWeights[LazyTensor], found: list[Weight]) -> None:
        shape = (weights.out_features, weights.in_features)
        telling = weights.kind == "linear" and len(found) == 1 and shape[0] != shape[1]
        if telling and found[0].shape in (shape, shape[::-1]):
            self.seen.add(found[0].shape != shape)

    def of_square(self, module: str, weights: LoraWeights[LazyTensor]) -> bool:
        """Whether a square weight is stored transposed: by architecture, else by all the evidence there is."""
        if self.model_type is not None:
            return self.model_type in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_NAMES
        evidence = self.seen | {weights.fan_in_fan_out}
        if len(evidence) == 1:
            return evidence.pop()
        raise FitError(
            f"{module}: the weight is square, and other modules and fan_in_fan_out disagree about which way round "
            "it is stored. Put the base's config.json beside its weights: the architecture decides."
        )


def _places(
    module: str,
    base: str,
    weights: LoraWeights[LazyTensor],
    found: list[Weight],
    names: _Names,
    config: Mapping[str, Any],
    orientations: _Orientations,
) -> tuple[Target, ...]:
    """Every target of one module; empty where the base has no such name."""
    if weights.kind == "experts" or (weights.parameters != ("weight",) and not found):
        return _place_experts(module, base.replace(".base_layer", ""), weights, found, names)
    if weights.parameters != ("weight",):  # target_parameters on a plain matrix
        found = [info for info in found if info.shape == (weights.out_features, weights.in_features)]
        if len(found) > 1:
            raise FitError(f"{module}: {' and '.join(info.name for info in found)} both have the shape of Δ")
    if found:
        return (Target(found[0].name, transposed=_transposed(module, weights, found[0], orientations)),)
    return _place_in_fused(module, base, weights, names, config) or _place_over_parts(base, weights, names)


def _transposed(module: str, weights: LoraWeights[LazyTensor], info: Weight, orientations: _Orientations) -> bool:
    """Whether Δ is added transposed; raises FitError where the shapes do not fit at all."""
    delta = (weights.out_features, weights.in_features)
    if weights.kind == "embedding":
        if info.shape == delta[::-1]:
            return True
    elif weights.kind == "conv":
        if info.shape[2:] == weights.A.shape[2:] and info.shape[:2] == (delta[0], weights.A.shape[1]):
            return False
        groups = weights.A.shape[1] // info.shape[1] if len(info.shape) == len(weights.A.shape) and info.shape[1] else 0
        if groups > 1 and groups * info.shape[1] == weights.A.shape[1]:
            raise FitError(f"{module}: a convolution in {groups} groups ({info.shape}); merging those is not supported")
    elif info.shape in (delta, (*delta, 1), (*delta, 1, 1)):
        return orientations.of_square(module, weights) if info.shape == delta == delta[::-1] else False
    elif info.shape == delta[::-1]:
        return True
    stored = {"embedding": delta[::-1], "conv": (delta[0], *weights.A.shape[1:])}.get(weights.kind, delta)
    raise FitError(
        f"{module}: Δ is {stored}, the base weight is {info.shape}. Was this adapter trained on another base?"
    )


def _place_in_fused(
    module: str, base: str, weights: LoraWeights[LazyTensor], names: _Names, config: Mapping[str, Any]
) -> tuple[Target, ...]:
    """A split module on a fused base: q_proj is a row range of qkv_proj."""
    parent, _, leaf = base.rpartition(".")
    for fused, parts in FUSED.items():
        info = names.find(f"{parent}.{fused}.weight") or names.find(f"{parent}.{fused}_weight")
        if leaf not in parts or info is None or len(info.shape) < 2:
            continue
        sizes = _part_sizes(parts, info.shape[0], config)
        index = parts.index(leaf)
        if sizes is None or sizes[index] != weights.out_features or info.shape[1:] != (weights.in_features,):
            raise FitError(
                f"{module}: Δ is {(weights.out_features, weights.in_features)}; in the base it is part of {info.name} "
                f"{info.shape}, " + (f"rows split {sizes}" if sizes else "whose split its config does not tell")
            )
        start = sum(sizes[:index])
        return (Target(info.name, rows=(start, start + sizes[index])),)
    return ()


def _part_sizes(parts: tuple[str, ...], rows: int, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """How many rows each part of a fused projection has, or None where the config does not say."""
    if len(parts) == 2:
        return (rows // 2, rows // 2)
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


def _place_over_parts(base: str, weights: LoraWeights[LazyTensor], names: _Names) -> tuple[Target, ...]:
    """A fused module on a split base: each part takes its rows of Δ."""
    parent, _, leaf = base.rpartition(".")
    infos = [names.find(f"{parent}.{part}.weight") for part in FUSED.get(leaf, ())]
    found = [info for info in infos if info is not None and len(info.shape) > 1]
    return _over_rows(found, weights, None) if found and len(found) == len(infos) else ()


def _over_rows(infos: list[Weight], weights: LoraWeights[LazyTensor], expert: int | None) -> tuple[Target, ...]:
    rows, width = sum(info.shape[0] for info in infos), weights.in_features
    if rows != weights.out_features or any(info.shape[1:] != (width,) for info in infos):
        shapes = ", ".join(f"{info.name} {info.shape}" for info in infos)
        raise FitError(f"Δ is {(weights.out_features, width)}, which does not split over {shapes}")
    targets, start = [], 0
    for info in infos:
        targets.append(Target(info.name, of=(start, start + info.shape[0]), expert=expert))
        start += info.shape[0]
    return tuple(targets)


def _place_experts(
    module: str, base: str, weights: LoraWeights[LazyTensor], found: list[Weight], names: _Names
) -> tuple[Target, ...]:
    """Stacked experts: one range of rows for each in a 3-d tensor, or one tensor for each expert and part."""
    delta, experts = (weights.out_features, weights.in_features), weights.experts
    fitting = [info for info in found if info.shape in ((experts, *delta), (experts, *delta[::-1]))]
    if len(fitting) > 1 or (fitting and delta[0] == delta[1]):
        which = " or ".join(info.name for info in fitting)
        raise FitError(f"{module}: {experts} experts of {delta} fit {which} in more than one way; refused, not guessed")
    if fitting:
        info = fitting[0]
        height = info.shape[1]
        return tuple(
            Target(info.name, rows=(e * height, (e + 1) * height), expert=e, transposed=info.shape[1:] != delta)
            for e in range(experts)
        )
    if found:
        shapes = ", ".join(f"{info.name} {info.shape}" for info in found)
        raise FitError(f"{module}: {experts} experts of Δ {delta} fit none of {shapes}. Trained on another base?")
    layouts = [parts for leaf in weights.parameters for parts in PER_EXPERT.get(leaf, ())]
    split = [rows for parts in layouts if (rows := _per_expert(base, parts, weights, names))]
    if len(split) > 1:
        raise FitError(f"{module}: {experts} experts of {delta} fit {split[0][0][0].name} and {split[1][0][0].name}")
    return tuple(target for e, row in enumerate(split[0]) for target in _over_rows(row, weights, e)) if split else ()


def _per_expert(
    base: str, parts: tuple[str, ...], weights: LoraWeights[LazyTensor], names: _Names
) -> list[list[Weight]]:
    """The tensors of each expert, where the checkpoint has them apart and they add up to Δ; else nothing."""
    rows = [[names.find(f"{base}.{e}.{part}.weight") for part in parts] for e in range(weights.experts)]
    found = [[info for info in row if info and info.shape[1:] == (weights.in_features,)] for row in rows]
    whole = all(len(row) == len(parts) and sum(i.shape[0] for i in row) == weights.out_features for row in found)
    return found if whole else []
