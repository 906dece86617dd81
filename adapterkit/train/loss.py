"""Cross entropy over a large vocabulary in chunks of rows, without ever holding all logits.

The gradient of the logits is known in the forward pass, `∂L/∂z = softmax(z) − onehot`, so each chunk of logits becomes
its part of `∂L/∂h` (and of `∂L/∂W` if the output layer is trained) and is freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from adapterkit.train.products import times, times_transposed

IGNORED = -100  # label without a loss, as in torch and transformers
CHUNK = 1 << 23  # logits in memory at a time


def rows_at_a_time(vocabulary: int) -> int:
    """The number of rows of logits in a chunk."""
    return max(1, CHUNK // vocabulary)


def chunked_cross_entropy(h: torch.Tensor, W: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`L = Σ −log softmax(h·Wᵀ)[label]` over the labels that are not `IGNORED`.

    Args:
        h: Hidden states `(tokens, dim)`.
        W: The weight of the output layer, `(vocab, dim)`.
        labels: `(tokens,)`.

    Returns:
        The sum, float32, or float64 if `h` is.
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(h, W, labels)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(
    h: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`−log p(label)` `(tokens,)`, zero for ignored labels, and whether the label is the likeliest token."""
    losses = h.new_zeros(len(h), dtype=_wide(h.dtype))
    right = torch.zeros_like(labels, dtype=torch.bool)
    for at in torch.split((labels != IGNORED).nonzero()[:, 0], rows_at_a_time(vocabulary)):
        log_p = torch.log_softmax(logits(h[at]), dim=-1, dtype=losses.dtype)
        losses[at] = -log_p.gather(1, labels[at, None])[:, 0]
        right[at] = log_p.argmax(dim=1) == labels[at]
    return losses, right


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, W: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        counted = (labels != IGNORED).nonzero()[:, 0]
        needs_h, needs_W = ctx.needs_input_grad[:2]
        dh = torch.zeros_like(h) if needs_h else None
        dW = torch.zeros_like(W) if needs_W else None
        total = h.new_zeros((), dtype=_wide(h.dtype))
        for at in torch.split(counted, rows_at_a_time(len(W))):
            rows, targets = h[at], labels[at, None]
            log_p = torch.log_softmax(times_transposed(rows, W), dim=-1, dtype=total.dtype)
            total -= log_p.gather(1, targets).sum()
            if not (needs_h or needs_W):
                continue
            dz = log_p.exp_()
            dz.scatter_add_(1, targets, dz.new_full(targets.shape, -1.0))
            dz = dz.to(h.dtype)
            if dh is not None:
                dh[at] = times(dz, W)
            if dW is not None:
                dW += times_transposed(dz.t(), rows.t())
        ctx.save_for_backward(dh, dW)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dh, dW = ctx.saved_tensors
        return (*(None if d is None else d * grad.to(d.dtype) for d in (dh, dW)), None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def perplexity(loss: float) -> float:
    """`exp(loss)` of a mean loss; infinite where it overflows."""
    return math.exp(loss) if loss < 709 else math.inf
