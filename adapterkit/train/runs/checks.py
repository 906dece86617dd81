"""Check that base, adapter and data fit together, before any weight is read."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.adapter.formats import load
from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.base.adapter_fit import check_missing, place_adapter
from adapterkit.base.checkpoint import CONFIG, Checkpoint, is_adapter, is_base, open_checkpoint
from adapterkit.base.models.config_check import check_described
from adapterkit.base.models.loading import SMALL_FILES
from adapterkit.base.quant import kinds
from adapterkit.base.quant import weights as weights_of
from adapterkit.base.tied_embeddings import find_tie
from adapterkit.errors import FitError, UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub import hub_repo, resolve
from adapterkit.train.data.tokenize import Encoded


def open_base(spec: str) -> Checkpoint:
    """Open the model `spec` by its headers.

    Raises:
        UsageError: It is an adapter or a single file.
        FormatError: Its config does not match its weights, or a file in the Hub cache differs from the Hub.
    """
    path = resolve(spec)
    if is_adapter(path):
        raise UsageError(f"{spec}: is an adapter, expected a model", hint="give the base first")
    if path.exists() and not is_base(path):  # transformers would also load an adapter in the same directory
        raise UsageError(f"{path}: not a transformers model: expected a directory with config.json and no adapter")
    base = open_checkpoint(path, hub_repo(spec))
    small = (path / file for file in base.other_files()[0] if file.suffix in SMALL_FILES)
    check_cached([path / CONFIG, *small, *([base.index] if base.index else []), *(one.file for one in base.shards)])
    check_described(base)
    return base


def open_fitting(spec: str, base: Checkpoint, quantize: str = "none") -> WeightedAdapter:
    """Load the adapter, checked to be complete and to fit `base`, quantized as loaded."""
    path, tensors = resolve(spec), weights_of(base.tensors, base.config)
    if is_base(path):
        raise UsageError(f"{spec}: is a model, expected an adapter")
    adapter = load(path)
    check_cached(adapter.files)
    if "nf4" in (quantize, *kinds(tensors)):
        adapter = adapter.given("quantized base")
    given = WeightedAdapter(adapter, label=hub_repo(spec) or path.resolve().name)
    check_mergeable(given)
    whole = [
        *adapter.replaced,
        *adapter.tokens,
        *(name for name, module in adapter.modules.items() if module.bias is not None),
    ]
    if whole:
        raise FitError(
            f"{given.label}: {whole[0]}: the adapter trains this tensor in full; only factors and magnitudes can be "
            "added to a base. Merge the adapter and use the result."
        )
    if (tie := find_tie(base)) is not None and tie.implied:
        tensors[tie.head] = replace(tensors[tie.embedding], name=tie.head)
    check_missing(given, place_adapter(adapter, tensors, base), base, tensors, allow_partial=False)
    return given


def check_sequences(data: Encoded, base: Checkpoint) -> None:
    """Raise where a sequence is longer than the model's context, or has tokens outside its vocabulary."""
    positions, vocabulary = size_of(base, "max_position_embeddings", "n_positions"), size_of(base, "vocab_size")
    for example in data.examples:
        if positions is not None and len(example.ids) > positions:
            raise UsageError(
                f"{example.where}: has {len(example.ids):,} tokens, {base.name} supports at most {positions:,}; "
                f"use `max_length={positions}`"
            )
        if vocabulary is not None and example.ids.max() >= vocabulary:
            raise FitError(
                f"{example.where}: has token {example.ids.max()}, the vocabulary of {base.name} has {vocabulary:,}; "
                "its tokenizer belongs to another model"
            )


def check_not_quantized(quantize: str, base: Checkpoint) -> None:
    """Raise UsageError if a quantized base would be quantized again."""
    if quantize != "none" and base.quantization:
        raise UsageError(f"`quantize={quantize}`: {base.name} is already quantized ({base.quantization})")


def size_of(base: Checkpoint, *names: str) -> int | None:
    """The first of `names` that is a number in the config."""
    nested = base.config.get("text_config")
    config = base.config | (nested if isinstance(nested, dict) else {})
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
