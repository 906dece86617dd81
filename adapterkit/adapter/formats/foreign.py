"""Adapter formats that are not read, recognized by their files and tensors, so that a refusal names what it found."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

# File names, or suffixes -> the format.
FILES = {
    "pytorch_adapter.bin": "an adapter of AdapterHub",
    "zero_to_fp32.py": "a DeepSpeed checkpoint: gather its weights with zero_to_fp32.py, which lies beside it",
    ".npz": "an adapter of MLX",
    ".gguf": "a file of llama.cpp (GGUF)",
    ".h5": "weights of Keras",
}

# Whole tensor names -> the format; the first that any name has counts.
TENSORS = {
    r"(lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_+.+": "a LoRA of kohya's scripts or LyCORIS",
    r"(unet|text_encoder):\d+:(up|down)": "a LoRA of cloneofsimo's scripts (diffusion)",
    r"diffusion_model\..+\.(lora_[AB]|lora_(up|down))\.weight": "a LoRA for ComfyUI (diffusion)",
    r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\..+lora.+": "a LoRA of diffusers",
    r".+\.processor\..+_lora\d?\.(up|down)\.weight|.+\.lora(_linear_layer)?\.(up|down)\.weight": "a LoRA of diffusers",
    r".+\.lora_[ab]": "an adapter of MLX",
    r".+\.lora_[ab]\.weight": "an adapter of torchtune",
    r".+\.adapter\.linear_(in|out)\.weight|.+_adapter\.linear_(in|out)\.weight": "an adapter of Megatron or NeMo",
    r"w_[ab]_\d{3}": "a LoRA of Sam_LoRA, which does not name its modules",
    r"(base_model\.)?prompt_embeddings|base_model\.prompt_encoder\..+": "prompt tuning, which changes no weights",
    r".+\.ia3_l(\..+)?": "IA³, which scales activations",
    r".+\.vera_lambda_[bd]": "VeRA",
    r".+\.b?oft_[rRs](\..+)?": "OFT, which rotates weights",
    r".+\.hada_w[12]_[ab]": "LoHa",
    r".+\.lokr_w[12](_[ab])?": "LoKr",
    r"emb_params|<.+>|clip_[lg]": "textual inversion",
}
PATTERNS = {re.compile(pattern): name for pattern, name in TENSORS.items()}
DIFFUSION = re.compile(r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks|diffusion_model)\..+")


def format_of_file(file: Path) -> str | None:
    """Return the format of a file by its name, or None."""
    return FILES.get(file.name) or FILES.get(file.suffix)


def format_of_tensors(names: Iterable[str]) -> str | None:
    """Return the format whose names the tensors have, or None."""
    names = list(names)
    found = (name for pattern, name in PATTERNS.items() if any(map(pattern.fullmatch, names)))
    return next(found, None)


def are_foreign(names: Collection[str]) -> bool:
    """Return whether there are tensors and all have names of such formats; models have some, such as `clip_l`."""
    return bool(names) and all(any(pattern.fullmatch(name) for pattern in PATTERNS) for name in names)


def is_of_diffusion(names: Iterable[str]) -> bool:
    """Return whether all tensors belong to the parts of a diffusion pipeline."""
    return all(map(DIFFUSION.fullmatch, names))
