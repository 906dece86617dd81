"""Put LoRA layers into a model, and make an adapter of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

from adapterkit.adapter.safe_regex import Patterns, compile_pattern
from adapterkit.adapter.weights import Adapter
from adapterkit.base.models.quantized_layers import is_quantized
from adapterkit.errors import FitError, FormatError, UsageError
from adapterkit.train.initial import Factors, loftq, start
from adapterkit.train.layers import LoraEmbedding, LoraLayer, LoraLinear, dense_of, is_linear, plain_layer
from adapterkit.train.recipe import FACTORED

T = TypeVar("T")

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Lora:
    """The target modules of a model and the kind of their factors.

    Args:
        targets: Names, matched whole or as dotted suffixes; `all-linear`; or a regular expression for the whole name.
        alpha: Twice the rank by default.
        layers: The numbers of the layers to train; all by default.
        rank_pattern, alpha_pattern: As in PEFT, the first key that matches the end of a module's name gives its rank
            or alpha.

    Raises:
        UsageError: An option is out of range, or a pattern is invalid.
    """

    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    alpha: float | None = None
    method: str = "lora"
    dropout: float = 0.0
    init: str = "kaiming"
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in FACTORED:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(FACTORED)}")
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"rank {self.rank}, dropout {self.dropout}: expected rank 1 or more, and 0 <= dropout < 1")
        try:  # fail before any module is matched
            if isinstance(self.targets, str):
                compile_pattern(self.targets)
            for patterns in (self.rank_pattern, self.alpha_pattern):
                Patterns.of(patterns)
        except FormatError as error:
            raise UsageError(f"targets and patterns: {error}") from error

    def rank_of(self, name: str) -> int:
        return _matching(self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        rank, alpha = self.rank_of(name), self.alpha if self.alpha is not None else 2.0 * self.rank
        return _matching(self.alpha_pattern, name, alpha) / (rank**0.5 if self.method == "rslora" else rank)

    def matches(self, name: str, layer: nn.Module, head: nn.Module | None) -> bool:
        """Whether the module `name` is a target."""
        if self.layers is not None and _number(name) not in self.layers:
            return False
        if self.targets == ALL_LINEAR:
            return is_linear(layer) and layer is not head
        if isinstance(self.targets, str):
            return compile_pattern(self.targets).matches(name)
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


def _matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    return Patterns.of(patterns).first(name, default)


def inject(
    model: nn.Module, lora: Lora, dtype: torch.dtype = torch.float32, seed: int = 0,
    original: Callable[[str], torch.Tensor] | None = None,
) -> list[str]:  # fmt: skip
    """Freeze `model` and add factors to the targets of `lora`.

    Args:
        dtype: The dtype of the factors.
        original: For LoftQ, returns the unquantized weight `(out, in)` of a module.

    Returns:
        The names of the modules with factors.

    Raises:
        UsageError: Nothing matches, or a target is of a kind that cannot have factors.
    """
    targets, generator = _targets(model, lora), torch.Generator().manual_seed(seed)
    if lora.init == "loftq" and not (original is not None and all(is_quantized(layer) for layer in targets.values())):
        raise UsageError("init loftq compensates for quantization: it needs a 16-bit base and `quantize`")
    model.requires_grad_(False)
    for name, layer in targets.items():
        rank, scaling, embedding = lora.rank_of(name), lora.scaling_of(name), isinstance(layer, nn.Embedding)
        W = _matrix(layer)
        if lora.init == "loftq" and original is not None:
            factors = loftq(original(name), W, rank, scaling, name)
        else:
            factors = start(lora.init, W, rank, scaling, generator, embedding, name)
        kind = LoraEmbedding if embedding else LoraLinear
        _replace(model, name, kind(layer, factors.to(W.device, dtype), scaling, lora.dropout, lora.method == "dora"))
    return list(targets)


def _targets(model: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The target modules; raises UsageError where part of `lora` matches none, or one that cannot have factors."""
    names = [name for name, _ in model.named_modules()]
    head, numbers = _head(model), {_number(name) for name in names}
    try:
        for patterns in (lora.rank_pattern, lora.alpha_pattern):
            Patterns.of(patterns).check(names)
    except FormatError as error:
        raise UsageError(f"patterns: {error}") from error
    for number in lora.layers or ():
        if number not in numbers:
            raise UsageError(f"layers: the model has no layer {number}")
    targets = {name: layer for name, layer in model.named_modules() if lora.matches(name, layer, head)}
    if isinstance(lora.targets, tuple):
        for target in lora.targets:
            if not any(name == target or name.endswith(f".{target}") for name in targets):
                raise UsageError(f"targets: no module is named {target!r}; the model has {_leaves(model)}")
    if not targets:
        raise UsageError(f"targets: no module matches {lora.targets!r}; the model has {_leaves(model)}")
    for key in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(_matching({key: True}, name, False) for name in targets):
            example = next(iter(targets))
            raise UsageError(f"pattern {key!r}: matches none of the {len(targets)} targets, such as {example}")
    for name, layer in targets.items():
        if not is_linear(layer) and not isinstance(layer, nn.Embedding):
            raise UsageError(f"{name}: a {type(layer).__name__} cannot have factors; {_leaves(model)} can")
    return targets


def _number(name: str) -> int | None:
    """The layer number in a module's name: the first number, not that of an expert."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def inject_from(
    model: nn.Module, adapter: Adapter, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze `model` and add the factors of `adapter`, to continue training; raises FitError where they do not fit."""
    whole = [*adapter.replaced, *adapter.tokens, *(n for n, w in adapter.modules.items() if w.bias is not None)]
    if whole:
        raise FitError(f"{whole[0]}: the adapter trains this tensor in full; only factors and magnitudes can continue")
    model.requires_grad_(False)
    layers = dict(model.named_modules())
    for name in adapter.modules:
        weights, layer = adapter[name], layers.get(name)
        if layer is None or not (isinstance(layer, nn.Embedding) or is_linear(layer)):
            raise FitError(f"{name}: the model has no such layer; was the adapter trained on another base?")
        W = _matrix(layer)
        if W.shape != (weights.out_features, weights.in_features):
            raise FitError(f"{name}: Δ is {(weights.out_features, weights.in_features)}, the layer is {tuple(W.shape)}")
        factors = Factors(weights.A, weights.B).to(W.device, dtype)
        kind = LoraEmbedding if isinstance(layer, nn.Embedding) else LoraLinear
        lora = kind(layer, factors, weights.scaling, dropout, weights.magnitude is not None)
        if lora.magnitude is not None and weights.magnitude is not None:
            lora.magnitude.data.copy_(weights.magnitude)
        _replace(model, name, lora)
    return list(adapter.modules)


def use_fast_products(model: nn.Module) -> None:
    """Compute the linear layers without factors by the products of `products`, except the output layer."""
    head = _head(model)
    for layer in model.modules():
        if is_linear(layer) and layer is not head:
            layer.forward = partial(plain_layer, layer)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of `model`, by the names of the modules they replace."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def adapter_of(model: nn.Module, base_model: str | None = None) -> Adapter:
    """The factors in `model` as an adapter, for `adapterkit.save`."""
    modules = {name: layer.weights() for name, layer in lora_layers(model).items()}
    return Adapter("", modules, base_model=base_model)


class disabled:
    """A context in which `model` computes like its base."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(lora_layers(model).values())

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.enabled = False

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.enabled = True


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model, which computes the logits."""
    head: nn.Module | None = (
        cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    )
    return head


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer, oriented like Δ: `(out, in)`, or for an embedding `(dim, vocab)`."""
    return layer.weight.t() if isinstance(layer, nn.Embedding) else dense_of(layer)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    layer.train(model.get_submodule(name).training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _leaves(model: nn.Module) -> str:
    """The leaf names of all layers that can have factors."""
    names = (name for name, layer in model.named_modules() if is_linear(layer))
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no linear layers"
