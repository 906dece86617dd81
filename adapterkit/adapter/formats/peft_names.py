"""PEFT's tensor names: the module and the role of each, also with wrappers and in older versions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

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
SAVED = re.compile(r"(?P<module>.+)\.(?:modules_to_save\.[^.]+|base_layer)\.(?P<leaf>[^.]+)")
# Embeddings, which PEFT saves in full if they are targeted or resized.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")


@dataclass
class SortedTensors:
    """The tensors of a file, sorted by role."""

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    tokens: dict[str, LazyTensor] = field(default_factory=dict)
    unrecognized: list[TensorInfo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def sort_tensors(tensors: Mapping[str, TensorInfo | torch.Tensor], config: PeftConfig) -> SortedTensors:
    """Assign every tensor a module and a role, or else put it in `unrecognized`."""
    found, adapter_names = SortedTensors(), set()
    for key, stored in tensors.items():
        tensor = LazyTensor.of(stored)
        name, role, module, adapter_name = _parse(key)
        if role is not None:
            adapter_names.add(adapter_name)
            if role == "tokens":
                found.tokens[module] = tensor
            elif role in found.modules[module]:
                found.problems.append(Problem(key, "the file has several adapters for this module"))
            else:
                found.modules[module][role] = tensor
        elif (target := _replaced_tensor(name, config)) is not None and target not in found.replaced:
            found.replaced[target] = tensor
        else:
            found.unrecognized.append(stored if isinstance(stored, TensorInfo) else _info(key, tensor))
    if len(adapter_names) > 1:
        shown = ", ".join(sorted(str(name) for name in adapter_names)[:4])
        found.problems.append(Problem("tensor names", f"the file has several adapters ({shown}): split it first"))
    return found


@lru_cache(NAMES)
def _parse(key: str) -> tuple[str, str | None, str, str | None]:
    """Parse a tensor name into the name without wrappers, its role, its module and the adapter's name."""
    name = WRAPPERS.sub("", key)
    name = name.removeprefix("module.") if PREFIX in name else name
    name = name.removeprefix(PREFIX)
    for role, pattern in ROLE_PATTERNS.items():
        if match := pattern.fullmatch(name):
            return name, role, match["module"], match["name"]
    return name, None, "", None


def _replaced_tensor(name: str, config: PeftConfig) -> str | None:
    """Return the base tensor that this one replaces, or None if the config doesn't allow that."""
    if match := SAVED.fullmatch(name):
        return f"{match['module']}.{match['leaf']}"
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    saved = any(f".{module}.".find(f".{entry}.") >= 0 for entry in config.modules_to_save)
    bias = leaf == "bias" and config.raw.get("bias", "none") != "none"
    embedding = leaf == "weight" and parts[-1] in EMBEDDINGS  # saved too if the vocabulary was resized
    return name if saved or bias or embedding else None


def _info(key: str, tensor: LazyTensor) -> TensorInfo:
    return TensorInfo(key, tensor.dtype, tensor.shape, Path(), 0, tensor.nbytes)
