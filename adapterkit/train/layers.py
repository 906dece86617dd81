"""LoRA layers: low-rank factors beside the frozen weight of the base.

LoRA (arXiv 2106.09685): `y = x·Wᵀ + s·x·Aᵀ·Bᵀ`, `s = alpha / rank`, with rsLoRA `alpha / √rank` (arXiv 2312.03732).
DoRA (arXiv 2402.09353): rows scaled by `m / ‖W + s·B·A‖`. Dropout applies to the input of the factors, not of the base.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.base.models.quantized_layers import dequantized, is_quantized
from adapterkit.train.initial import Factors
from adapterkit.train.products import dora, gain, low_rank, plain, times_transposed

NORM_ELEMENTS = 1 << 18  # weight elements cast to the factors' dtype at a time
CANCELLED = 1e-2  # below this share of ‖W_i‖², the squared norm of a row is computed directly


class LoraLayer(nn.Module):
    """Base class of LoRA layers; `A (rank, in)`, `B (out, rank)`, `magnitude (out,)`."""

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter | None
    first_A: torch.Tensor | None  # initial factors subtracted from the base: Δ = s·(B·A − B₀·A₀)
    first_B: torch.Tensor | None

    def __init__(self, base: nn.Module, factors: Factors, scaling: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        self.A, self.B = nn.Parameter(factors.A.contiguous()), nn.Parameter(factors.B.contiguous())
        self.register_buffer("first_A", factors.A.clone() if factors.subtracted else None)
        self.register_buffer("first_B", factors.B.clone() if factors.subtracted else None)
        self.enabled = True
        self._squares: torch.Tensor | None = None  # ‖W_i‖², computed once: W is frozen
        self.magnitude = None
        if dora:
            self.magnitude = nn.Parameter(self.norm())

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for models that read it."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast("torch.Tensor | None", getattr(self.base, "bias", None))

    def dense(self) -> torch.Tensor:
        """The base's weight as `(out, in)`."""
        raise NotImplementedError

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `B` with `s·B·A = Δ`; subtracted initial factors are appended with a minus."""
        if self.first_A is None or self.first_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """The row norms `n_i = ‖W_i + s·B_i·A‖₂ (out,)`, without forming B·A.

        `n_i² = ‖W_i‖² + 2s·(W·Aᵀ)_i·B_i + s²·B_i·(A·Aᵀ)·B_iᵀ`; rows where this cancels are computed directly.
        """
        A, B = self.factors()
        W, left = self.dense(), B * self.scaling
        step = max(1, NORM_ELEMENTS // A.shape[1])
        spans = [slice(first, first + step) for first in range(0, len(W), step)]
        if self._squares is None or self._squares.dtype != A.dtype or self._squares.device != A.device:
            self._squares = torch.cat([W[span].to(A.dtype).square().sum(1) for span in spans])
        crossed = torch.cat([times_transposed(W[span].to(A.dtype), A) for span in spans])
        squares = self._squares + ((2 * crossed + left @ (A @ A.t())) * left).sum(1)
        cancelled = (squares < CANCELLED * self._squares).nonzero()[:, 0]
        if len(cancelled):
            squares[cancelled] = (W[cancelled].to(A.dtype) + left[cancelled] @ A).square().sum(1)
        return squares.clamp_(min=0.0).sqrt_()

    def weights(self) -> LoraWeights[LazyTensor]:
        """The factors in the form that an adapter holds."""
        A, B = (factor.detach().contiguous() for factor in self.factors())
        magnitude = None if self.magnitude is None else LazyTensor.of(self.magnitude.detach())
        return LoraWeights(
            LazyTensor.of(A), LazyTensor.of(B), self.scaling, magnitude=magnitude,
            kind="embedding" if isinstance(self, LoraEmbedding) else "linear", fan_in_fan_out=is_conv1d(self.base),
        )  # fmt: skip


class LoraLinear(LoraLayer):
    """A linear layer, a transformers Conv1D or a quantized bitsandbytes layer, with factors."""

    def dense(self) -> torch.Tensor:
        return dense_of(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return cast(torch.Tensor, self.base(x))
        flat = x.reshape(-1, x.shape[-1])
        mask = _dropout_mask(flat, self.dropout) if self.training and self.dropout else None
        A, B = self.factors()
        if self.magnitude is None:
            y = low_rank(flat, A, B, mask, self.scaling, self.dense)
        else:
            y = dora(flat, A, B, mask, self.scaling, self.dense, self.magnitude, self.norm())
        return _with_bias(y, self.base).view(*x.shape[:-1], y.shape[1])


class LoraEmbedding(LoraLayer):
    """An embedding with factors: `Δ = s·B·A` is added transposed; `A (rank, vocab)`, `B (dim, rank)`."""

    def dense(self) -> torch.Tensor:
        return self.weight.t()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = cast(torch.Tensor, self.base(ids))
        if not self.enabled:
            return y
        A, B = self.factors()
        embedded = F.embedding(ids, A.t())
        scale = torch.as_tensor(getattr(self.base, "embed_scale", 1.0)).to(y.dtype)  # Gemma 3 scales embeddings
        y = y + ((F.dropout(embedded, self.dropout, self.training) @ B.t()) * (self.scaling * scale)).to(y.dtype)
        return y if self.magnitude is None else (y * gain(self.magnitude, self.norm())).to(y.dtype)


def plain_layer(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a base linear layer by `products`; its weight has a gradient if it requires one."""
    weight = cast(torch.Tensor, layer.weight)
    W = dense_of(layer) if weight.requires_grad else None
    y = plain(x.reshape(-1, x.shape[-1]), W, partial(dense_of, layer))
    return _with_bias(y, layer).view(*x.shape[:-1], y.shape[1])


def _with_bias(y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    bias = cast("torch.Tensor | None", layer.bias)
    return y if bias is None else y + bias.to(y.dtype)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is a transformers Conv1D, whose weight is `(in, out)`."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether `LoraLinear` can replace `layer`."""
    return type(layer) is nn.Linear or is_conv1d(layer) or is_quantized(layer)


def dense_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as `(out, in)`: a view, or dequantized."""
    if is_quantized(layer):
        return dequantized(layer)
    weight = cast(torch.Tensor, layer.weight)
    return weight.t() if is_conv1d(layer) else weight


def _dropout_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """A mask of the shape of `x`: 0 with probability p, else 1 / (1 − p)."""
    return torch.empty_like(x).bernoulli_(1.0 - dropout).div_(1.0 - dropout)
