"""Convert an adapter whose initial factors were moved out of the base, by computing these from the base again.

PEFT does so on loading: it subtracts `s·B₀·A₀` from W, and adds the trained `s·B·A`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.combining.convert import Converted, Placed, Weights, convert_modules
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError

if TYPE_CHECKING:
    import torch

    from adapterkit.base.row_reader import Piece

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # B₀ (out, rank), A₀ (rank, in)


def pissa(W: torch.Tensor, rank: int, scaling: float) -> Factors:
    """PiSSA (arXiv 2404.02948): `scaling·B₀·A₀` is the best approximation of `W (out, in)`, by its singular values."""
    import torch

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def olora(W: torch.Tensor, rank: int, scaling: float) -> Factors:
    """OLoRA (arXiv 2406.01775): the first columns of Q and rows of R, where `W = Q·R`."""
    import torch

    Q, R = torch.linalg.qr(W)
    return Q[:, :rank], R[:rank]


# The initializations that the base and the config determine.
INITIAL: dict[str, Callable[[torch.Tensor, int, float], Factors]] = {"pissa": pissa, "olora": olora}


@dataclass(frozen=True)
class Rebase:
    """Every module as the LoRA `s·(B·A − B₀·A₀)` of twice the rank, for the base as it was before training."""

    placed: Placed
    initialization: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.placed.base.quantization:
            raise FitError(f"{self.placed.base.path}: is quantized; {self.initialization} starts from the 16-bit base")
        for name, targets in self.placed.targets.items():
            weights = self.placed.one.adapter.modules[name]
            if weights.kind != "linear" or any(target.transposed for target in targets) or weights.scaling <= 0:
                raise FitError(f"{self.placed.one.label}: {name}: PEFT has no {self.initialization} for this layer")

    @property
    def modules(self) -> int:
        return len(self.placed.targets)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per module, then the adapter."""
        return convert_modules(self.placed, self._converted)

    def _converted(self, name: str, weights: Weights, pieces: Sequence[Piece]) -> Converted:
        import torch

        from adapterkit.algebra.lowrank import Product, decompose

        W = torch.cat([piece.base_rows(0, piece.shape[0]) for piece in pieces]).float()  # as PEFT decomposes it
        B, A = INITIAL[self.initialization](W, weights.rank, weights.scaling)
        both = replace(weights, A=torch.cat([weights.A.float(), A]), B=torch.cat([weights.B.float(), -B], 1))
        energy = float(decompose(Product.of(both)).sigma.square().sum()) * weights.scaling**2
        stored: LoraWeights[LazyTensor] = self.placed.one.adapter.modules[name]
        made = replace(stored, A=LazyTensor.of(both.A.contiguous()), B=LazyTensor.of(both.B.contiguous()), alpha=None)
        return made, energy, 0.0
