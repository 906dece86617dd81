"""Quantized weights: one file a scheme in `schemes`, found by the tensors that they are stored in."""

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
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo

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
    "kinds_of_any_size",
    "loadable_kinds",
    "loading",
    "needs_values",
    "spec_for",
    "supported",
    "weights",
    "writable_kinds",
]

# Module -> scheme, found in the files of `schemes`.
SCHEMES: dict[str, Scheme] = {
    module.name: import_module(f"{schemes.__name__}.{module.name}").SCHEME for module in iter_modules(schemes.__path__)
}


# --- reading ---------------------------------------------------------------------------------------------------------


def weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo | QuantizedWeight]:
    """The weights as the model has them: those stored quantized by their real shape, and without their parts.

    Raises FormatError where one is broken, or where only some can be read.
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
    """The dtype to dequantize to where the weights do not say: the model's own, else that of its other weights."""
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
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return most if sizes[most] else "BF16"


def needs_values(names: Iterable[str]) -> bool:
    """Whether among tensors of these names are some whose values, and not only headers, say the shapes of weights."""
    marks = [scheme.in_values for scheme in SCHEMES.values() if scheme.in_values is not None]
    return any(mark in name for name in names for mark in marks)


def supported() -> str:
    """What can be dequantized, in words."""
    return ", ".join(scheme.label for scheme in SCHEMES.values())


# --- writing ---------------------------------------------------------------------------------------------------------


def _writers() -> dict[str, Writer]:
    """Kind -> how to quantize to it."""
    return {kind: scheme.writer for scheme in SCHEMES.values() if scheme.writer for kind in scheme.kinds}


def writable_kinds() -> tuple[str, ...]:
    """What weights can be quantized to."""
    return tuple(_writers())


def kinds_of_any_size() -> tuple[str, ...]:
    """The kinds that weights of any magnitude can be quantized to, since they are taken in float32."""
    return tuple(kind for kind, writer in _writers().items() if writer.spec.taken_as == "F32")


def blocksizes() -> tuple[int, ...]:
    """The block sizes that one kind or another can have."""
    return tuple(sorted({size for writer in _writers().values() for size in writer.blocksizes}))


def checked(settings: QuantizationSettings) -> QuantizationSettings:
    """`settings`, which must be ones that its kind has. Raises UsageError where they are not."""
    writers = _writers()
    writer = writers.get(settings.kind)
    if writer is None:
        raise UsageError(f"to {settings.kind!r}: expected one of {', '.join(writers)}")
    if settings.blocksize not in (writer.blocksizes or blocksizes()):
        raise UsageError(f"block size {settings.blocksize}: expected one of {', '.join(map(str, blocksizes()))}")
    if (settings.blocksize != DEFAULT_BLOCKSIZE and not writer.blocksizes) or (settings.nested and not writer.nests):
        others = " and ".join(kind for kind, other in writers.items() if other.blocksizes)
        raise UsageError(f"{settings.kind} has {writer.scales}: block size and nesting are for {others}")
    return settings


def spec_for(weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings) -> QuantizationSpec:
    """How to quantize `weight`; one that is stored by the same kind keeps its block size and nesting."""
    rounding = settings.rounding.of(weight.name)
    if isinstance(weight, QuantizedWeight) and weight.kind == settings.kind and (own := weight.spec()):
        return replace(own, rounding=rounding)  # type: ignore[type-var]
    return _writers()[settings.kind].spec.of(weight, replace(settings, rounding=rounding))


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    """The `quantization_config` by which transformers loads the output; `dtype` is what weights dequantize to."""
    return _writers()[settings.kind].declaration(settings, dtype)


# --- in memory -------------------------------------------------------------------------------------------------------


def loadable_kinds() -> tuple[str, ...]:
    """What a model's linear layers can be quantized to as it is loaded."""
    layers = ((scheme.layer, scheme.kinds) for scheme in SCHEMES.values())
    return tuple(kind for layer, kinds in layers if layer and layer.loading for kind in kinds)


def loading(kind: str, dtype: torch.dtype) -> Any:
    """The config by which transformers does it, computing in `dtype`."""
    scheme = next(scheme for scheme in SCHEMES.values() if kind in scheme.kinds)
    assert scheme.layer is not None and scheme.layer.loading is not None
    return scheme.layer.loading(kind, dtype)
