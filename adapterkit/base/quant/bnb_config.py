"""The `quantization_config` of bitsandbytes schemes, by which transformers loads them."""

from __future__ import annotations

from typing import Any


def quantization_config(bits: int, quant_type: str, nested: bool, compute_dtype: str) -> dict[str, Any]:
    """Return the keys that transformers' `BitsAndBytesConfig` writes; for 8 bits the 4-bit keys have their defaults."""
    four = bits == 4
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four,
        "_load_in_8bit": not four, "bnb_4bit_compute_dtype": compute_dtype, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }  # fmt: skip
