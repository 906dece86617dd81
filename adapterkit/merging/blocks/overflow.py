"""Values that a dtype does not hold are refused, wherever weights are dequantized, added up, rounded or quantized."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapterkit.base.quant import QuantizationSpec, QuantizedWeight, unbounded_kinds
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TORCH_NAMES
from adapterkit.merging.plan.edits import MergeEdit

WIDER = {torch.float16: "`dtype='bf16'`", torch.bfloat16: "`dtype='fp32'`"}


def check_finite(values: torch.Tensor, name: str) -> None:
    """Refuse what an adapter brings if it is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise FitError(f"{name}: the adapter brings NaN or Inf for it: the adapter is broken")


def in_range(squares: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether sums of squares show that no result is beyond `dtype`."""
    limit = torch.finfo(dtype).max
    return float(squares.max()) < limit * limit  # false for NaN


def check_range(
    edit: MergeEdit, squares: torch.Tensor, out: torch.Tensor, base: torch.Tensor | None, first: int
) -> None:
    """Refuse results beyond the output dtype, rows `first …`, except where the base itself is not finite.

    No square exceeds the sum of them all, `squares` by chunk, which is the cheapest pass there is; it is NaN or Inf
    where one of them is, and may be Inf where none is.
    """
    if in_range(squares, out.dtype):
        return
    broken = ~torch.isfinite(out)
    if base is not None:
        _check_dequantized(edit, base, first)
        broken &= torch.isfinite(base)
    if bool(broken.any()):
        raise FitError(
            f"{edit.name}: a merged weight is beyond {_end(out.dtype)}",
            hint=f"use {WIDER.get(out.dtype, 'a smaller `scale`')}",
        )


def check_overflow(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Refuse rows of a weight in memory that are finite `before` but not `after`."""
    broken = ~after.isfinite()
    if bool(broken.any()) and bool((broken & before.isfinite()).any()):
        raise FitError(f"{name}: a weight is then beyond {_end(after.dtype)}: apply less of the adapter")


def _check_dequantized(edit: MergeEdit, base: torch.Tensor, first: int) -> None:
    """Refuse weights that are finite as they are stored, but not in the dtype that they dequantize to."""
    if not isinstance(edit.source, QuantizedWeight):
        return
    exact = replace(edit.source, dtype="F32").open(base.shape[1])(first, first + len(base)).to(base.device)
    beyond = exact.isfinite() & ~base.isfinite()
    if bool(beyond.any()):
        raise FitError(
            f"{edit.name}: holds {float(exact[beyond].abs().max()):.5g}, beyond {_end(base.dtype)}, to which it "
            "dequantizes: set that dtype to bfloat16 in the base's config or quant_state"
        )


def check_packable(name: str, values: torch.Tensor, packing: QuantizationSpec) -> None:
    """Refuse values that quantizing would take, or give back, as NaN or Inf."""
    most = values.abs().amax() if values.numel() else values.new_zeros(())
    if not bool(most.isfinite()):
        raise FitError(f"{name}: holds NaN or Inf, which cannot be quantized")
    for stored, why, instead in (
        (
            packing.source_dtype,
            f"from which {packing.scheme} is quantized",
            f"quantize to {' or '.join(unbounded_kinds())}",
        ),
        (packing.dtype, "to which it dequantizes", "use a smaller `scale`, or a base in bf16"),
    ):
        dtype = getattr(torch, TORCH_NAMES[stored])
        if not bool(most.to(dtype).isfinite()):
            raise FitError(f"{name}: holds {float(most):.5g}, beyond {_end(dtype)}, {why}: {instead}")


def check_scales(name: str, most: float, packing: QuantizationSpec) -> None:
    """Refuse scales that were quantized to such that the greatest weight, `most`, is not finite in the dtype of all."""
    dtype = getattr(torch, TORCH_NAMES[packing.dtype])
    if not bool(torch.tensor(most).to(dtype).isfinite()):
        raise FitError(
            f"{name}: with its scales quantized too it dequantizes to {most:.5g}, beyond {_end(dtype)}: leave them "
            "unquantized (no nesting)"
        )


def _end(dtype: torch.dtype) -> str:
    return f"{torch.finfo(dtype).max:.5g}, where {str(dtype).removeprefix('torch.')} ends"
