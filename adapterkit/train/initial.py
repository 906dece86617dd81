"""Initializations of the factors, each one function of the base weight `W (out, in)`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adapterkit.algebra.sketch import Matrix, sketch
from adapterkit.algebra.truncation import Limit
from adapterkit.errors import UsageError
from adapterkit.train.recipe import INITS


@dataclass(frozen=True, slots=True)
class Factors:
    """`A (rank, in)` and `B (out, rank)`; if `subtracted`, the base is reduced by their initial product."""

    A: torch.Tensor
    B: torch.Tensor
    subtracted: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """The same factors on another device, in another dtype."""
        return Factors(self.A.to(device, dtype), self.B.to(device, dtype), self.subtracted)


def start(
    init: str, W: torch.Tensor, rank: int, scaling: float, generator: torch.Generator, embedding: bool, name: str
) -> Factors:
    """The initial factors of module `name` on the CPU, by one of `INITS`; `generator` is a CPU generator."""
    if init not in INITS:
        raise UsageError(f"init {init!r}: expected one of {', '.join(INITS)}")
    out, inner = W.shape
    if init == "pissa":
        return pissa(W, rank, scaling, name)
    if init == "olora":
        return olora(W, rank)
    if embedding:  # A is zero, as in PEFT: a column of A is trained only if its token occurs
        return Factors(torch.zeros(rank, inner), torch.randn(out, rank, generator=generator))
    if init == "gaussian":
        return Factors(torch.randn(rank, inner, generator=generator) / rank, torch.zeros(out, rank))
    bound = 1.0 / math.sqrt(inner)  # Kaiming's uniform bound with a = √5
    return Factors(torch.empty(rank, inner).uniform_(-bound, bound, generator=generator), torch.zeros(out, rank))


def pissa(W: torch.Tensor, rank: int, scaling: float, name: str) -> Factors:
    """PiSSA: `s·B·A` is the best rank-`rank` approximation of W, with factors of equal norm (arXiv 2404.02948)."""
    best = _best(W, rank, name)
    return Factors(best.A / math.sqrt(scaling), best.B / math.sqrt(scaling), subtracted=True)


def olora(W: torch.Tensor, rank: int) -> Factors:
    """OLoRA: the first columns of Q and rows of R of `W = Q·R` (arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(W.double().cpu())
    return Factors(R[:rank], Q[:, :rank], subtracted=True)


def loftq(W: torch.Tensor, quantized: torch.Tensor, rank: int, scaling: float, name: str) -> Factors:
    """LoftQ: `s·B·A` best approximates the quantization error of W (arXiv 2310.08659, one alternating step)."""
    best = _best(W.double() - quantized.to(W.device).double(), rank, name)
    return Factors(best.A / math.sqrt(scaling), best.B / math.sqrt(scaling))


def _best(W: torch.Tensor, rank: int, name: str) -> Factors:
    """The best rank-`rank` approximation `B·A` of W, with factors of equal norm."""
    rows = W.detach().cpu().double()
    matrix = Matrix((rows.shape[0], rows.shape[1]), lambda first, last: rows[first:last])
    product = sketch(matrix, Limit(rank=rank), name=name).leading.first(rank)
    return Factors(product.right, product.left)
