"""The products that training spends its time in, with gradients written by hand.

`W (out, in)` is the base's weight, `A (rank, in)`, `B (out, rank)`, `x (tokens, in)`, `y (tokens, out)`. Autograd would
keep every intermediate and form what nobody needs; here a layer keeps `x` and `h = x·Aᵀ`, and brackets its gradients so
that nothing of out × in is formed: with `G = ∂L/∂y`, `∂L/∂A = s·(G·B)ᵀ·x`, `∂L/∂B = s·Gᵀ·h` and
`∂L/∂x = G·W + s·(G·B)·A`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# The base's weight when it is needed: one that is stored in 4 bits is dequantized anew each time rather than kept.
Dense = Callable[[], torch.Tensor]


def times_transposed(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`x·Wᵀ` for `x (n, k)` and `W (m, k)`, without a gradient.

    In float32 on a CPU by oneDNN, whose kernels use all that the processor has; MKL, which torch calls by default,
    leaves half of an AMD processor's width unused. (It refuses empty sums, and to be compiled.)
    """
    on_cpu = x.dtype is torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and x.numel() and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")
        return found
    return F.linear(x, W)


def times(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`x·W` for `x (n, k)` and `W (k, m)`, without a gradient."""
    return times_transposed(x, W.t())


def plain(x: torch.Tensor, W: torch.Tensor | None, dense: Dense) -> torch.Tensor:
    """`y = x·Wᵀ`: a layer of the base, frozen, or in full fine-tuning `W` itself, trained."""
    y: torch.Tensor = _apply(_Plain, x, W, dense)
    return y


def low_rank(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept: torch.Tensor | None, scaling: float, dense: Dense
) -> torch.Tensor:
    """`y = x·Wᵀ + s·(k∘x)·Aᵀ·Bᵀ`, where `k` is what dropout keeps, scaled up, or nothing.

    The factors may be wider than x, which is then not copied: they are narrowed.
    """
    y: torch.Tensor = _apply(_LowRank, x, A, B, kept, scaling, dense)
    return y


def directed(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept: torch.Tensor | None, scaling: float, dense: Dense,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`y = (m / n)∘(x·Wᵀ + s·(k∘x)·Aᵀ·Bᵀ)`: DoRA, where the norm `n (out,)` counts as constant (arXiv 2402.09353, 4.3).

    `∂L/∂m = Σ G∘y / m`, from the output itself, which most activations keep anyway.
    """
    y: torch.Tensor = _apply(_Directed, x, A, B, kept, scaling, dense, magnitude, norm)
    return y


# What lies between the products can be compiled; these are as fast as they get.
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
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept: torch.Tensor | None, scaling: float,
        dense: Dense,
    ) -> torch.Tensor:  # fmt: skip
        y, h = _forward(x, A, B, kept, scaling, dense)
        ctx.save_for_backward(x, h, A, B, kept)
        ctx.scaling, ctx.dense = scaling, dense
        return y

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_backward(ctx.saved_tensors, G, ctx.scaling, ctx.dense, ctx.needs_input_grad[0]), None, None, None)


class _Directed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept: torch.Tensor | None, scaling: float,
        dense: Dense, magnitude: torch.Tensor, norm: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        v, h = _forward(x, A, B, kept, scaling, dense)
        y = v.mul_(gain(magnitude, norm))  # in its own precision: it is near 1, where 16 bits are coarse
        ctx.save_for_backward(x, h, A, B, kept, y, magnitude, norm)
        ctx.scaling, ctx.dense = scaling, dense
        return y

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *factors, y, magnitude, norm = ctx.saved_tensors
        dm = (G * y).sum(0, dtype=magnitude.dtype) / magnitude.where(magnitude != 0, torch.inf)
        directed = torch.mul(G, gain(magnitude, norm), out=G.new_empty(G.shape))
        grads = _backward(factors, directed, ctx.scaling, ctx.dense, ctx.needs_input_grad[0])
        return (*grads, None, None, None, dm, None)


def _forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept: torch.Tensor | None, scaling: float, dense: Dense
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y`, and `h = (k∘x)·Aᵀ`."""
    y = times_transposed(x, dense())
    h = times_transposed(x if kept is None else x * kept, A.to(x.dtype))
    return y.addmm_(h, B.to(x.dtype).t(), alpha=scaling), h


def _backward(
    saved: Any, G: torch.Tensor, scaling: float, dense: Dense, through: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of x, where something `through` it is trained, A and B."""
    x, h, A, B, kept = saved
    g = times(G, B.to(G.dtype)).mul_(scaling)
    dA = times_transposed(g.t(), (x if kept is None else x * kept).t())
    dB = times_transposed(h.t(), G.t()).mul_(scaling).t()
    dx = None
    if through and kept is None:
        dx = times(G, dense()).addmm_(g, A.to(G.dtype))
    elif through:
        dx = times(G, dense()).addcmul_(times(g, A.to(G.dtype)), kept)
    return dx, dA.to(A.dtype), dB.to(B.dtype)
