"""Quantized weights: one module per scheme in `schemes`, which recognizes its weights by their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant import schemes
from adapterkit.base.quant.rounding import NEAREST, ROUNDINGS, Rounding
from adapterkit.base.quant.scheme import Scheme, Writer
from adapterkit.base.quant.weight import DEFAULT_BLOCKSIZE, QuantizationSettings, QuantizationSpec, QuantizedWeight
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo, Weight

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_BLOCKSIZE",
    "NEAREST",
    "ROUNDINGS",
    "SCHEMES",
    "QuantizationSettings",
    "QuantizationSpec",
    "QuantizedWeight",
    "Rounding",
    "blocksizes",
    "checked",
    "declaration",
    "float_dtype",
    "kinds",
    "loadable_kinds",
    "loading",
    "shapes_need_values",
    "spec_for",
    "supported_schemes",
    "training_kinds",
    "training_settings",
    "unbounded_kinds",
    "weights",
    "writable_kinds",
]

DOUBLE = "-dq"  # double quantization

# The scheme of each module in `schemes`.
SCHEMES: dict[str, Scheme] = {
    module.name: import_module(f"{schemes.__name__}.{module.name}").SCHEME for module in iter_modules(schemes.__path__)
}


# --- reading ---------------------------------------------------------------------------------------------------------


def weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo | QuantizedWeight]:
    """Return the model's weights: plain tensors, and quantized weights in place of the tensors they are stored in.

    Raises FormatError if a weight is corrupt, or if only some can be read.
    """
    dtype = float_dtype(config, tensors)
    packed = {weight.name: weight for scheme in SCHEMES.values() for weight in scheme.find(tensors, config, dtype)}
    parts = {part.name for weight in packed.values() for part in weight.parts}
    found = {name: packed.get(name, info) for name, info in tensors.items() if name in packed or name not in parts}
    for name, info in found.items():
        if packed and name.endswith("weight") and info.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} and has no scale, while other weights are quantized as "
                f"{next(iter(packed.values())).scheme}"
            )
    return found


def float_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the dtype to dequantize to if a scheme doesn't store it: the config's, else that of the other weights."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            named = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(str(section.get(key)))
            if named:
                return named
    suffixes = tuple(suffix for scheme in SCHEMES.values() for suffix in scheme.suffixes)
    sizes = dict.fromkeys(FLOAT_DTYPES, 0)
    for info in tensors.values():
        if info.dtype in sizes and not info.name.endswith(suffixes):
            sizes[info.dtype] += info.nbytes
    dominant = max(sizes, key=lambda dtype: sizes[dtype])
    return dominant if sizes[dominant] else "BF16"


def kinds(weights: Mapping[str, Weight]) -> set[str]:
    """Return the kinds of the quantized weights among `weights`."""
    return {weight.kind for weight in weights.values() if isinstance(weight, QuantizedWeight)}


def shapes_need_values(names: Iterable[str]) -> bool:
    """Return whether weights with these tensor names store their shapes in tensor values rather than in headers."""
    markers = [scheme.shape_marker for scheme in SCHEMES.values() if scheme.shape_marker is not None]
    return any(marker in name for name in names for marker in markers)


def supported_schemes() -> str:
    """Return the names of the schemes that can be dequantized, as a list in words."""
    return ", ".join(scheme.label for scheme in SCHEMES.values())


# --- writing ---------------------------------------------------------------------------------------------------------


def _writers() -> dict[str, Writer]:
    """Return the writer of each kind that can be written."""
    return {kind: scheme.writer for scheme in SCHEMES.values() if scheme.writer for kind in scheme.kinds}


def writable_kinds() -> tuple[str, ...]:
    """Return the kinds that weights can be quantized to."""
    return tuple(_writers())


def training_kinds() -> tuple[str, ...]:
    """Return the kinds that a base can be quantized to for training; `-dq` are those with quantized scales."""
    return tuple(kind + nested for kind, writer in _writers().items() for nested in ("", DOUBLE)[: 1 + writer.nests])


def training_settings(kind: str) -> QuantizationSettings:
    """Return the settings of one of `training_kinds`."""
    return QuantizationSettings(kind.removesuffix(DOUBLE), nested=kind.endswith(DOUBLE))


def unbounded_kinds() -> tuple[str, ...]:
    """Return the kinds that can hold weights of any magnitude, since they quantize from float32."""
    return tuple(kind for kind, writer in _writers().items() if writer.spec.source_dtype == "F32")


def blocksizes() -> tuple[int, ...]:
    """Return all block sizes that some kind supports."""
    return tuple(sorted({size for writer in _writers().values() for size in writer.blocksizes}))


def checked(settings: QuantizationSettings) -> QuantizationSettings:
    """Return `settings`; raises UsageError if its kind doesn't support them."""
    writers = _writers()
    writer = writers.get(settings.kind)
    if writer is None:
        raise UsageError(f"to {settings.kind!r}: expected one of {', '.join(writers)}")
    if settings.blocksize not in (writer.blocksizes or blocksizes()):
        raise UsageError(f"block size {settings.blocksize}: expected one of {', '.join(map(str, blocksizes()))}")
    if (settings.blocksize != DEFAULT_BLOCKSIZE and not writer.blocksizes) or (settings.nested and not writer.nests):
        others = " and ".join(kind for kind, other in writers.items() if other.blocksizes)
        raise UsageError(f"{settings.kind} has {writer.scales}; block size and nesting apply to {others} only")
    return settings


def spec_for(weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> QuantizationSpec:
    """Return the spec to quantize `weight`; one already of the same kind keeps its block size and nesting."""
    rounding = settings.rounding.of(weight.name)
    if isinstance(weight, QuantizedWeight) and weight.kind == settings.kind and (own := weight.spec()):
        return replace(own, rounding=rounding)  # type: ignore[type-var]
    return _writers()[settings.kind].spec.of(weight, replace(settings, rounding=rounding))


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` for transformers to load the output and dequantize its weights to `dtype`."""
    return _writers()[settings.kind].declaration(settings, dtype)


# --- in memory -------------------------------------------------------------------------------------------------------


def loadable_kinds() -> tuple[str, ...]:
    """Return the kinds that transformers can quantize linear layers to while it loads a model."""
    layers = ((scheme.layer, scheme.kinds) for scheme in SCHEMES.values())
    return tuple(kind for layer, kinds in layers if layer and layer.loading for kind in kinds)


def loading(kind: str, dtype: torch.dtype) -> Any:
    """Return the config for transformers to quantize a model to `kind` while loading, computing in `dtype`."""
    scheme = next(scheme for scheme in SCHEMES.values() if kind in scheme.kinds)
    assert scheme.layer is not None and scheme.layer.loading is not None
    return scheme.layer.loading(kind, dtype)
