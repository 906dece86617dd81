"""Check that a config describes the stored weights, from headers, before memory for the model is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from adapterkit.base.checkpoint import CONFIG, Checkpoint
from adapterkit.base.models.loading import check_model_type, quiet, sanitized
from adapterkit.base.quant import weights as weights_of
from adapterkit.errors import FormatError

COUNTS = re.compile("layer|expert|block|num_labels")  # in keys that count modules or names
POSITIVE = ("num_hidden_layers", "n_layer", "max_position_embeddings", "n_positions")
MIN_COUNT_LIMIT = 4096  # a count up to this is accepted for any model
NUMBER = re.compile(r"\.[0-9]+\.")
MAX_NUMBER = 2**40  # of other keys, to avoid overflows
MODULES_PER_TENSOR = 20
PARAMETERS_PER_STORED = 4
SPARE = 1000  # modules or parameters on top
MAX_ERROR_CHARS = 240


def check_described(base: Checkpoint) -> None:
    """Raise FormatError if the config of `base` is invalid, or describes other shapes than the weights have."""
    with quiet():
        check_model_type(base)
    file, tensors = base.path / CONFIG, weights_of(base.tensors, base.config)
    max_count = max(MIN_COUNT_LIMIT, len(tensors), *(size for info in tensors.values() for size in info.shape))
    for key, value in _numbers(base.config):
        limit = max_count if COUNTS.search(key) else MAX_NUMBER
        if not (1 if key in POSITIVE else -MAX_NUMBER) <= value <= limit:
            stored = f", but the checkpoint has {len(tensors):,} tensors" if limit == max_count else ""
            raise FormatError(f"{file}: {key} is {_short(value)}{stored}")
    model = _build(base, MODULES_PER_TENSOR * len(tensors) + SPARE)
    described = dict(model.named_parameters())
    elements = sum(prod(info.shape) for info in tensors.values())
    if sum(prod(parameter.shape) for parameter in described.values()) > PARAMETERS_PER_STORED * elements + SPARE:
        raise FormatError(f"{file}: describes a model with far more parameters than the {elements:,} that are stored")
    for name, info in tensors.items():
        parameter = described.get(name)
        if parameter is not None and not base.quantization and tuple(info.shape) != tuple(parameter.shape):
            raise FormatError(
                f"{base.path}: {name} has shape {tuple(info.shape)}, but its config expects {tuple(parameter.shape)}"
            )
        in_first_layer = NUMBER.sub(".0.", name)
        ignored = any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
        if parameter is None and in_first_layer != name and in_first_layer in described and not ignored:
            raise FormatError(f"{base.path}: {name} is stored, but its config has no such layer")


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer in a config with its key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _numbers(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, key)
    elif type(node) is int:
        yield key, node


def _build(base: Checkpoint, max_modules: int) -> Any:
    """Build the model that the config describes, without memory for its weights."""
    import torch

    with quiet():
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            config = CONFIG_MAPPING[base.config["model_type"]].from_dict(sanitized(base.config))
            with torch.device("meta"), _limit_modules(max_modules):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # an untrusted config can make transformers raise anything
            text = " ".join(str(error).split())[:MAX_ERROR_CHARS] or type(error).__name__
            raise FormatError(f"{base.path / CONFIG}: transformers cannot build a model from it: {text}") from error


@contextmanager
def _limit_modules(limit: int) -> Iterator[None]:
    """Raise ValueError when more than `limit` modules are registered."""
    from torch.nn.modules.module import register_module_module_registration_hook

    registered = 0

    def count(*_: object) -> None:
        nonlocal registered
        registered += 1
        if registered > limit:
            raise ValueError(f"it has more than {limit:,} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"
