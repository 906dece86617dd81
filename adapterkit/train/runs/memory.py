"""Estimate a run's memory from headers and data alone, before any weight is read, and suggest options that fit.

The estimate is a little high; `benchmarks/RESULTS.md` has measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from adapterkit.adapter.module_names import layer_of
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.base.quant import weights as weights_of
from adapterkit.errors import UsageError
from adapterkit.packages import needed
from adapterkit.train.data.order import Order
from adapterkit.train.data.tokenize import Example
from adapterkit.train.loss import CHUNK
from adapterkit.train.recipe import Recipe

PROCESS = 900_000_000  # bytes of torch, transformers and compiled kernels, on a CPU
ADAM = 12  # bytes per trained parameter beside itself: a gradient and two moments
IN_4_BITS = 0.53  # bytes per element, scales included


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of memory by use."""

    weights: int
    training: int  # factors, gradients and moments
    activations: int
    logits: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.logits + self.process


def estimate(
    base: Checkpoint, recipe: Recipe, examples: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> Estimate:
    """Estimate the peak of training with `recipe`, in the batch with the most tokens."""
    size, text = dtype.itemsize, _text_config(base.config)
    stored = weights_of(base.tensors, base.config)
    shapes = {name: tuple(info.shape) for name, info in stored.items()}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and layer_of(name) is not None}
    in_4_bits = {name for name, info in stored.items() if isinstance(info, QuantizedWeight) and info.bits == 4}
    in_4_bits |= set(matrices) if recipe.quantize != "none" else set()
    weights = sum(int(prod(shape) * (IN_4_BITS if name in in_4_bits else size)) for name, shape in shapes.items())
    if recipe.method == "full":
        training = sum(map(prod, shapes.values())) * ADAM
    else:
        training = sum(recipe.rank * sum(shape) for shape in matrices.values()) * (ADAM + 4)
    lengths = sorted((sum(len(item.ids) for item in row) for row in Order.of(examples, recipe).rows), reverse=True)
    tokens, hidden, layers = sum(lengths[: recipe.batch_size]), text["hidden_size"], text["num_hidden_layers"]
    per_layer = (14 if size > 2 else 17) * hidden + 4 * text["intermediate_size"]  # measured: norms compute in float32
    per_token = layers * hidden + per_layer if recipe.gradient_checkpointing else layers * per_layer
    process = PROCESS if device.type == "cpu" else 0
    return Estimate(weights, training, tokens * per_token * size, CHUNK * (size + 4), process)


def check(
    base: Checkpoint, recipe: Recipe, examples: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> Estimate:
    """Estimate the memory; raises UsageError, with options that fit, if less is free."""
    memory, free = estimate(base, recipe, examples, dtype, device), available(device)
    if memory.total > free:
        raise UsageError(
            f"training needs about {memory.total / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free on {device}: "
            + suggestion(base, recipe, examples, dtype, device, free)
        )
    return memory


def suggestion(
    base: Checkpoint, recipe: Recipe, examples: Sequence[Example], dtype: torch.dtype, device: torch.device, free: int
) -> str:
    """The options with which the run would fit."""
    smaller = replace(recipe, batch_size=1, grad_accum=recipe.rows_per_step)
    options = {
        f"`batch_size=1` `grad_accum={recipe.rows_per_step}`": smaller,
        "`gradient_checkpointing=True`": replace(recipe, gradient_checkpointing=True),
        "both": replace(smaller, gradient_checkpointing=True),
    }
    if recipe.method != "full" and recipe.quantize == "none":
        options["both with `quantize='nf4'`"] = replace(options["both"], quantize="nf4")
    fitting = [
        name for name, changed in options.items() if estimate(base, changed, examples, dtype, device).total <= free
    ]
    return " or ".join(fitting) + " would fit" if fitting else f"not even {list(options)[-1]} would fit"


def available(device: torch.device) -> int:
    """Free bytes of memory on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = needed("psutil", "estimating memory").virtual_memory().available
    return free


def _text_config(config: Any) -> dict[str, int]:
    """The sizes that memory depends on, under one name each."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    hidden = inner.get("hidden_size") or inner.get("n_embd") or inner.get("d_model") or 1024
    layers = inner.get("num_hidden_layers") or inner.get("n_layer") or 24
    return {
        "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner.get("intermediate_size") or inner.get("n_inner") or 4 * hidden,
    }  # fmt: skip
