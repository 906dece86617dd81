"""Tell a base from others of the same shape, such as its fine-tuned versions, by a few rows of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapter.fingerprint import Fingerprint
from adapterkit.adapter.module_names import layer_of
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight, weights
from adapterkit.base.row_reader import reader
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, Weight
from adapterkit.text import counted

if TYPE_CHECKING:
    import torch

ROWS = 8


@dataclass(frozen=True, slots=True)
class RowsCompared:
    """The number of rows of a fingerprint that a base has in a comparable dtype, and the tensors whose rows differ."""

    compared: int
    differing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.compared - len(self.differing)} of {counted(self.compared, 'compared row')} of its weights equal"

    def note(self, base: str) -> str | None:
        """Return a note on differing rows, or None."""
        if not self.differing:
            return None
        some = f"{len(self.differing)} of {counted(self.compared, 'compared row')}"
        return f"made for other weights than those of {base}: {some} differ, {self.differing[0]} first"


def fingerprint(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Hash the middle row of matrices evenly spaced over the layers of `base`."""
    matrices = {
        name: info
        for name, info in weights(base.tensors, base.config).items()
        if len(info.shape) > 1
        and 0 not in info.shape
        and (isinstance(info, QuantizedWeight) or info.dtype in FLOAT_DTYPES)
    }
    layers = [name for name in matrices if layer_of(name) is not None]  # embeddings may grow
    names = sorted(layers or matrices, key=lambda name: (layer_of(name) or 0, name))
    chosen = dict.fromkeys(names[at * len(names) // ROWS] for at in range(ROWS)) if names else {}
    return {name: (_kind(matrices[name]), _hash(_row(matrices[name]))) for name in chosen}


def compare_rows(made_for: Fingerprint, base: Checkpoint) -> RowsCompared:
    """Compare the rows of a fingerprint with those of `base`, where it has them in the same scheme or a wider dtype."""
    tensors, compared, differing = weights(base.tensors, base.config), 0, []
    for name, (kind, hashed) in made_for.items():
        info = tensors.get(name)
        if info is None or 0 in info.shape:
            continue
        if _kind(info) != kind and not (kind in FLOAT_DTYPES and _kind(info) in FLOAT_DTYPES):
            continue
        row = _row(info)
        if _kind(info) != kind:
            import torch

            dtype: torch.dtype = getattr(torch, TORCH_NAMES[kind])
            if torch.promote_types(row.dtype, dtype) != row.dtype:
                continue
            row = row.to(dtype)
        compared += 1
        if _hash(row) != hashed:
            differing.append(name)
    return RowsCompared(compared, tuple(differing))


def _kind(info: Weight) -> str:
    return info.scheme if isinstance(info, QuantizedWeight) else info.dtype


def _row(info: Weight) -> torch.Tensor:
    width = info.shape[-1]
    middle = prod(info.shape) // width // 2
    return reader(info, width)(middle, middle + 1)


def _hash(row: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
