"""Layers with factors of a low rank beside the base's frozen weight, and how a model gets them.

LoRA (arXiv 2106.09685): `y = x·Wᵀ + s·x·Aᵀ·Bᵀ`, `s = alpha / rank`, with rsLoRA `alpha / √rank` (arXiv 2312.03732).
DoRA (arXiv 2402.09353): rows scaled to `m / ‖W + s·B·A‖`. Dropout acts on what the factors see, never on the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from adapterkit.adapter import Adapter, LazyTensor, LoraWeights
from adapterkit.errors import FitError, UsageError
from adapterkit.quant.modules import dequantized, is_quantized
from adapterkit.recipe import FACTORED
from adapterkit.train.initial import Factors, loftq, start
from adapterkit.train.products import directed, gain, low_rank, plain, times_transposed

T = TypeVar("T")

ALL_LINEAR = "all-linear"
NORM_ELEMENTS = 1 << 18  # of a weight in the factors' precision at a time
CANCELLED = 1e-2  # of ‖W_i‖²: rows whose squared norm is less are taken directly


@dataclass(frozen=True, slots=True)
class Lora:
    """Which layers of a model get factors, and of which kind.

    `targets`: names, matched whole or as dotted suffixes; `all-linear`; or a regular expression for the whole name.
    Patterns are PEFT's: the first key that matches the end of a module's name gives its rank or alpha.
    """

    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    alpha: float | None = None  # twice the rank
    method: str = "lora"
    dropout: float = 0.0
    init: str = "kaiming"
    layers: tuple[int, ...] | None = None  # the numbers of the layers, or all
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in FACTORED:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(FACTORED)}")
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"rank {self.rank}, dropout {self.dropout}: expected 1 or more, and 0 up to 1")

    def rank_of(self, name: str) -> int:
        return _matching(self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        rank, alpha = self.rank_of(name), self.alpha if self.alpha is not None else 2.0 * self.rank
        return _matching(self.alpha_pattern, name, alpha) / (rank**0.5 if self.method == "rslora" else rank)

    def wants(self, name: str, layer: nn.Module, head: nn.Module | None) -> bool:
        """Whether the module called `name` is among the targets."""
        if self.layers is not None and _number(name) not in self.layers:
            return False
        if self.targets == ALL_LINEAR:
            return is_linear(layer) and layer is not head
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


def _matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


# --- layers ----------------------------------------------------------------------------------------------------------


class LoraLayer(nn.Module):
    """What linear layers and embeddings have in common; `A (rank, in)`, `B (out, rank)`, `magnitude (out,)`."""

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter | None
    first_A: torch.Tensor | None  # with them the base is as it was: Δ = s·(B·A − B₀·A₀)
    first_B: torch.Tensor | None

    def __init__(self, base: nn.Module, factors: Factors, scaling: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        self.A, self.B = nn.Parameter(factors.A.contiguous()), nn.Parameter(factors.B.contiguous())
        self.register_buffer("first_A", factors.A.clone() if factors.subtracted else None)
        self.register_buffer("first_B", factors.B.clone() if factors.subtracted else None)
        self.enabled = True
        self._squares: torch.Tensor | None = None  # ‖W_i‖², of a weight that stays as it is
        self.magnitude = None
        if dora:
            self.magnitude = nn.Parameter(self.norm())

    @property
    def weight(self) -> torch.Tensor:
        """The base's own, for models that look at it."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast("torch.Tensor | None", getattr(self.base, "bias", None))

    def dense(self) -> torch.Tensor:
        """The base's weight as `(out, in)`."""
        raise NotImplementedError

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `B` with `s·B·A = Δ`: where the base was changed by what they began as, that is taken off again."""
        if self.first_A is None or self.first_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """`n_i = ‖W_i + s·B_i·A‖₂ (out,)`, without forming B·A:

        `n_i² = ‖W_i‖² + 2s·(W·Aᵀ)_i·B_i + s²·B_i·(A·Aᵀ)·B_iᵀ`; directly in rows where that cancels.
        """
        A, B = self.factors()
        W, left = self.dense(), B * self.scaling
        step = max(1, NORM_ELEMENTS // A.shape[1])
        spans = [slice(first, first + step) for first in range(0, len(W), step)]
        if self._squares is None or self._squares.dtype != A.dtype or self._squares.device != A.device:
            self._squares = torch.cat([W[span].to(A.dtype).square().sum(1) for span in spans])
        crossed = torch.cat([times_transposed(W[span].to(A.dtype), A) for span in spans])
        found = self._squares + ((2 * crossed + left @ (A @ A.t())) * left).sum(1)
        weak = (found < CANCELLED * self._squares).nonzero()[:, 0]
        if len(weak):
            found[weak] = (W[weak].to(A.dtype) + left[weak] @ A).square().sum(1)
        return found.clamp_(min=0.0).sqrt_()

    def weights(self) -> LoraWeights[LazyTensor]:
        """The factors as an adapter holds them."""
        A, B = (factor.detach().contiguous() for factor in self.factors())
        magnitude = None if self.magnitude is None else LazyTensor.of(self.magnitude.detach())
        return LoraWeights(
            LazyTensor.of(A), LazyTensor.of(B), self.scaling, magnitude=magnitude,
            kind="embedding" if isinstance(self, LoraEmbedding) else "linear", fan_in_fan_out=is_conv1d(self.base),
        )  # fmt: skip


class LoraLinear(LoraLayer):
    """A linear layer, a Conv1D of transformers, or a quantized layer of bitsandbytes, with factors."""

    def dense(self) -> torch.Tensor:
        return dense_of(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return cast(torch.Tensor, self.base(x))
        flat = x.reshape(-1, x.shape[-1])
        kept = _kept(flat, self.dropout) if self.training and self.dropout else None
        A, B = self.factors()
        if self.magnitude is None:
            y = low_rank(flat, A, B, kept, self.scaling, self.dense)
        else:
            y = directed(flat, A, B, kept, self.scaling, self.dense, self.magnitude, self.norm())
        return _with_bias(y, self.base).view(*x.shape[:-1], y.shape[1])


class LoraEmbedding(LoraLayer):
    """An embedding with factors: `Δ = s·B·A` is added transposed, `A (rank, vocabulary)` and `B (dim, rank)`."""

    def dense(self) -> torch.Tensor:
        return self.weight.t()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = cast(torch.Tensor, self.base(ids))
        if not self.enabled:
            return y
        A, B = self.factors()
        seen = F.embedding(ids, A.t())
        scale = torch.as_tensor(getattr(self.base, "embed_scale", 1.0)).to(y.dtype)  # Gemma 3 multiplies by it
        y = y + ((F.dropout(seen, self.dropout, self.training) @ B.t()) * (self.scaling * scale)).to(y.dtype)
        return y if self.magnitude is None else (y * gain(self.magnitude, self.norm())).to(y.dtype)


def plain_layer(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer of the base computes, by the products of `products`; trained if its weight is."""
    weight = cast(torch.Tensor, layer.weight)
    W = dense_of(layer) if weight.requires_grad else None
    y = plain(x.reshape(-1, x.shape[-1]), W, partial(dense_of, layer))
    return _with_bias(y, layer).view(*x.shape[:-1], y.shape[1])


def _with_bias(y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    bias = cast("torch.Tensor | None", layer.bias)
    return y if bias is None else y + bias.to(y.dtype)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D, whose weight is `(in, out)`."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is one that `LoraLinear` can stand for."""
    return type(layer) is nn.Linear or is_conv1d(layer) or is_quantized(layer)


def dense_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as `(out, in)`: a view, or dequantized."""
    if is_quantized(layer):
        return dequantized(layer)
    weight = cast(torch.Tensor, layer.weight)
    return weight.t() if is_conv1d(layer) else weight


def _kept(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """What dropout keeps of x, as factors: 0, or 1 / (1 − p)."""
    return torch.empty_like(x).bernoulli_(1.0 - dropout).div_(1.0 - dropout)


# --- models ----------------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module, lora: Lora, dtype: torch.dtype = torch.float32, seed: int = 0,
    original: Callable[[str], torch.Tensor] | None = None,
) -> list[str]:  # fmt: skip
    """Freeze `model` and give the targets of `lora` factors in `dtype`; the names of the modules that got them.

    `original` gives, for LoftQ, the weight of a module `(out, in)` before it was quantized. Raises UsageError where
    nothing matches, or a target is of a kind that takes no factors.
    """
    found, generator = _targets(model, lora), torch.Generator().manual_seed(seed)
    if lora.init == "loftq" and not (original is not None and all(is_quantized(layer) for layer in found.values())):
        raise UsageError("init loftq makes up for quantizing: it needs a 16-bit base and --quantize")
    model.requires_grad_(False)
    for name, layer in found.items():
        rank, scaling, embedding = lora.rank_of(name), lora.scaling_of(name), isinstance(layer, nn.Embedding)
        W = _matrix(layer)
        if lora.init == "loftq" and original is not None:
            factors = loftq(original(name), W, rank, scaling, name)
        else:
            factors = start(lora.init, W, rank, scaling, generator, embedding, name)
        kind = LoraEmbedding if embedding else LoraLinear
        _put(model, name, kind(layer, factors.to(W.device, dtype), scaling, lora.dropout, lora.method == "dora"))
    return list(found)


def _targets(model: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The modules that are to get factors; raises UsageError where a part of `lora` means none, or one that cannot."""
    head, numbers = _head(model), {_number(name) for name, _ in model.named_modules()}
    for number in lora.layers or ():
        if number not in numbers:
            raise UsageError(f"layers: the model has no layer {number}")
    found = {name: layer for name, layer in model.named_modules() if lora.wants(name, layer, head)}
    if isinstance(lora.targets, tuple):
        for target in lora.targets:
            if not any(name == target or name.endswith(f".{target}") for name in found):
                raise UsageError(f"targets: no module is called {target!r}; there are {_leaves(model)}")
    if not found:
        raise UsageError(f"targets: nothing matches {lora.targets!r}; there are {_leaves(model)}")
    for key in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(_matching({key: True}, name, False) for name in found):
            raise UsageError(f"pattern {key!r}: matches none of the {len(found)} targets, such as {next(iter(found))}")
    for name, layer in found.items():
        if not is_linear(layer) and not isinstance(layer, nn.Embedding):
            raise UsageError(f"{name}: is a {type(layer).__name__}, which takes no factors; {_leaves(model)} can")
    return found


def _number(name: str) -> int | None:
    """The number of the layer that a module is in, not of the expert."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def inject_from(
    model: nn.Module, adapter: Adapter, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze `model` and give it the factors of `adapter`, to go on training; raises FitError where they do not fit."""
    beside = [*adapter.replaced, *adapter.tokens, *(n for n, w in adapter.modules.items() if w.bias is not None)]
    if beside:
        raise FitError(
            f"{beside[0]}: is trained whole in this adapter; only factors and magnitudes can be gone on with"
        )
    model.requires_grad_(False)
    layers = dict(model.named_modules())
    for name in adapter.modules:
        weights, layer = adapter[name], layers.get(name)
        if layer is None or not (isinstance(layer, nn.Embedding) or is_linear(layer)):
            raise FitError(f"{name}: the model has no such layer. Was this adapter trained on another base?")
        W = _matrix(layer)
        if W.shape != (weights.out_features, weights.in_features):
            raise FitError(f"{name}: Δ is {(weights.out_features, weights.in_features)}, the layer is {tuple(W.shape)}")
        factors = Factors(weights.A, weights.B).to(W.device, dtype)
        kind = LoraEmbedding if isinstance(layer, nn.Embedding) else LoraLinear
        made = kind(layer, factors, weights.scaling, dropout, weights.magnitude is not None)
        if made.magnitude is not None and weights.magnitude is not None:
            made.magnitude.data.copy_(weights.magnitude)
        _put(model, name, made)
    return list(adapter.modules)


def quicken(model: nn.Module) -> None:
    """Have the linear layers without factors computed by the products of `products`, but for the output layer."""
    head = _head(model)
    for layer in model.modules():
        if is_linear(layer) and layer is not head:
            layer.forward = partial(plain_layer, layer)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with factors, by the name of the module they stand for."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def adapter_of(model: nn.Module, base_model: str | None = None, config: Mapping[str, Any] | None = None) -> Adapter:
    """The factors in `model` as an adapter, which `adapterkit.save` writes."""
    modules = {name: layer.weights() for name, layer in lora_layers(model).items()}
    return Adapter("peft", modules, base_model=base_model, config=dict(config or {}))


class disabled:
    """A context in which `model` computes as its base does."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(lora_layers(model).values())

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.enabled = False

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.enabled = True


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, of a model of transformers."""
    made: nn.Module | None = (
        cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    )
    return made


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer or an embedding as Δ is added to it: `(out, in)`, in being the vocabulary."""
    return layer.weight.t() if isinstance(layer, nn.Embedding) else dense_of(layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    layer.train(model.get_submodule(name).training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _leaves(model: nn.Module) -> str:
    """The last parts of the names of all layers that can have factors."""
    names = (name for name, layer in model.named_modules() if is_linear(layer))
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no linear layers"
