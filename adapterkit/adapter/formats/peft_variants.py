"""Variants of LoRA that PEFT's config names: how their files differ, and why some are not merged as they are.

An adapter that is not merged is intact and loads in PEFT; `W + scaling · B·A` is not the model that was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.weights import Input, LazyTensor, Problem

if TYPE_CHECKING:
    import torch

# Variants that are plain LoRA after training, and their tensors, which only training reads.
TRAINING_TENSORS = {
    "velora_config": re.compile(r".+\.lora_velora_embed(\.[^.]+)?"),
    "monteclora_config": re.compile(r".+\.lora_monteclora_sampler\..+"),
}
BLOCKS = "use_bdlora"

# Config fields -> why no merged weight equals what PEFT computes, and what to do instead.
REFUSED = {
    "alora_invocation_tokens": (
        "activated LoRA acts only after its invocation tokens, so no merged weight equals it",
        "serve the adapter unmerged: PEFT, vLLM and llama.cpp load activated LoRA",
    ),
    "layer_replication": (
        "the adapter belongs to a model with repeated layers, which the base does not have",
        "build that model first (mergekit's passthrough method), remove layer_replication from the config, and merge "
        "into it",
    ),
    "megatron_config": (
        "its factors are split over Megatron ranks",
        "export the adapter to one rank with the tool that trained it",
    ),
    "use_qalora": (
        "QA-LoRA adds to a GPTQ base and pools its input by groups",
        "serve the adapter unmerged, on its GPTQ base",
    ),
    "arrow_config": ("Arrow routes between adapters at run time", "merge one of the adapters that it routes between"),
    "kasa_config": (
        "KaSA also removes the smallest singular values of the base's weights",
        "merge it with PEFT: `merge_and_unload()`",
    ),
    # axolotl stamps it: a dict that names the quantizer, in older versions true.
    "nvfp4_merge_aware": (
        "trained for weights rounded to NVFP4 after merging; in any other dtype the model is not the trained one",
        "merge it with the tool that trained it: `axolotl merge-lora`",
    ),
}

# Initializations that move a part of the base into the factors. PEFT sets init_lora_weights to true when it converts
# the adapter on saving (path_initial_model_for_weight_conversion).
MOVED = ("pissa", "corda", "olora", "lora_ga")
REPEATABLE = ("pissa", "olora")  # determined by the base; with a number of iterations, PiSSA is random
LOFTQ = "loftq"
WITH_INITIAL = (
    "`adapterkit convert ADAPTER --to lora --initial INITIAL -o NEW`, where INITIAL is the adapter before training"
)
WITH_BASE = f"`adapterkit convert ADAPTER --to lora --base BASE -o NEW` or {WITH_INITIAL}"
SAVED_BASE = "If the changed base was saved, set init_lora_weights to true in the config and merge into that"


def initialization(config: Mapping[str, Any]) -> str:
    """Return the initialization in `config` that moved a part of the base into the factors; empty if none did."""
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    return name if name == LOFTQ or name.startswith(MOVED) else ""


def variant_problems(config: Mapping[str, Any], file: str) -> Iterator[Problem]:
    """Yield why `W + scaling · B·A` is not the model that was trained with the `config` in `file`, with the way out."""
    for name, (reason, remedy) in REFUSED.items():
        if config.get(name):
            yield Problem(f"{file}: {name}", reason, remedy=remedy, intact=True)
    where, name = f"{file}: init_lora_weights", initialization(config)
    if name == LOFTQ:
        yield _of_loftq(where, config.get("loftq_config"))
    elif name:
        repeatable, dora = name in REPEATABLE, bool(config.get("use_dora"))
        convert = f"convert it first: {WITH_BASE if repeatable else WITH_INITIAL}"
        yield Problem(
            where, f"{name[:40]!r} moves a part of the base into the initial factors; only what training added is Δ",
            remedy=f"{'merge it with PEFT: `merge_and_unload()`' if dora else convert}. {SAVED_BASE}", intact=True,
            settled_by=() if dora else ("initial", "base") if repeatable else ("initial",),
        )  # fmt: skip


def _of_loftq(where: str, config: object) -> Problem:
    """Return the problem of factors that start at the error of quantizing the base, for its `loftq_config`.

    After the first of several iterations, LoftQ quantizes the base without the factors, which is no base to merge into.
    """
    settings = config if isinstance(config, Mapping) else {}
    once = settings.get("loftq_bits", 4) == 4 and settings.get("loftq_iter", 1) == 1
    quantized = "merge it onto the base in NF4 (`adapterkit merge BASE ADAPTER --as-trained nf4`), or " if once else ""
    settled_by: tuple[Input, ...] = ("initial", "quantized base") if once else ("initial",)
    return Problem(
        where, f"{LOFTQ!r} moves the error of quantizing the base into the initial factors, which a 16-bit base lacks",
        remedy=f"{quantized}convert it: {WITH_INITIAL}. {SAVED_BASE}", intact=True, settled_by=settled_by,
    )  # fmt: skip


# --- variants that are merged ----------------------------------------------------------------------------------------


def is_for_training(tensor: str, config: Mapping[str, Any]) -> bool:
    """Return whether only training reads `tensor`, by the variant that `config` names."""
    return any(config.get(name) and pattern.fullmatch(tensor) for name, pattern in TRAINING_TENSORS.items())


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the variants whose factors are read as those of plain LoRA."""
    variants = (*TRAINING_TENSORS, BLOCKS)
    return {name: None if name in variants else value for name, value in config.items()}


def without_blocks(module: str, roles: dict[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the factors of `module` with the block-diagonal one of BD-LoRA, `(rows, columns / blocks)`, in full."""
    settings = config.get(BLOCKS) or {}
    full, blocks = dict(roles), settings.get("nblocks", 1)
    for role, tensor in roles.items():
        names = settings.get(f"target_modules_bd_{role.lower()}")
        if not isinstance(names, list) or not any(str(name) in module for name in names) or len(tensor.shape) != 2:
            continue
        rows, columns = tensor.shape
        if type(blocks) is int and blocks > 0 and rows % blocks == 0:
            view = partial(_block_diagonal, blocks)
            full[role] = LazyTensor(tensor.source, (rows, columns * blocks), tensor.dtype, view)
    return full


def _block_diagonal(blocks: int, stacked: torch.Tensor) -> torch.Tensor:
    """Place the `blocks` parts of `stacked (rows, columns / blocks)` on the diagonal of a matrix of zeros."""
    rows, columns = stacked.shape[0] // blocks, stacked.shape[1]
    full = stacked.new_zeros(blocks, rows, blocks, columns)
    for block, part in enumerate(stacked.reshape(blocks, rows, columns)):
        full[block, :, block] = part
    return full.reshape(blocks * rows, blocks * columns)
