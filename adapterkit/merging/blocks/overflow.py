"""Refuse values out of a dtype's range, wherever weights are dequantized, added, rounded or quantized."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapterkit.base.quant import QuantizationSpec, QuantizedWeight, unbounded_kinds
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TORCH_NAMES
from adapterkit.merging.plan.edits import MergeEdit

WIDER = {torch.float16: "`dtype='bf16'`", torch.bfloat16: "`dtype='fp32'`"}


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise FitError for values of an adapter that are not finite."""
    if not bool(torch.isfinite(values).all()):
        raise FitError(f"{name}: the adapter's values contain NaN or Inf; the adapter is broken")


def in_range(squares: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether sums of squares prove that every result is within the range of `dtype`."""
    limit = torch.finfo(dtype).max
    return float(squares.max()) < limit * limit  # false for NaN


def check_range(
    edit: MergeEdit, squares: torch.Tensor, out: torch.Tensor, base: torch.Tensor | None, first: int
) -> None:
    """Raise FitError for results out of the output dtype's range, unless the base itself is not finite there.

    `squares`, the sum of squares of each chunk, is the cheapest check: it is NaN or Inf if any result is, but may be
    Inf if none is. Then every element of `out`, rows from `first` on, is checked.
    """
    if in_range(squares, out.dtype):
        return
    broken = ~torch.isfinite(out)
    if base is not None:
        _check_dequantized(edit, base, first)
        broken &= torch.isfinite(base)
    if bool(broken.any()):
        raise FitError(
            f"{edit.name}: a merged weight exceeds {_maximum_of(out.dtype)}",
            hint=f"use {WIDER.get(out.dtype, 'a smaller `scale`')}",
        )


def check_overflow(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Raise FitError for rows of a weight in memory that are finite `before` but not `after`."""
    broken = ~after.isfinite()
    if bool(broken.any()) and bool((broken & before.isfinite()).any()):
        raise FitError(f"{name}: a weight would exceed {_maximum_of(after.dtype)}", hint="use a smaller `weight`")


def _check_dequantized(edit: MergeEdit, base: torch.Tensor, first: int) -> None:
    """Raise FitError for stored weights that are finite, but not in the dtype that they dequantize to."""
    if not isinstance(edit.source, QuantizedWeight):
        return
    exact = replace(edit.source, dtype="F32").open(base.shape[1])(first, first + len(base)).to(base.device)
    beyond = exact.isfinite() & ~base.isfinite()
    if bool(beyond.any()):
        largest = float(exact[beyond].abs().max())
        raise FitError(
            f"{edit.name}: dequantizes to {largest:.5g}, which exceeds {_maximum_of(base.dtype)}",
            hint="set the dtype to bfloat16 in the base's config or quant_state",
        )


def check_packable(name: str, values: torch.Tensor, packing: QuantizationSpec) -> None:
    """Raise FitError for values that become NaN or Inf when they are quantized or dequantized."""
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    if not bool(largest.isfinite()):
        raise FitError(f"{name}: contains NaN or Inf, which cannot be quantized")
    for stored, use, hint in (
        (packing.source_dtype, f"{packing.scheme} is quantized from it", f"use {' or '.join(unbounded_kinds())}"),
        (packing.dtype, "the weight dequantizes to it", "use a smaller `scale`, or a base in bf16"),
    ):
        dtype = getattr(torch, TORCH_NAMES[stored])
        if not bool(largest.to(dtype).isfinite()):
            raise FitError(f"{name}: {float(largest):.5g} exceeds {_maximum_of(dtype)}; {use}", hint=hint)


def check_scales(name: str, largest: float, packing: QuantizationSpec) -> None:
    """Raise FitError if quantized scales make the largest weight, dequantized, infinite in its dtype."""
    dtype = getattr(torch, TORCH_NAMES[packing.dtype])
    if not bool(torch.tensor(largest).to(dtype).isfinite()):
        raise FitError(
            f"{name}: with nested quantization it dequantizes to {largest:.5g}, which exceeds {_maximum_of(dtype)}",
            hint="don't nest: leave the scales unquantized",
        )


def _maximum_of(dtype: torch.dtype) -> str:
    return f"{torch.finfo(dtype).max:.5g}, the maximum of {str(dtype).removeprefix('torch.')}"
