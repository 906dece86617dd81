"""bitsandbytes 4-bit, NF4 and FP4, as transformers saves it (arXiv 2305.14314; bitsandbytes `QuantState.as_dict`).

`w = dtype(code[nibble] · absmax[block])`: a float32 product, rounded to dtype. Blocks span the flattened weight, with
the high nibble first. With nesting, `absmax = nested_code[q] · nested_absmax[nested_block] + offset`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant.bnb_config import quantization_config
from adapterkit.base.quant.scheme import Layer, Scheme, Writer
from adapterkit.base.quant.schemes.bnb4.nibbles import dequantize, has_kernels, kernel, pair_table
from adapterkit.base.quant.schemes.bnb4.quantizer import Spec4bit
from adapterkit.base.quant.schemes.bnb4.weight import BLOCKSIZES, KINDS, find
from adapterkit.base.quant.weight import QuantizationSettings
from adapterkit.files.safetensors import TORCH_NAMES

if TYPE_CHECKING:
    import torch

SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
    *(f".quant_state.bitsandbytes__{kind}" for kind in KINDS),
)  # fmt: skip


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` of a model in NF4 or FP4."""
    return quantization_config(4, settings.kind, settings.nested, TORCH_NAMES[dtype])


# --- in memory -------------------------------------------------------------------------------------------------------


def layer_weight(layer: Any) -> torch.Tensor:
    """Dequantize the weight of a Linear4bit; bitsandbytes' CPU kernel is wrong if blocks span rows (see tests)."""
    import torch

    state, stored = layer.weight.quant_state, layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):  # rearranged for its CPU kernels
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        stored, state = _convert_weight_packed_for_cpu_inverse(stored, state)
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    raw, count = stored.reshape(-1).view(torch.uint8), prod(state.shape)
    if raw.is_cuda and has_kernels():
        values = kernel(raw, absmax.float(), state.blocksize, state.quant_type, count, state.dtype)
    else:
        values = dequantize(raw, absmax.float(), pair_table(state.code), state.blocksize)
    return values[:count].view(state.shape).to(state.dtype)


def loading(kind: str, dtype: torch.dtype) -> Any:
    """Return the config for transformers to quantize a model while loading."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


SCHEME = Scheme(
    label="bitsandbytes NF4 and FP4",
    kinds=KINDS,
    suffixes=SUFFIXES,
    find=find,
    shape_marker=".quant_state.",
    writer=Writer(Spec4bit, declaration, BLOCKSIZES, nests=True),
    layer=Layer(
        "bitsandbytes",
        "Linear4bit",
        lambda layer: getattr(layer.weight, "quant_state", None) is not None,
        layer_weight,
        loading,
    ),
)
