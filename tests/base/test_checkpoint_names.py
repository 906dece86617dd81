"""Names on disk and in the model: compared with the names under which transformers itself saves each model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matrix.models import TASKS, Model
from matrix.trial import trials
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.base.architectures import FUSED, PER_EXPERT
from adapterkit.base.checkpoint_names import RENAMED, names_in_model
from adapterkit.base.targets import fit
from adapterkit.merging.live.modules import Parameter

Tensors = dict[str, torch.Tensor]

ROWS = {model: row for models, row in RENAMED.items() for model in models.split()}

# Tensors that are stored with rows in another order, split otherwise, or with other numbers in their names.
OTHERWISE_STORED = re.compile(
    r".*(\.permuted_|\.attn_queries\.\d|[qkv]_conv1d\.|\.moe\.|\.wte\.(new_)?embedding"
    r"|language_model\.layers\.\d+\.mlp\.(experts\.\d+\.|gate\.weight|moe_statics))"
)
# Parts of models, which those test, and models of which no tiny one can be made, or not without more packages.
NOT_MADE = """glm5_next_text inkling_mm_model lfm3_vl_vision mistral_large4_text qwen4_exp_text radio step3p5_vision
    t5gemma2_encoder vit"""
# Models of audio, robots or documents, whose names are left as they are.
NOT_NAMED = "cohere_asr dots3_note inkling_mm_model nemo_speechlm pi0"


def tasks() -> dict[str, str]:
    """Return a task of each model type that adapters are trained for."""
    return {model: task for task, (classes, _) in TASKS.items() for model in classes}


def renamed() -> set[str]:
    """Return the model types of which transformers renames tensors, as a whole or by the class of the task."""
    found = set()
    for key, rules in conversion_mapping._build_checkpoint_conversion_mapping().items():
        config = getattr(getattr(transformers, key, None), "config_class", None)
        if any(isinstance(rule, WeightRenaming) for rule in rules):
            found.add(config.model_type if config else key)
    return found & tasks().keys()


def known(name: str, model: dict[str, Any]) -> bool:
    """Return whether a model has this tensor, alone or as a part of a fused or stacked one, or fused from its own."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        for whole, pieces in FUSED.items():
            others = pieces if part == whole else [whole] if part in pieces else []
            if any(".".join([*parts[:at], other, *parts[at + 1 :]]) in model for other in others):
                return True
    expert = re.fullmatch(r"(.+\.experts)\.\d+\.(\w+)\.weight", name)
    stacked = {whole for whole, layouts in PER_EXPERT.items() for layout in layouts if expert and expert[2] in layout}
    return name in model or any(f"{expert[1]}.{whole}" in model for whole in stacked if expert)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - NOT_MADE.split()))
def test_names_on_disk_become_those_in_the_model(name: str) -> None:
    model = Model(tasks()[name], name)
    with torch.device("meta"):
        made = model.cls(model.config())
    config, tensors = made.config.to_dict(), made.state_dict()
    in_model = names_in_model(config)
    found = {stored: in_model(stored) for stored in revert_weight_conversion(made, dict(tensors))}
    assert {
        stored: name for stored, name in found.items() if not known(name, tensors) and not OTHERWISE_STORED.match(name)
    } == {}
    rules = [rule for rule in conversion_mapping.get_model_conversion_mapping(made) if isinstance(rule, WeightRenaming)]
    loaded = {
        published: rename_source_key(published, rules, [])[0] for published in sorted(as_published({*found, *tensors}))
    }
    assert {
        published: (name, in_model(published))
        for published, name in loaded.items()
        if name in tensors and published not in tensors and in_model(published) != name
    } == {}
    check_adapters(config, tensors, revert_weight_conversion(made, dict(tensors)), found)


def as_published(names: set[str]) -> set[str]:
    """Return names with the prefixes that transformers removed over time, and that published checkpoints have."""
    tower = re.compile(r"(vision_tower|image_tower|video_tower|vision_model)\.(?!vision_model)")
    older = {tower.sub(r"\1.vision_model.", name, count=1) for name in names}
    older |= {name.replace("model.language_model.", "language_model.model.", 1) for name in names}
    older |= {name.replace("model.language_model.", "model.", 1) for name in names}
    return {name for name in older | {f"thinker.{name}" for name in names} if not OTHERWISE_STORED.match(name)}


def check_adapters(config: dict[str, Any], model: Tensors, stored: Tensors, found: dict[str, str]) -> None:
    """Check that adapters with the names in the model, and with those on disk, fit bases with either names."""
    linear = {
        name.removesuffix(".weight"): on_disk.removesuffix(".weight")
        for on_disk, name in found.items()
        if name in model and name.endswith(".weight") and on_disk.endswith(".weight") and "embed" not in name
        if model[name].shape == stored[on_disk].shape and model[name].ndim == 2
    }
    for tensors, at in ((stored, linear), (model, {name: name for name in linear})):
        base = {name: Parameter(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        for names in (linear, linear.values()):
            modules = {name: factors_of(model[f"{module}.weight"]) for module, name in zip(linear, names, strict=True)}
            places = fit(Adapter("", modules), base, config)
            expected = {name: at[module] + ".weight" for module, name in zip(linear, names, strict=True)}
            assert {name: target.tensor for name, (target,) in places.targets.items()} == expected


def factors_of(weight: torch.Tensor) -> LoraWeights[LazyTensor]:
    """Return factors of the shapes for a linear layer."""
    A, B = torch.empty(2, weight.shape[1], device="meta"), torch.empty(weight.shape[0], 2, device="meta")
    return LoraWeights(LazyTensor.of(A), LazyTensor.of(B), 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [("hrm_text", "linear"), ("nemotron_h", "moe"), ("granitemoe", "moe"), ("kimi_linear", "tokens")],
)
def test_merges_into_names_on_disk_compute_what_peft_computes(name: str, recipe: str, tmp_path: Path) -> None:
    assert trials(Model("causal", name, True), [recipe], tmp_path) == {recipe: "ok"}


def test_every_architecture_with_other_names_on_disk_has_a_row() -> None:
    """Fails for new architectures and new names of transformers, which belong in the table."""
    assert renamed() - set(NOT_NAMED.split()) == (ROWS.keys() & renamed())
    assert ROWS.keys() <= set(CONFIG_MAPPING.keys())
    assert sum(len(models.split()) for models in RENAMED) == len(ROWS)


def test_names_of_unknown_architectures_are_unchanged() -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"
    for config in ({}, {"model_type": "strange"}, {"model_type": ["mixtral"]}, {"text_config": [1]}):
        assert names_in_model(config)(name) == name
