"""Quantized layers of a model in memory, and the weights that they compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.base.quant import SCHEMES
from adapterkit.base.quant.scheme import Layer

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_quantized(layer: nn.Module) -> bool:
    """Return whether `layer` computes with a quantized weight."""
    return _layer_of(layer) is not None


def has_scales(layer: nn.Module) -> bool:
    """Return whether a quantized layer has the scales to dequantize its weight."""
    return _known(layer).has_scales(layer)


def dequantized(layer: nn.Module) -> torch.Tensor:
    """Return the weight `(out, in)` that a quantized layer computes with."""
    return _known(layer).dequantized(layer)


def _layer_of(layer: Any) -> Layer | None:
    kind = type(layer)
    layers = (scheme.layer for scheme in SCHEMES.values() if scheme.layer)
    return next((one for one in layers if kind.__name__ == one.name and kind.__module__.startswith(one.library)), None)


def _known(layer: Any) -> Layer:
    found = _layer_of(layer)
    assert found is not None
    return found
