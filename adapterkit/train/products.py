"""The matrix products of training, with hand-written gradients.

`W (out, in)` is the base's weight, `A (rank, in)`, `B (out, rank)`, `x (tokens, in)`, `y (tokens, out)`. Autograd would
save every intermediate and form unneeded products; here a layer saves `x` and `h = x·Aᵀ`, and the gradients are
bracketed to form no out × in matrix: with `G = ∂L/∂y`, `∂L/∂A = s·(G·B)ᵀ·x`, `∂L/∂B = s·Gᵀ·h` and
`∂L/∂x = G·W + s·(G·B)·A`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Returns the base's weight; a 4-bit weight is dequantized on each call instead of held in memory.
Dense = Callable[[], torch.Tensor]


def times_transposed(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`x·Wᵀ` for `x (n, k)` and `W (m, k)`, without a gradient.

    Float32 on a CPU uses oneDNN, whose kernels use the full vector width; MKL, torch's default, uses only half of it
    on AMD processors. oneDNN supports neither empty sums nor torch.compile.
    """
    on_cpu = x.dtype is torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and x.numel() and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")
        return y
    return F.linear(x, W)


def times(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`x·W` for `x (n, k)` and `W (k, m)`, without a gradient."""
    return times_transposed(x, W.t())


def plain(x: torch.Tensor, W: torch.Tensor | None, dense: Dense) -> torch.Tensor:
    """`y = x·Wᵀ`, a layer of the base; `W` is given where it is trained (full fine-tuning), None where it is frozen."""
    y: torch.Tensor = _apply(_Plain, x, W, dense)
    return y


def low_rank(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout_mask: torch.Tensor | None, scaling: float, dense: Dense
) -> torch.Tensor:
    """LoRA: `y = x·Wᵀ + s·(k∘x)·Aᵀ·Bᵀ`, `k` the dropout mask, or None.

    The factors may have a wider dtype than x: they are cast down, x is not copied.
    """
    y: torch.Tensor = _apply(_LowRank, x, A, B, dropout_mask, scaling, dense)
    return y


def dora(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout_mask: torch.Tensor | None, scaling: float, dense: Dense,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """DoRA: `y = (m / n)∘(x·Wᵀ + s·(k∘x)·Aᵀ·Bᵀ)`, the norm `n (out,)` treated as constant (arXiv 2402.09353, 4.3).

    `∂L/∂m = Σ G∘y / m` uses the output, which most activations save anyway.
    """
    y: torch.Tensor = _apply(_Dora, x, A, B, dropout_mask, scaling, dense, magnitude, norm)
    return y


# Compiling the products gains nothing; the code between them can be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(function: type[torch.autograd.Function], *args: object) -> torch.Tensor:
    y: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return y


def gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`m / n`; a row of zeros has no direction and stays zero, as in a merge."""
    return magnitude / norm.where(norm > 0, torch.inf)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor | None, dense: Dense) -> torch.Tensor:
        ctx.dense = dense
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return times_transposed(x, dense())

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = times(G, ctx.dense()) if ctx.needs_input_grad[0] else None
        dW = None if x is None else times_transposed(G.t(), x.t())
        return dx, dW, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout_mask: torch.Tensor | None, scaling: float,
        dense: Dense,
    ) -> torch.Tensor:  # fmt: skip
        y, h = _forward(x, A, B, dropout_mask, scaling, dense)
        ctx.save_for_backward(x, h, A, B, dropout_mask)
        ctx.scaling, ctx.dense = scaling, dense
        return y

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_backward(ctx.saved_tensors, G, ctx.scaling, ctx.dense, ctx.needs_input_grad[0]), None, None, None)


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout_mask: torch.Tensor | None, scaling: float,
        dense: Dense, magnitude: torch.Tensor, norm: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        v, h = _forward(x, A, B, dropout_mask, scaling, dense)
        y = v.mul_(gain(magnitude, norm))  # not cast to 16 bits, which are coarse near 1
        ctx.save_for_backward(x, h, A, B, dropout_mask, y, magnitude, norm)
        ctx.scaling, ctx.dense = scaling, dense
        return y

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *factors, y, magnitude, norm = ctx.saved_tensors
        dm = (G * y).sum(0, dtype=magnitude.dtype) / magnitude.where(magnitude != 0, torch.inf)
        scaled = torch.mul(G, gain(magnitude, norm), out=G.new_empty(G.shape))
        grads = _backward(factors, scaled, ctx.scaling, ctx.dense, ctx.needs_input_grad[0])
        return (*grads, None, None, None, dm, None)


def _forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout_mask: torch.Tensor | None, scaling: float, dense: Dense
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y`, and `h = (k∘x)·Aᵀ`."""
    y = times_transposed(x, dense())
    h = times_transposed(x if dropout_mask is None else x * dropout_mask, A.to(x.dtype))
    return y.addmm_(h, B.to(x.dtype).t(), alpha=scaling), h


def _backward(
    saved: Any, G: torch.Tensor, scaling: float, dense: Dense, needs_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of x (None unless `needs_dx`), A and B."""
    x, h, A, B, dropout_mask = saved
    g = times(G, B.to(G.dtype)).mul_(scaling)
    dA = times_transposed(g.t(), (x if dropout_mask is None else x * dropout_mask).t())
    dB = times_transposed(h.t(), G.t()).mul_(scaling).t()
    dx = None
    if needs_dx and dropout_mask is None:
        dx = times(G, dense()).addmm_(g, A.to(G.dtype))
    elif needs_dx:
        dx = times(G, dense()).addcmul_(times(g, A.to(G.dtype)), dropout_mask)
    return dx, dA.to(A.dtype), dB.to(B.dtype)
