"""Layers of bitsandbytes in a model in memory, and the weight that they compute with."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant import bnb4

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_quantized(layer: nn.Module) -> bool:
    """Whether `layer` is a Linear4bit or a Linear8bitLt."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt") and type(layer).__module__.startswith("bitsandbytes")


def has_scales(layer: Any) -> bool:
    """Whether the weight of a quantized layer came with what dequantizes it."""
    name = "quant_state" if type(layer).__name__ == "Linear4bit" else "SCB"
    return getattr(layer.weight, name, None) is not None


def dequantized(layer: Any) -> torch.Tensor:
    """The weight `(out, in)` that a quantized layer computes with."""
    import torch

    if type(layer).__name__ == "Linear4bit":
        return _from_4bit(layer.weight)
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    dtype = layer.bias.dtype if layer.bias is not None else torch.get_default_dtype()
    weight: torch.Tensor = layer.weight.data * scale[:, None] * (1 / 127)
    return weight.to(dtype)


def _from_4bit(weight: Any) -> torch.Tensor:
    """The weight of a Linear4bit; bitsandbytes' CPU kernel is wrong where blocks straddle rows (see tests)."""
    import torch

    state, stored = weight.quant_state, weight.data
    if getattr(state, "packing_format_for_cpu", False):  # rearranged for its CPU kernels
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        stored, state = _convert_weight_packed_for_cpu_inverse(stored, state)
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    raw, count = stored.reshape(-1).view(torch.uint8), prod(state.shape)
    if raw.is_cuda and bnb4.has_kernels():
        values = bnb4.kernel(raw, absmax.float(), state.blocksize, state.quant_type, count, state.dtype)
    else:
        values = bnb4.dequantize(raw, absmax.float(), bnb4.pair_table(state.code), state.blocksize)
    return values[:count].view(state.shape).to(state.dtype)
