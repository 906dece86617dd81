"""The tables of architectures, compared with transformers' own models and conversions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.base.architectures import experts_in_out

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize("model", ["aria_text", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe"])
def test_stacked_experts_are_stored_in_the_orientation_of_transformers(model: str) -> None:
    config = CONFIG_MAPPING[model](**SIZES, intermediate_size=24, moe_intermediate_size=24)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()
    shape = next(tuple(p.shape) for name, p in parameters if name.endswith("experts.gate_up_proj"))
    assert experts_in_out({"model_type": model}) is (shape[1:] == (32, 48))


@pytest.mark.parametrize(
    ("config", "in_out"),
    [
        ({}, None),
        ({"model_type": "strange"}, None),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "gpt_oss"}}, True),
        ({"model_type": "strange", "text_config": {"model_type": "mixtral"}}, False),
        ({"model_type": "mixtral", "text_config": None}, False),
    ],
)
def test_the_text_model_decides_how_experts_are_stored(config: dict[str, Any], in_out: bool | None) -> None:
    assert experts_in_out(config) is in_out
