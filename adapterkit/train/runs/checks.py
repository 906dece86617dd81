"""What must hold before a weight is read: an adapter, a base and data that belong together."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.adapter.formats import load
from adapterkit.adapter.weights import WeightedAdapter, refuse_broken
from adapterkit.base.checkpoint import CONFIG, Checkpoint, is_base, open_checkpoint
from adapterkit.base.models.described import check_described
from adapterkit.base.models.loading import SMALL_FILES
from adapterkit.base.placement import missing, place
from adapterkit.base.quant import weights as weights_of
from adapterkit.base.ties import tie_of
from adapterkit.errors import FitError, UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub import hub_id, resolve
from adapterkit.train.data.tokenize import Encoded


def open_base(spec: str) -> Checkpoint:
    """The model that `spec` names, by its headers.

    Raises UsageError where it is an adapter, or a lone file, FormatError where its config is not that of its weights,
    or where a file in the Hub cache has other bytes than on the Hub.
    """
    path = resolve(spec)
    if path.exists() and not is_base(path):  # beside a model, transformers would load an adapter that it finds there
        raise UsageError(f"{path}: is no model of transformers: expected a directory with config.json and no adapter")
    base = open_checkpoint(path, hub_id(spec))
    small = (path / file for file in base.other_files()[0] if file.suffix in SMALL_FILES)
    check_cached([path / CONFIG, *small, *([base.index] if base.index else []), *(one.file for one in base.shards)])
    check_described(base)
    return base


def open_fitting(spec: str, base: Checkpoint) -> WeightedAdapter:
    """The adapter, checked to be whole and to fit `base`."""
    path = resolve(spec)
    given = WeightedAdapter(load(path), label=hub_id(spec) or path.resolve().name)
    check_cached(given.adapter.files)
    refuse_broken(given)
    adapter, tensors = given.adapter, weights_of(base.tensors, base.config)
    whole = [
        *adapter.replaced,
        *adapter.tokens,
        *(name for name, one in adapter.modules.items() if one.bias is not None),
    ]
    if whole:
        raise FitError(
            f"{given.label}: {whole[0]}: is trained whole in this adapter, and only factors and magnitudes go beside a "
            "base. Merge it, and go on with the result."
        )
    if (tie := tie_of(base)) is not None and tie.implied:
        tensors[tie.head] = replace(tensors[tie.embedding], name=tie.head)
    missing(given, place(adapter, tensors, base), base, tensors, allow_partial=False)
    return given


def check_sequences(data: Encoded, base: Checkpoint) -> None:
    """Raise where a sequence is longer than what the model can read, or holds what it has no embedding for."""
    positions, vocabulary = size_of(base, "max_position_embeddings", "n_positions"), size_of(base, "vocab_size")
    for example in data.examples:
        if positions is not None and len(example.ids) > positions:
            raise UsageError(
                f"{example.where}: has {len(example.ids):,} tokens, {base.name} reads {positions:,} at most: "
                f"--max-length {positions}"
            )
        if vocabulary is not None and example.ids.max() >= vocabulary:
            raise FitError(
                f"{example.where}: has token {example.ids.max()}, {base.name} knows {vocabulary:,}. Its tokenizer "
                "belongs to another model."
            )


def refuse_twice_quantized(quantize: str, base: Checkpoint) -> None:
    """Raise UsageError where a base in few bits is to be quantized again."""
    if quantize != "none" and base.quantization:
        raise UsageError(f"--quantize {quantize}: {base.name} is quantized already ({base.quantization})")


def size_of(base: Checkpoint, *names: str) -> int | None:
    """A number in the config, by the first of `names` that it knows."""
    nested = base.config.get("text_config")
    config = base.config | (nested if isinstance(nested, dict) else {})
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
