"""The tables of architectures, compared with transformers' own models and conversions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.base.architectures import FUSED, PER_EXPERT, experts_in_out

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


# Whose tensors are concatenated convolutions or embeddings, have rows in another order, or mix experts of two kinds.
NOT_IN_TABLES = """bailing_hybrid dots3_note_vision_encoder ernie4_5_vl_moe glm5_next glm5_next_text gradium_phonon_tts
    inkling2_text inkling_mm_model kimi_k25 kimi_linear mistral_large4 Molmo2TextModel nemo_speechlm olmo_hybrid
    qwen3_vl_moe qwen4_exp_text step3p5_vision"""


def test_tensors_that_transformers_fuses_splits_or_stacks_are_in_the_tables() -> None:
    """Fails for new layouts of transformers, which belong in FUSED or PER_EXPERT."""
    unknown = set()
    for key, rules in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for rule in (rule for rule in rules if isinstance(rule, WeightConverter)):
            sources, targets = (
                [leaf(name) for name in names] for names in (rule.source_patterns, rule.target_patterns)
            )
            steps = [type(step).__name__ for step in rule.operations]
            if steps[0] == "MergeModulelist":
                known = tuple(sources) in PER_EXPERT.get(targets[0], ())
            else:
                known = steps in (["Chunk"], ["Concatenate"]) and {*map(tuple, (sources, targets))} & {*FUSED.values()}
            unknown |= set() if known else {key}
    assert unknown == set(NOT_IN_TABLES.split())


def leaf(pattern: str) -> str:
    """Return the name of the module or the parameter in a pattern of transformers."""
    return re.sub(r"\.?(weight|bias)$", "", pattern.replace("\\", "")).rpartition(".")[2]
