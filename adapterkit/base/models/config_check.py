"""Whether a config describes the weights beside it, found out from headers before anything of its size is made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from adapterkit.base.checkpoint import CONFIG, Checkpoint
from adapterkit.base.models.loading import harmless, quiet, refuse_unknown
from adapterkit.base.quant import weights as weights_of
from adapterkit.errors import FormatError

COUNTS = re.compile("layer|expert|block|num_labels")  # in keys that say how many modules or names there are
POSITIVE = ("num_hidden_layers", "n_layer", "max_position_embeddings", "n_positions")
LEAST = 4096  # that is not too much for such a key in any model
NUMBER = re.compile(r"\.[0-9]+\.")
MOST = 2**40  # of any other number, beyond which lie overflows
MODULES = 20  # that a model may have for each tensor, and `SPARE` more
PARAMETERS = 4  # elements that a model may have for each that is stored
SPARE = 1000
SHOWN = 240


def check_described(base: Checkpoint) -> None:
    """Raise FormatError where the config of `base` makes no model, or one with other sizes than its weights have."""
    with quiet():
        refuse_unknown(base)
    file, tensors = base.path / CONFIG, weights_of(base.tensors, base.config)
    most = max(LEAST, len(tensors), *(size for info in tensors.values() for size in info.shape))
    for key, value in _numbers(base.config):
        limit = most if COUNTS.search(key) else MOST
        if not (1 if key in POSITIVE else -MOST) <= value <= limit:
            held = f", the weights beside it are {len(tensors):,} tensors" if limit == most else ""
            raise FormatError(f"{file}: {key} is {_short(value)}{held}")
    model = _built(base, MODULES * len(tensors) + SPARE)
    described = dict(model.named_parameters())
    elements = sum(prod(info.shape) for info in tensors.values())
    if sum(prod(one.shape) for one in described.values()) > PARAMETERS * elements + SPARE:
        raise FormatError(f"{file}: describes a model of far more parameters than the {elements:,} that are stored")
    for name, info in tensors.items():
        one = described.get(name)
        if one is not None and not base.quantization and tuple(info.shape) != tuple(one.shape):
            raise FormatError(f"{base.path}: {name} is {tuple(info.shape)}, its config makes it {tuple(one.shape)}")
        alike = NUMBER.sub(".0.", name)
        ignored = any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
        if one is None and alike != name and alike in described and not ignored:
            raise FormatError(f"{base.path}: {name} is stored, and its config has no such layer")


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with the key that it is below."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _numbers(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, key)
    elif type(node) is int:
        yield key, node


def _built(base: Checkpoint, most: int) -> Any:
    """The model that the config describes, without memory for its weights."""
    import torch

    with quiet():
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            config = CONFIG_MAPPING[base.config["model_type"]].from_dict(harmless(base.config))
            with torch.device("meta"), _at_most(most):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        except Exception as error:  # of a stranger's config transformers raises all kinds
            text = " ".join(str(error).split())[:SHOWN] or type(error).__name__
            raise FormatError(f"{base.path / CONFIG}: transformers makes no model of it: {text}") from error


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Let no more than `count` modules become part of others."""
    from torch.nn.modules.module import register_module_module_registration_hook

    made = 0

    def note(*_: object) -> None:
        nonlocal made
        made += 1
        if made > count:
            raise ValueError(f"it has more than {count:,} modules")

    hook = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"
