"""Load transformers models, and choose their device and dtype."""

from __future__ import annotations

from typing import Any

import torch

from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.models.loading import load_causal, quiet
from adapterkit.base.quant import loading
from adapterkit.errors import UsageError
from adapterkit.files import os_calls
from adapterkit.packages import needed
from adapterkit.train.causal_lm import CausalModel
from adapterkit.train.injection import use_fast_products

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device `name`; `auto` is a GPU if there is one, a separate one for each process."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"`device={name}`: expected cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`device={name}`: torch {torch.__version__} finds no GPU")
    return device


def choose_dtype(name: str, base: Checkpoint, device: torch.device, full: bool) -> torch.dtype:
    """The compute dtype `name`; `auto` is the dtype in which most of the base is stored.

    With `auto`, full fine-tuning uses float32, since 16-bit weights would lose updates; so does fp16 on a CPU.
    """
    if name != "auto":
        return TORCH_DTYPES[name]
    sizes = dict.fromkeys(STORED, 0)
    for info in base.tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    stored = STORED[max(sizes, key=lambda dtype: sizes[dtype])]
    return torch.float32 if full or (stored == "fp16" and device.type == "cpu") else TORCH_DTYPES[stored]


def load_model(base: Checkpoint, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> CausalModel:
    """Load the causal language model `base`, optionally in 4 bits; raises FormatError for other kinds of models."""
    if device.type == "cpu":
        os_calls.keep_freed_memory()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantize != "none":
        needed("bitsandbytes", f"`quantize={quantize}`")
        with quiet():
            options["quantization_config"] = loading(quantize, dtype)
    model = load_causal(base, **options)
    use_fast_products(model)  # before the first forward pass, in which bitsandbytes rearranges its weights
    return CausalModel(model)
