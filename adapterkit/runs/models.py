"""Models and tokenizers, from transformers, and what they compute in and on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import FormatError, UsageError
from adapterkit.train.causal import CausalModel
from adapterkit.train.injection import quicken

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHOWN = 240  # characters of an error of transformers'
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `name` means; `auto` is a GPU where there is one, of several processes each its own."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no GPU here")
    return device


def choose_dtype(name: str, base: Checkpoint, device: torch.device, full: bool) -> torch.dtype:
    """What to compute in: as `name` says, or as most of the base is stored.

    Updates would be lost in 16-bit weights, so what is trained whole is in float32; so is fp16 on a CPU.
    """
    if name != "auto":
        return TORCH_DTYPES[name]
    sizes = dict.fromkeys(STORED, 0)
    for info in base.tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    stored = STORED[max(sizes, key=lambda dtype: sizes[dtype])]
    return torch.float32 if full or (stored == "fp16" and device.type == "cpu") else TORCH_DTYPES[stored]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of the model at `path`; raises FormatError where there is none."""
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise FormatError(f"{path}: transformers finds no tokenizer there: {_shortened(error)}") from error


def load_model(path: Path, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> CausalModel:
    """The causal language model at `path`, its linear layers in 4 bits on request; raises FormatError where none is."""
    if device.type == "cpu":
        keep_freed_memory()
    with quiet():
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # so that they are told here
    if quantize != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )  # type: ignore[no-untyped-call]  # fmt: skip
    with quiet():
        try:
            model, found = cast(Any, AutoModelForCausalLM).from_pretrained(path, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise FormatError(f"{path}: transformers loads no model from there: {_shortened(error)}") from error
    # What is missing or of another shape, transformers would fill with random numbers.
    for name, stored, wanted in found["mismatched_keys"]:
        raise FormatError(f"{path}: {name} is {tuple(stored)}, its config makes it {tuple(wanted)}")
    if missing := sorted(found["missing_keys"]):
        raise FormatError(f"{path}: lacks {len(missing)} tensors that its config speaks of, such as {missing[0]}")
    quicken(model)  # before anything is computed: bitsandbytes rearranges its weights when they are first used
    return CausalModel(model)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: to give it back, and fault it in again, takes a tenth of every step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings from the terminal, which is ours; raises UsageError where it is missing."""
    try:
        import transformers.utils.logging
    except ImportError as error:
        raise UsageError("training and evaluating need transformers: pip install 'adapterkit[train]'") from error
    logging: Any = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _shortened(error: Exception) -> str:
    """What transformers says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
