"""The interface of a quantization scheme: how to find its weights, and optionally how to write them.

Each module of `schemes` defines one as `SCHEME`; everything that lists or chooses schemes uses the table of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant.weight import QuantizationSettings, QuantizationSpec, QuantizedWeight
from adapterkit.files.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Writer:
    """The support for quantizing weights to the kinds of a scheme.

    Args:
        spec: The class that plans the quantization of a weight.
        declaration: Returns the `quantization_config` for transformers to load the output, given the safetensors
            dtype that weights dequantize to.
        blocksizes: The supported block sizes; empty if it can't be chosen.
        nests: Whether the scales can be quantized themselves.
        scales: A description of the scales, for errors, if neither can be chosen: "one scale per row".
    """

    spec: type[QuantizationSpec]
    declaration: Callable[[QuantizationSettings, str], dict[str, Any]]
    blocksizes: tuple[int, ...] = ()
    nests: bool = False
    scales: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer class that a library uses for weights of a scheme in memory.

    Args:
        has_scales: Returns whether a layer has the scales to dequantize its weight.
        dequantized: Returns the weight `(out, in)` that a layer computes with.
        loading: Returns the config for transformers to quantize a model to a kind on loading, computing in a dtype.
    """

    library: str
    name: str
    has_scales: Callable[[Any], bool]
    dequantized: Callable[[Any], torch.Tensor]
    loading: Callable[[str, torch.dtype], Any] | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantization scheme.

    Args:
        label: The name to list it by.
        kinds: The values of `QuantizedWeight.kind`.
        suffixes: The name suffixes of tensors that hold scales, codebooks and the like.
        find: Yields the scheme's weights among a checkpoint's tensors, given its config and the dtype to dequantize to
            if the weights don't store one. Raises FormatError if a weight's parts are missing or inconsistent.
        shape_marker: A substring of the names of tensors whose values, rather than headers, hold weights' shapes.
    """

    label: str
    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    find: Callable[[Mapping[str, TensorInfo], Mapping[str, Any], str], Iterator[QuantizedWeight]]
    shape_marker: str | None = None
    writer: Writer | None = None
    layer: Layer | None = None
