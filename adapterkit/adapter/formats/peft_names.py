"""PEFT's tensor names: the module and the role of each, also with wrappers and in older versions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterkit.adapter.formats.peft_variants import is_for_training
from adapterkit.adapter.weights import LazyTensor, Problem
from adapterkit.files.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

    from adapterkit.adapter.formats.peft_config import PeftConfig

NAMES = 1 << 15  # tensor names to cache, since the adapters of a base share them
PREFIX = "base_model.model."

# Name segments of wrappers: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# The tensors of a module by role; a raw training state also has the adapter's name before the leaf.
ROLES = {
    "A": r"\.lora_A(?:\.(?P<name>[^.]+))?\.weight",
    "B": r"\.lora_B(?:\.(?P<name>[^.]+))?\.weight",
    "bias": r"\.lora_B(?:\.(?P<name>[^.]+))?\.bias",
    "embedding_A": r"\.lora_embedding_A(?:\.(?P<name>[^.]+))?",
    "embedding_B": r"\.lora_embedding_B(?:\.(?P<name>[^.]+))?",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?P<name>(?!weight$)[^.]+))?(?:\.weight)?",
    "tokens": r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?",
}
ROLE_PATTERNS = {role: re.compile(r"(?P<module>.+?)" + pattern) for role, pattern in ROLES.items()}
# The wrapper of a saved module holds the trained copy by adapter name, and the copy from before training.
TRAINED, ORIGINAL = ".modules_to_save.", ".original_module."
BASE_LAYER = re.compile(r"(?:\.token_adapter)?\.base_layer\.(?=[^.]+$)(?!lora_)")  # below factors or trained tokens
# The heads that PEFT saves by itself.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
# Embeddings and heads, which PEFT saves in full if they are targeted or resized.
EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "embeddings",
    "tokens_embed", "tok_embeddings", "word_embedding", "decoder", "vocab_projector", "output_projection", "proj_out",
    "generator_lm_head", "lm_loss",
)  # fmt: skip


@dataclass
class SortedTensors:
    """The tensors of a file, sorted by role."""

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)  # those of `replaced` that belong to saved modules
    tokens: dict[str, LazyTensor] = field(default_factory=dict)
    unrecognized: list[TensorInfo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def sort_tensors(tensors: Mapping[str, TensorInfo | torch.Tensor], config: PeftConfig) -> SortedTensors:
    """Assign every tensor a module and a role, or else put it in `unrecognized`."""
    found = SortedTensors()
    names, wrapper_names = _unwrapped(tensors)
    adapter_names = set[str | None]()
    for key, name in names.items():
        stored = tensors[key]
        tensor = LazyTensor.of(stored)
        role, module, adapter_name = _parse(name)
        if role is not None:
            adapter_names.add(adapter_name)
            if role == "tokens":
                found.tokens[module] = tensor
            elif role in found.modules[module]:
                found.problems.append(Problem(key, "the file has several adapters for this module"))
            else:
                found.modules[module][role] = tensor
        elif (kind := _kind_of_copy(key, name, config)) is not None:
            found.replaced[name] = tensor
            if kind == "saved":
                found.saved.add(name)
        elif not is_for_training(name, config.raw):
            found.unrecognized.append(stored if isinstance(stored, TensorInfo) else _info(key, tensor))
    several = adapter_names if len(adapter_names) > 1 else (adapter_names | wrapper_names) - {None}
    if len(several) > 1:
        shown = ", ".join(sorted(str(name) for name in several)[:4])
        found.problems.append(Problem("tensor names", f"the file has several adapters ({shown}): split it first"))
    return found


def saves(entry: str, module: str) -> bool:
    """Return whether `entry` of modules_to_save makes PEFT save `module`: its name, or a parent's, ends with it."""
    return f"{entry}." in f"{PREFIX}{module}."


# --- wrappers --------------------------------------------------------------------------------------------------------


def _unwrapped(keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Map the key of every tensor to its name in the model, and return the adapter names in wrappers.

    PEFT may store a saved module three times: by its name, and as the two copies in its wrapper. The trained copy is
    chosen: within another saved module, the one by its name is stale. That from before training keeps its name.
    """
    names = {key: _bare(key) for key in keys}
    plain, adapter_names = set(names.values()), set[str]()
    chosen: dict[str, tuple[int, str]] = {}
    for key, name in names.items():
        order = 3 if ORIGINAL in name else 2 if BASE_LAYER.search(name) else 0 if TRAINED in name else 1
        name = BASE_LAYER.sub(".", name.replace(ORIGINAL, "."))
        while TRAINED in name:
            module, _, rest = name.partition(TRAINED)
            adapter_name, _, inner = rest.partition(".")
            if inner and (adapter_name == "default" or f"{module}.{rest}" not in plain):
                adapter_names.add(adapter_name)
                rest = inner
            name = f"{module}.{rest}"
        if name not in chosen or order < chosen[name][0]:
            chosen[name] = order, key
    return {key: names[key] if order == 3 else name for name, (order, key) in chosen.items()}, adapter_names


@lru_cache(NAMES)
def _bare(key: str) -> str:
    """Return a tensor name without PEFT's prefix and the wrappers of other libraries."""
    name = WRAPPERS.sub("", key)
    name = name.removeprefix("module.") if PREFIX in name else name
    return name.removeprefix(PREFIX)


# --- roles -----------------------------------------------------------------------------------------------------------


@lru_cache(NAMES)
def _parse(name: str) -> tuple[str | None, str, str | None]:
    """Return the role of a tensor, its module and the adapter's name; no role if it is a copy of the base's."""
    for role, pattern in ROLE_PATTERNS.items():
        if match := pattern.fullmatch(name):
            return role, match["module"], match["name"]
    return None, "", None


def _kind_of_copy(key: str, name: str, config: PeftConfig) -> Literal["saved", "other"] | None:
    """Return whether a tensor belongs to a saved module or else replaces the base's; None if nothing explains it."""
    if ORIGINAL in name:
        return None
    module, _, leaf = name.rpartition(".")
    entries = config.saved if config.present else {head for heads in TASK_HEADS.values() for head in heads}
    if TRAINED in key or any(saves(entry, module) for entry in entries):
        return "saved"
    bias = leaf == "bias" and config.raw.get("bias", "none") != "none"
    embedding = leaf in ("weight", "bias") and module.split(".")[-1] in EMBEDDINGS  # saved too if resized
    unexplained = not config.present and PREFIX in key  # PEFT stores nothing else without a role
    return "other" if bias or embedding or unexplained or BASE_LAYER.search(key) else None


def _info(key: str, tensor: LazyTensor) -> TensorInfo:
    return TensorInfo(key, tensor.dtype, tensor.shape, Path(), 0, tensor.nbytes)
