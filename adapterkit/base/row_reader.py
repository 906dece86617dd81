"""Read a module's base weight a few rows at a time, in the layout of its Δ, dequantized if needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.base.quant import QuantizedWeight, supported_schemes
from adapterkit.base.target import Target
from adapterkit.errors import FitError
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo, Weight

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.updates import Update

RowReader: TypeAlias = "Callable[[int, int], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Piece:
    """(Part of) a module's base weight, rows `update.start:update.stop` of a tensor viewed as a matrix, and its update.

    `delta_rows` is the range of rows of Δ that these are, or of its columns if stored `transposed`.
    """

    read: RowReader
    update: Update
    delta_rows: tuple[int, int]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.stop - self.update.start, self.update.right.shape[1]

    def base_rows(self, first: int, last: int) -> torch.Tensor:
        """Read rows `first:last` of this piece of the base, in float64."""
        return self.read(self.update.start + first, self.update.start + last).double()

    def direction(self, first: int, last: int) -> torch.Tensor:
        """Compute rows `first:last` of `W + s·B·A`."""
        import torch

        update = self.update
        return torch.addmm(self.base_rows(first, last), update.left[first:last], update.right, alpha=update.strength)

    def norms(self, chunks: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Compute `‖W + s·B·A‖` for each output: by row, or by column if transposed."""
        import torch

        if not self.transposed:
            return torch.cat([torch.linalg.vector_norm(self.direction(*chunk), dim=1) for chunk in chunks])
        squares = torch.zeros(self.shape[1], dtype=torch.float64)
        for chunk in chunks:
            squares += self.direction(*chunk).square().sum(0)
        return squares.sqrt()


def pieces(
    module: str, weights: LoraWeights[torch.Tensor], targets: Sequence[Target], tensors: Mapping[str, Weight]
) -> list[Piece]:
    """Return the pieces of a module's base weight in the order of its outputs; `check_readable` must have passed."""
    import torch

    from adapterkit.algebra.updates import update_for

    found = []
    for target in targets:
        columns = weights.out_features if target.transposed else weights.in_features
        info = tensors[target.tensor]
        depth = prod(info.shape) // columns
        update = update_for(
            weights, 1.0, target.rows or (0, depth), target.delta_rows, None, target.transposed, torch.float64, module
        )  # fmt: skip
        found.append(
            Piece(reader(info, columns), update, target.delta_rows or (0, weights.out_features), target.transposed)
        )
    return sorted(found, key=lambda piece: piece.delta_rows)


def check_readable(
    module: str, weights: LoraWeights[LazyTensor], targets: Sequence[Target], tensors: Mapping[str, Weight]
) -> None:
    """Raise FitError if the base weight of a module can't be read as `pieces`; looks at headers only."""
    if weights.kind == "parameter":
        raise FitError(f"{module}: DoRA of a parameter (target_parameters) is not supported, nor by PEFT")
    if len(targets) > 1 and any(target.transposed for target in targets):
        raise FitError(f"{module}: spans several transposed tensors, which is not supported")
    for target in targets:
        reader(tensors[target.tensor], weights.out_features if target.transposed else weights.in_features)


def reader(info: Weight, columns: int) -> RowReader:
    """Return a function that reads (and dequantizes) rows of `columns` elements of a weight."""
    if isinstance(info, QuantizedWeight):
        return info.open(columns)
    if not isinstance(info, TensorInfo) or info.dtype not in FLOAT_DTYPES:
        raise FitError(
            f"{info.name}: is stored as {info.dtype} by an unsupported quantization scheme; "
            f"supported schemes: {supported_schemes()}"
        )
    depth = prod(info.shape) // columns if columns else 0
    return LazyTensor.of(replace(info, shape=(depth, columns))).read_rows
