"""The recipes of adapters: the arguments of PEFT's LoraConfig with which people train, for any model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The modules that compute queries and values, also fused, in the words of all architectures.
QUERY_VALUE = re.compile(
    r"(q|v|to_q|to_v|q_lin|v_lin|query|value|[qv]_proj|q_a_proj|kv_b_proj|c_attn|att_proj|in_proj|Wqkv|qkv|qkv_proj|query_key_value)"
)
# What PEFT cannot train, by model type: it refuses `out_proj`, the others are no plain linear layers, or are not called.
UNTRAINABLE = {
    **{name: ["out_proj", "dt_proj"] for name in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")},
    **{name: ["router"] for name in ("llama4", "llama4_text", "phimoe")},
    "deepseek_v4": ["o_a_proj"],
    "jamba": ["dt_proj"],
    "layoutlmv3": ["rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"],
    "longcat_flash": ["classifier"],
}
# What new classifiers have, PEFT doesn't save by itself and language models lack: people name it in `modules_to_save`.
UNSAVED = {
    name: modules.split()
    for modules, names in {
        "classification_head": "bart bigbird_pegasus mbart mt5 mvp plbart t5 umt5",
        "dense": "eurobert",
        "head": "modernbert-decoder modernvbert",
        "pooler": "deberta deberta-v2 gte nomic_bert rembert tapas",
        "sequence_summary": "flaubert xlm",
        "sequence_summary logits_proj": "xlnet",
    }.items()
    for name in names.split()
}
TOKENS = (5, 9, 90)  # trained rows; two of them are in the prompt
NEW_TOKENS = 3

Config = dict[str, Any]


@dataclass(frozen=True)
class Layers:
    """The last names of a model's layers, as LoraConfig takes them."""

    linear: list[str]
    query_value: list[str]
    untrainable: list[str]  # what PEFT cannot train: last names, and full names of modules that have those of others
    unsaved: list[str]  # modules of a new classifier that are saved only by name
    experts: Config  # what targets stacked experts; empty where there are none
    embedding: str
    head: str | None
    tied: bool
    normed: bool  # the embedding has layers of its own
    vocabulary: int  # rows of the embeddings

    @property
    def some(self) -> list[str]:
        """The modules that are trained beside what a recipe is about."""
        return self.query_value or self.linear[:1]

    @property
    def ends(self) -> list[str]:
        return [self.embedding, *([self.head] if self.head else [])]


def layers_of(model: PreTrainedModel) -> Layers:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    full_names = {module: name for name, module in model.named_modules()}
    names = {module: name.rpartition(".")[2] for module, name in full_names.items()}
    never = UNTRAINABLE.get(model.config.model_type, [])
    linear = [name for module, name in names.items() if is_linear(module) and module is not head and name not in never]
    query_value = sorted({name for name in linear if QUERY_VALUE.fullmatch(name)})
    others = [full_names[module] for module, name in names.items() if name in query_value and not is_linear(module)]
    return Layers(
        linear=list(dict.fromkeys(linear)),
        query_value=query_value,
        untrainable=never + others,
        unsaved=[*UNSAVED.get(model.config.model_type, [])],  # a copy, to which PEFT adds the head
        experts=_experts(model),
        embedding=names[embedding],
        head=names.get(head),
        tied=head is not None and head.weight is embedding.weight,
        normed=any(embedding.children()),
        vocabulary=embedding.weight.shape[0],
    )


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def _experts(model: PreTrainedModel) -> Config:
    """Return what targets the stacked experts: v4's names of modules where PEFT converts them, or the parameters."""
    stacked = {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if "expert" in name and parameter.ndim == 3
    }
    converted = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, ""))
    if stacked and converted:
        return {"target_modules": [name for name in converted if name != "gate"]}
    return {"target_parameters": sorted(stacked)} if stacked else {}


def _linear(layers: Layers) -> Config:
    return {"target_modules": "all-linear"}


def _dora(layers: Layers) -> Config | None:
    return {"target_modules": layers.query_value, "use_dora": True, "r": 3} if layers.query_value else None


def _moe(layers: Layers) -> Config | None:
    modules = [*layers.some, *layers.experts.get("target_modules", [])]
    return layers.experts | {"target_modules": modules} if layers.experts else None


def _patterns(layers: Layers) -> Config:
    first, last = layers.linear[0], layers.linear[-1]
    return {
        "target_modules": "all-linear",
        "exclude_modules": layers.untrainable + ([last] if last != first else []),
        "rank_pattern": {r"(?:.*\.)?0\..*": 2},
        "alpha_pattern": {first: 3},
        "use_rslora": True,
    }


def _ends(layers: Layers) -> Config:
    return {"target_modules": layers.some + layers.ends}


def _saved(layers: Layers) -> Config:
    return {"target_modules": layers.some, "modules_to_save": layers.ends}


def _tokens(layers: Layers) -> Config:
    if layers.normed:
        raise NotImplementedError("PEFT leaves out the norm that the model applies to its embeddings")
    return {"target_modules": layers.some, "trainable_token_indices": {layers.embedding: list(TOKENS)}}


def _new_tokens(layers: Layers) -> Config:
    _tokens(layers)
    new = list(range(layers.vocabulary - NEW_TOKENS, layers.vocabulary))
    trained = [layers.embedding] if layers.tied else layers.ends
    return {"target_modules": layers.some, "trainable_token_indices": dict.fromkeys(trained, new)}


def _new_head(layers: Layers) -> Config:
    return {"target_modules": layers.some} | ({"modules_to_save": layers.unsaved} if layers.unsaved else {})


@dataclass(frozen=True)
class Recipe:
    """A kind of adapter, and what happens to the model before it is trained."""

    title: str
    of: Callable[[Layers], Config | None]  # None: there is nothing in the model to train so
    ends: bool = False  # it changes the embeddings or the head, which may be tied
    grown: bool = False  # the vocabulary grows by NEW_TOKENS
    headless: bool = False  # the base is a language model, without a classifier's head
    tasks: tuple[str, ...] = ("causal", "seq2seq", "classification", "vision")

    def config(self, layers: Layers) -> Config | None:
        if (made := self.of(layers)) is None:
            return None
        return {"r": 4, "lora_alpha": 10, "init_lora_weights": False, "exclude_modules": layers.untrainable} | made


HEADED = ("causal", "seq2seq", "vision")
RECIPES = {
    "linear": Recipe("all linear", _linear),
    "dora": Recipe("DoRA on q, v", _dora),
    "patterns": Recipe("patterns, rsLoRA", _patterns),
    "moe": Recipe("experts", _moe),
    "embeddings": Recipe("embeddings, head", _ends, ends=True),
    "saved": Recipe("saved embeddings, head", _saved, ends=True),
    "tokens": Recipe("trained tokens", _tokens, ends=True),
    "new-tokens": Recipe("new tokens", _new_tokens, ends=True, grown=True, tasks=HEADED),
    "grown": Recipe("new tokens, saved", _saved, ends=True, grown=True, tasks=HEADED),
    "new-head": Recipe("new classifier", _new_head, headless=True, tasks=("classification",)),
}
