"""DoRA (arXiv 2402.09353): a weight is a magnitude per output row times a unit direction.

`W' = diag(m / n) · V` with `V = W + s·B·A` and the row norms `n_i = ‖V_i‖₂`; no epsilon, as in PEFT. A zero row has no
direction and stays zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def row_gain(direction: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """`m / n` as a column `(rows, 1)`, for `direction (rows, columns)` and `magnitude (rows,)`.

    Norms are float64, so that the gain is the correctly rounded quotient up to the last bit.
    """
    norm = torch.linalg.vector_norm(direction, dim=1, dtype=torch.float64)
    return _quotient(magnitude, norm, direction.dtype)[:, None]


def column_gain(chunks: Iterable[torch.Tensor], magnitude: torch.Tensor) -> torch.Tensor:
    """`m / n` as a row `(1, columns)`, for a weight stored transposed, passed in chunks of rows."""
    squares = torch.zeros(magnitude.shape[0], dtype=torch.float64)
    for rows in chunks:
        squares += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
    return _quotient(magnitude, squares.sqrt(), magnitude.dtype)[None, :]


def _quotient(magnitude: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(norm > 0, magnitude.double() / norm, 0.0).to(dtype)
