"""What a run takes, from headers and the data alone: before a weight is read, and what would take less.

An estimate, a little high, from what the loop keeps: see `benchmarks/RESULTS.md` for how near it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.base.quant import weights as weights_of
from adapterkit.errors import UsageError
from adapterkit.inspection.summary import layer_of
from adapterkit.train.data.order import Order
from adapterkit.train.data.tokenize import Example
from adapterkit.train.loss import CHUNK
from adapterkit.train.recipe import Recipe

PROCESS = 900_000_000  # torch, transformers and compiled kernels, on a CPU
ADAM = 12  # bytes for each trained parameter beside itself: a gradient and two moments
IN_4_BITS = 0.53  # bytes for an element, with its share of the scales


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by what they are for."""

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
    """What training by `recipe` takes at its peak, in the batch with the most tokens."""
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
    longest = sorted((sum(len(one.ids) for one in row) for row in Order.of(examples, recipe).rows), reverse=True)
    tokens, hidden, layers = sum(longest[: recipe.batch_size]), text["hidden_size"], text["num_hidden_layers"]
    a_layer = (14 if size > 2 else 17) * hidden + 4 * text["intermediate_size"]  # measured: norms compute in float32
    kept = layers * hidden + a_layer if recipe.gradient_checkpointing else layers * a_layer
    return Estimate(weights, training, tokens * kept * size, CHUNK * (size + 4), PROCESS if device.type == "cpu" else 0)


def check(
    base: Checkpoint, recipe: Recipe, examples: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> Estimate:
    """The estimate; raises UsageError, with what would fit, where there is less memory than that."""
    found, room = estimate(base, recipe, examples, dtype, device), available(device)
    if found.total > room:
        raise UsageError(
            f"training takes about {found.total / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are free on {device}: "
            + helps(base, recipe, examples, dtype, device, room)
        )
    return found


def helps(
    base: Checkpoint, recipe: Recipe, examples: Sequence[Example], dtype: torch.dtype, device: torch.device, room: int
) -> str:
    """Which options would make it fit."""
    smaller = replace(recipe, batch_size=1, grad_accum=recipe.rows_per_step)
    ways = {
        f"--batch-size 1 --grad-accum {recipe.rows_per_step}": smaller,
        "--gradient-checkpointing": replace(recipe, gradient_checkpointing=True),
        "both together": replace(smaller, gradient_checkpointing=True),
    }
    if recipe.method != "full" and recipe.quantize == "none":
        ways["all that with --quantize nf4"] = replace(ways["both together"], quantize="nf4")
    fitting = [name for name, way in ways.items() if estimate(base, way, examples, dtype, device).total <= room]
    return ", or ".join(fitting) + " would fit" if fitting else f"not even {list(ways)[-1]} would fit"


def available(device: torch.device) -> int:
    """Bytes that are free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free: int = psutil.virtual_memory().available
    return free


def _text_config(config: Any) -> dict[str, int]:
    """The sizes that memory depends on, whatever a config calls them."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    hidden = inner.get("hidden_size") or inner.get("n_embd") or inner.get("d_model") or 1024
    layers = inner.get("num_hidden_layers") or inner.get("n_layer") or 24
    return {
        "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner.get("intermediate_size") or inner.get("n_inner") or 4 * hidden,
    }  # fmt: skip
