"""Prepare a model for training."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_of
from adapterkit.errors import UsageError
from adapterkit.files.safetensors import TensorInfo
from adapterkit.train.causal_lm import CausalModel
from adapterkit.train.injection import ALL_LINEAR, Lora, inject, inject_from
from adapterkit.train.recipe import Recipe


def prepare(model: CausalModel, recipe: Recipe, base: Checkpoint, first: Adapter | None = None) -> None:
    """Add the factors of `recipe`, or those of `first` to continue, and apply the options that change computation."""
    if recipe.method == "full":
        model.model.requires_grad_(True)
    elif first is not None:
        inject_from(model.model, first, recipe.dropout)
    else:
        inject(model.model, lora_of(recipe), seed=recipe.seed, original=_originals(base))
    model.model.train()  # gradient checkpointing needs it, but the base's own dropout is not part of a recipe
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    if recipe.gradient_checkpointing:
        hf: Any = model.model  # transformers 6 renames the method
        enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if recipe.compile:
        model.backbone.compile()


def lora_of(recipe: Recipe) -> Lora:
    """The `Lora` of `recipe`; raises UsageError if its layers are not numbers."""
    names: str | tuple[str, ...] = recipe.targets
    if recipe.targets != ALL_LINEAR and re.fullmatch(r"[\w.,\s-]+", recipe.targets):
        names = tuple(name.strip() for name in recipe.targets.split(",") if name.strip())
    return Lora(
        names, recipe.rank, recipe.alpha, recipe.method, recipe.dropout, recipe.init, _numbers(recipe.layers),
        recipe.rank_pattern or {}, recipe.alpha_pattern or {},
    )  # fmt: skip


def _originals(base: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A function that returns the stored weight of a module, `(out, in)`."""

    def original(name: str) -> torch.Tensor:
        info = weights_of(base.tensors, base.config).get(f"{name}.weight")
        if not isinstance(info, TensorInfo):
            raise UsageError(f"{name}: is quantized in the base; LoftQ needs unquantized weights")
        return info.read()

    return original


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """`0-5,10` as numbers."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None:
            raise UsageError(f"`layers={text}`: expected numbers and ranges, such as 0-5,10")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)
