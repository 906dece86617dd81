"""Names on disk and in the model: compared with the names under which transformers itself saves each model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.base.architectures import FUSED, PER_EXPERT
from adapterkit.base.checkpoint_names import RENAMED, names_in_model

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "layer_types": None,
}  # fmt: skip
MODELS = """aria aria_text axk2 deepseek_v3 ernie4_5_moe gpt_neox granitemoe hrm_text hy_v3 kimi_k25 llava llava_next
    minimax_m2 mistral3 mixtral nemotron_h paddleocr_vl paligemma phimoe qwen3_moe"""
PERMUTED = re.compile(r"vision_tower\.layers\.\d+\.wqkv")  # stored with permuted rows: not supported


def small(model: str) -> PreTrainedModel:
    """Make a model of this type without memory, of few layers."""
    config = CONFIG_MAPPING[model]()
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for key, value in SIZES.items() if part is not None else ():
            if key in part.to_dict() and not isinstance(getattr(type(part), key, None), property):
                setattr(part, key, value)
    with torch.device("meta"):
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        return auto.from_config(config)


def known(name: str, model: dict[str, Any]) -> bool:
    """Return whether a model has this tensor, alone or as a part of a fused or stacked one, or fused from its own."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        for piece in FUSED.get(part, ()):
            if ".".join([*parts[:at], piece, *parts[at + 1 :]]) in model:
                return True
    expert = re.fullmatch(r"(.+\.experts)\.\d+\.(\w+)\.weight", name)
    stacked = {whole for whole, layouts in PER_EXPERT.items() for layout in layouts if expert and expert[2] in layout}
    return name in model or any(f"{expert[1]}.{whole}" in model for whole in stacked if expert)


@pytest.mark.parametrize("model", MODELS.split())
def test_names_on_disk_become_those_in_the_model(model: str) -> None:
    """Also for those that are in the model's names already, as `save_original_format=False` saves them."""
    made = small(model)
    in_model, tensors = names_in_model(made.config.to_dict()), made.state_dict()
    wrong = {name: in_model(name) for name in revert_weight_conversion(made, dict(tensors))}
    wrong = {name: found for name, found in wrong.items() if not known(found, tensors) and not PERMUTED.search(found)}
    assert wrong == {}


def test_names_of_unknown_architectures_are_unchanged() -> None:
    for config in ({}, {"model_type": "strange"}, {"model_type": ["mixtral"]}, {"text_config": [1]}):
        assert names_in_model(config)("model.layers.0.block_sparse_moe.gate.weight").endswith(
            "block_sparse_moe.gate.weight"
        )


def test_every_row_names_model_types_once() -> None:
    models = [model for row in RENAMED for model in row.split()]
    assert len(models) == len(set(models))
    assert set(models) <= set(CONFIG_MAPPING.keys())
