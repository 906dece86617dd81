"""A module's weight in a base, read a few rows at a time as its Δ sees it; quantized bases dequantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.algebra.updates import Update, update_for
from adapterkit.base.quant import QuantizedWeight, supported
from adapterkit.base.targets import Target
from adapterkit.errors import FitError
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo, Weight

RowReader = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where (part of) a module lies: rows `update.start …` of a tensor seen as a matrix, and what the module adds.

    `of` are the rows of Δ itself that lie there, or its columns where it is stored `transposed`.
    """

    read: RowReader
    update: Update
    of: tuple[int, int]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.stop - self.update.start, self.update.right.shape[1]

    def before(self, first: int, last: int) -> torch.Tensor:
        """Rows `first:last` of this piece of the base, float64."""
        return self.read(self.update.start + first, self.update.start + last).double()

    def direction(self, first: int, last: int) -> torch.Tensor:
        """`W + s·B·A` there."""
        update = self.update
        return torch.addmm(self.before(first, last), update.left[first:last], update.right, alpha=update.strength)

    def norms(self, chunks: Sequence[tuple[int, int]]) -> torch.Tensor:
        """`‖W + s·B·A‖` for each output: of its rows, or where transposed of its columns."""
        if not self.transposed:
            return torch.cat([torch.linalg.vector_norm(self.direction(*chunk), dim=1) for chunk in chunks])
        squares = torch.zeros(self.shape[1], dtype=torch.float64)
        for chunk in chunks:
            squares += self.direction(*chunk).square().sum(0)
        return squares.sqrt()


def pieces(
    module: str, weights: LoraWeights[torch.Tensor], targets: Sequence[Target], tensors: Mapping[str, Weight]
) -> list[Piece]:
    """Where the module lies in the base, in the order of its outputs, once `check_readable` has nothing against it."""
    found = []
    for target in targets:
        columns = weights.out_features if target.transposed else weights.in_features
        info = tensors[target.tensor]
        depth = prod(info.shape) // columns
        update = update_for(
            weights, 1.0, target.rows or (0, depth), target.of, None, target.transposed, torch.float64, module
        )  # fmt: skip
        found.append(Piece(reader(info, columns), update, target.of or (0, weights.out_features), target.transposed))
    return sorted(found, key=lambda piece: piece.of)


def check_readable(
    module: str, weights: LoraWeights[LazyTensor], targets: Sequence[Target], tensors: Mapping[str, Weight]
) -> None:
    """Raise FitError where a module cannot be read as `pieces` of the base, as far as headers tell."""
    if weights.experts > 1 or any(target.expert is not None for target in targets):
        raise FitError(f"{module}: DoRA of stacked experts is not supported")
    if len(targets) > 1 and any(target.transposed for target in targets):
        raise FitError(f"{module}: lies in several tensors that are stored transposed: not supported")
    for target in targets:
        reader(tensors[target.tensor], weights.out_features if target.transposed else weights.in_features)


def reader(info: Weight, columns: int) -> RowReader:
    """What reads rows of `columns` elements of a weight, dequantized where it is quantized."""
    if isinstance(info, QuantizedWeight):
        return info.open(columns)
    if not isinstance(info, TensorInfo) or info.dtype not in FLOAT_DTYPES:
        raise FitError(
            f"{info.name}: is stored as {info.dtype}, so its numbers are not the weights; "
            f"what can be dequantized is {supported()}"
        )
    depth = prod(info.shape) // columns if columns else 0
    return LazyTensor.of(replace(info, shape=(depth, columns))).read_rows
