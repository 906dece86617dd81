"""What a scheme says of itself: how its weights are found, and where it can be written, how.

A module of `schemes` holds one as `SCHEME`; all that lists, names or chooses schemes is made from the table of these.
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
    """How weights are quantized to the kinds of a scheme.

    Args:
        spec: how to quantize a weight.
        declaration: the `quantization_config` by which transformers loads the output; the dtype is what weights
            dequantize to, as safetensors names it.
        blocksizes: how many elements can share a scale, where that can be chosen.
        nests: whether the scales can be quantized themselves.
        scales: what share a scale, in words, where neither can be chosen.
    """

    spec: type[QuantizationSpec]
    declaration: Callable[[QuantizationSettings, str], dict[str, Any]]
    blocksizes: tuple[int, ...] = ()
    nests: bool = False
    scales: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer by which a library computes with weights of a scheme in memory: the name of its class.

    Args:
        has_scales: whether a layer came with what dequantizes its weight.
        dequantized: the weight `(out, in)` that a layer computes with.
        loading: transformers' config that quantizes a model to a kind as it loads, computing in a dtype.
    """

    library: str
    name: str
    has_scales: Callable[[Any], bool]
    dequantized: Callable[[Any], torch.Tensor]
    loading: Callable[[str, torch.dtype], Any] | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store weights quantized.

    Args:
        label: what to call it where the schemes are listed.
        kinds: what `QuantizedWeight.kind` can be.
        suffixes: how the names of the tensors end that hold scales, code books and the like.
        find: every weight of the scheme among a checkpoint's tensors, by its config and the dtype to dequantize to
            where nothing says one. Raises FormatError where a weight's parts are missing or do not fit each other.
        in_values: what stands in the names of tensors whose values, and not headers, say the shapes of weights.
    """

    label: str
    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    find: Callable[[Mapping[str, TensorInfo], Mapping[str, Any], str], Iterator[QuantizedWeight]]
    in_values: str | None = None
    writer: Writer | None = None
    layer: Layer | None = None
