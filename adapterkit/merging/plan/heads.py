"""Heads of classifiers: the output's config names the class that adapters trained, and their labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.architectures import LABEL_LAYERS, TASK_CLASSES, UNSAVED_MODULES, class_for
from adapterkit.base.checkpoint import CONFIG
from adapterkit.base.vocabulary import Tensors
from adapterkit.errors import FitError
from adapterkit.files.jsonfile import read_json
from adapterkit.merging.plan.changes import Changes
from adapterkit.text import counted


def describe_heads(
    config: dict[str, Any], given: Sequence[WeightedAdapter], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of an output with the heads in adapters, and notes; `known` are the base's tensors."""
    notes: list[str] = []
    for one in given:
        layers = _label_layers(one, config)
        if unsaved := _unsaved_modules(config, one.adapter, known):
            notes.append(
                f"{one.label}: neither it nor the base has {' and '.join(unsaved)}, which PEFT did not save: "
                "transformers fills in random values; train again with modules_to_save: "
                f"[{', '.join(unsaved)}]"
            )
        if config and layers:
            answers = any(name.endswith("qa_outputs.weight") for name in layers)  # two labels without names
            ending = TASK_CLASSES.get("QUESTION_ANS" if answers else one.adapter.task or "")
            classes, more = _class(config, ending, any(name not in known for name in layers))
            labels, which = ({}, []) if answers else _labels(config, one.folder, max(layers.values()))
            config = config | classes | labels
            notes += [f"{one.label}: {note}" for note in (*more, *which)]
    return config, notes


def with_new_labels(changes: Changes, tensors: Tensors) -> Tensors:
    """Return `tensors` with the shapes of the layers that an adapter replaces with another number of labels.

    Raises FitError for a weight of the adapter that would mix labels of different heads.
    """
    found = dict(tensors)
    for name, replaced in changes.replaced.items():
        info = tensors.get(name)
        whole = [change for change in replaced if change.rows is None]
        if info is None or len(whole) != 1 or not LABEL_LAYERS.fullmatch(name.rpartition(".")[0]):
            continue
        shape = whole[0].values.shape
        if shape[1:] == info.shape[1:] and shape != info.shape:
            if whole[0].weight != 1.0:
                labels = f"the adapter has {counted(shape[0], 'label')}, the base {info.shape[0]}"
                raise FitError(f"{name}: {labels}: weight {whole[0].weight:g} would mix them", hint="use weight 1")
            found[name] = replace(info, shape=shape)
    return found


def _label_layers(given: WeightedAdapter, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the weights of layers that compute labels, which an adapter replaces, with the number of labels."""
    found = {
        name: tensor.shape[0]
        for name, tensor in given.adapter.replaced.items()
        if len(tensor.shape) == 2 and LABEL_LAYERS.fullmatch(name.removesuffix(".weight")) and given.weight_of(name)
    }
    if config.get("model_type") == "xlnet":  # whose summary is no layer of labels, as it is in XLM
        found.pop("sequence_summary.summary.weight", None)
    return found


def _unsaved_modules(config: Mapping[str, Any], adapter: Adapter, known: Collection[str]) -> list[str]:
    """Return the modules of a sequence classifier that neither the adapter nor the base has."""
    modules = UNSAVED_MODULES.get(str(config.get("model_type")), ()) if adapter.task == "SEQ_CLS" else ()
    names = [f".{name}" for name in (*known, *adapter.replaced)]
    return [module for module in modules if not any(f".{module}." in name for name in names)]


def _class(config: Mapping[str, Any], ending: str | None, new: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the changed `architectures`, and notes; `new` tells whether the base lacks the layer of the labels."""
    named = config.get("architectures")
    before = named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else None
    if ending is None or before is None:
        missing = "its config has no such task_type" if ending is None else f"the base's {CONFIG} has no architectures"
        return {}, [f"the class of the output is not known, since {missing}: load it as in training"] if new else []
    if ending in before:
        return {}, []
    after = class_for(before, ending, config)
    return {"architectures": [after]}, [f"the output is a {after}, the base a {before}"]


def _labels(config: Mapping[str, Any], folder: Path | None, count: int) -> tuple[dict[str, Any], list[str]]:
    """Return the labels from the config in the adapter's folder, or else the base's, and notes."""
    beside = read_json(folder / CONFIG) if folder and os.path.lexists(folder / CONFIG) else {}
    if (names := _names(beside)) is not None and len(names) == count:
        labels = {key: beside[key] for key in ("problem_type",) if beside.get(key)} | _as_labels(names)
        pads = type(beside.get("pad_token_id")) is int and config.get("pad_token_id") is None
        return labels | ({"pad_token_id": beside["pad_token_id"]} if pads else {}), [f"labels from its {CONFIG}"]
    if (names := _names(config)) is not None and len(names) == count:
        return {}, []
    names = [f"LABEL_{number}" for number in range(count)]
    unknown = f"the names of its {counted(count, 'label')} are not known: set id2label in {CONFIG}"
    return _as_labels(names), [unknown]


def _as_labels(names: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the labels of a config in order; None if it has none, or not one for each number."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        return None
    by_number = {str(number): name for number, name in labels.items()}
    names = [by_number.get(str(number)) for number in range(len(labels))]
    return None if None in names else [name for name in names if name is not None]
