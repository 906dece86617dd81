"""Merged classifiers: their class, their labels and their heads, as transformers loads them from the output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matrix.models import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.auto import modeling_auto

import adapterkit
from adapterkit.base.architectures import TASK_CLASSES, UNSAVED_MODULES, class_for
from adapterkit.errors import FitError

IDS = torch.arange(3, 12)[None]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
AUTO: dict[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
BASES: dict[str, tuple[PreTrainedModel, str, str]] = {
    "llama": (LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, pad_token_id=0)), "SEQ_CLS", "q_proj"),
    "llama, tokens": (LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1)), "TOKEN_CLS", "q_proj"),
    "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)), "SEQ_CLS", "c_attn"),
    "bert": (BertForMaskedLM(BertConfig(**TINY)), "TOKEN_CLS", "query"),
    "gemma3, tied": (Gemma3ForCausalLM(Gemma3TextConfig(**TINY, num_key_value_heads=1, head_dim=8, pad_token_id=0)), "SEQ_CLS", "q_proj"),
}  # fmt: skip


def train(
    base: Path, folder: Path, task: str, target: str, saved: list[str] | None = None, **config: Any
) -> list[torch.Tensor]:
    """Save an adapter for a model of `base` with a new head, and return the outputs of PEFT's model."""
    cls = AUTO.get(task, BertForQuestionAnswering)
    model = get_peft_model(
        cls.from_pretrained(base, dtype=torch.float32, **config),
        LoraConfig(task_type=task, r=2, lora_alpha=5, target_modules=[target], modules_to_save=saved),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return outputs(model)


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).to_tuple()
    return [one for one in found if isinstance(one, torch.Tensor)]


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", BASES)
def test_a_causal_base_becomes_a_classifier(name: str, tmp_path: Path) -> None:
    model, task, target = BASES[name]
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    model.save_pretrained(base)
    expected = train(base, adapter, task, target, num_labels=3)
    plan = adapterkit.plan_merge(base, [adapter], out)
    adapterkit.merge(base, [adapter], out)
    config = written(out)
    loaded = getattr(transformers, config["architectures"][0]).from_pretrained(out)
    for one in (loaded, AUTO[task].from_pretrained(out)):
        for found, value in zip(outputs(one), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert config["architectures"][0].endswith(TASK_CLASSES[task]) and config["id2label"].keys() == set("012")
    assert "adapter: the names of its 3 labels are not known: set id2label in config.json" in plan.notes
    assert f"adapter: the output is a {config['architectures'][0]}, the base a {type(model).__name__}" in plan.notes
    adapterkit.unmerge(out, tmp_path / "back", adapters=[adapter])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (base / file).read_bytes()


def test_answers_to_questions(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path / "base")
    expected = train(tmp_path / "base", tmp_path / "adapter", "QUESTION_ANS", "query")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert written(tmp_path / "out")["architectures"] == ["BertForQuestionAnswering"]
    for found, value in zip(outputs(BertForQuestionAnswering.from_pretrained(tmp_path / "out")), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_a_base_without_a_head_gets_one(tmp_path: Path) -> None:
    """The base's names have no prefix, and those of the adapter have one."""
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    BertModel(BertConfig(**TINY), add_pooling_layer=False).save_pretrained(base)
    expected = train(base, adapter, "TOKEN_CLS", "query", num_labels=3)
    plan = adapterkit.plan_merge(base, [adapter], out)
    adapterkit.merge(base, [adapter], out)
    assert any("bert. → (nothing)" in note for note in plan.notes) and any(
        "transformers 5" in note for note in plan.notes
    )
    loaded, how = BertForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert written(out)["architectures"] == ["BertForTokenClassification"] and not any(how.values())
    for found, value in zip(outputs(loaded), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))
    adapterkit.unmerge(out, tmp_path / "back", adapters=[adapter])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("has_pooler", [True, False])
def test_a_layer_that_peft_did_not_save(has_pooler: bool, tmp_path: Path) -> None:
    """Checkpoints of masked language models have no pooler; that of a new classifier is random, and not saved."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    (BertModel if has_pooler else BertForMaskedLM)(BertConfig(**TINY)).save_pretrained(base)
    train(base, adapter, "SEQ_CLS", "query", num_labels=3)
    notes = adapterkit.plan_merge(base, [adapter], tmp_path / "out").notes
    assert (
        any("neither it nor the base has pooler, which PEFT did not save" in note for note in notes) is not has_pooler
    )


@pytest.mark.parametrize("name", ["bart", "xlnet"])
def test_a_classifier_whose_modules_are_saved_by_name(name: str, tmp_path: Path) -> None:
    """PEFT saves `classifier` and `score` by itself; XLNet's summary has a row for each hidden feature, not label."""
    model, target, modules = {
        "bart": (BartForConditionalGeneration(tiny(BartConfig, eos_token_id=11)), "q_proj", ["classification_head"]),
        "xlnet": (XLNetLMHeadModel(tiny(XLNetConfig)), "layer_1", ["sequence_summary", "logits_proj"]),
    }[name]
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    train(base, tmp_path / "unsaved", "SEQ_CLS", target, num_labels=3)
    plan = adapterkit.plan_merge(base, [tmp_path / "unsaved"], out)
    told = f"unsaved: neither it nor the base has {' and '.join(modules)}, which PEFT did not save: transformers fills "
    assert any(note.startswith(told) for note in plan.notes)
    expected = train(base, tmp_path / "saved", "SEQ_CLS", target, modules, num_labels=3)
    plan = adapterkit.plan_merge(base, [tmp_path / "saved"], out)
    assert not any("did not save" in note for note in plan.notes)
    adapterkit.merge(base, [tmp_path / "saved"], out)
    cls = getattr(transformers, written(out)["architectures"][0])
    loaded, how = cls.from_pretrained(out, output_loading_info=True)
    assert not how["missing_keys"] and loaded.config.num_labels == 3
    torch.testing.assert_close(outputs(loaded)[0], expected[0], rtol=0, atol=1e-5 * float(expected[0].abs().max()))


@pytest.mark.slow
def test_layers_that_peft_does_not_save_are_those_of_transformers() -> None:
    found = {}
    for model, name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items():
        if model not in UNSAVED_MODULES:
            continue
        cls = getattr(transformers, name)
        with torch.device("meta"):
            names = [f".{name}" for name, _ in cls(tiny(cls.config_class)).named_parameters()]
        found[model] = all(any(f".{module}." in name for name in names) for module in UNSAVED_MODULES[model])
    assert found == dict.fromkeys(UNSAVED_MODULES, True)


def test_an_adapter_of_a_model_without_a_head(tmp_path: Path) -> None:
    """The adapter's names have no prefix, and those of the base have one."""
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=0, atol=1e-5)


NAMES = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
LABEL_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str] | None, str]] = {
    "in the adapter's folder": ({}, NAMES | {"problem_type": "single_label_classification", "pad_token_id": 0}, ["bad", "fair", "good"], "labels from its config.json"),
    "in the base": (NAMES, {}, ["bad", "fair", "good"], ""),
    "in both": ({"id2label": {"0": "a", "1": "b", "2": "c"}}, NAMES, ["bad", "fair", "good"], "labels from its config.json"),
    "of another head": ({"id2label": {"0": "a", "1": "b"}}, {"id2label": {"0": "a"}}, None, "are not known"),
    "numbered wrongly": ({}, {"id2label": {"0": "a", "1": "b", "3": "c"}}, None, "are not known"),
    "not names": ({}, {"id2label": {"0": 1, "1": 2, "2": 3}}, None, "are not known"),
    "not a mapping": ({}, {"id2label": ["a", "b", "c"]}, None, "are not known"),
}  # fmt: skip


@pytest.mark.parametrize("case", LABEL_CASES)
def test_labels(case: str, tmp_path: Path) -> None:
    in_base, beside, expected, note = LABEL_CASES[case]
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1)).bfloat16().save_pretrained(base)
    train(base, adapter, "SEQ_CLS", "q_proj", num_labels=3, pad_token_id=0)
    (base / "config.json").write_text(json.dumps(written(base) | in_base))
    (adapter / "config.json").write_text(json.dumps(beside))
    plan = adapterkit.plan_merge(base, [adapter], out)
    adapterkit.merge(base, [adapter], out)
    config = written(out)
    names = expected or ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert config["id2label"] == {str(number): name for number, name in enumerate(names)}
    assert {config["label2id"][name] for name in names} == {0, 1, 2}
    assert (config.get("problem_type"), config["pad_token_id"]) == (
        beside.get("problem_type"),
        beside.get("pad_token_id"),
    )
    assert any(note in one for one in plan.notes) if note else not any("label" in one for one in plan.notes)
    assert AutoModelForSequenceClassification.from_pretrained(out).config.num_labels == 3
    head = load_file(out / "model.safetensors")["score.weight"]  # float32 in the adapter
    assert (head.dtype, head.shape) == (torch.bfloat16, (3, 16))


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_with_another_number_of_labels(labels: int, tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    BertForTokenClassification(BertConfig(**TINY, **names)).save_pretrained(base)
    expected = train(base, adapter, "TOKEN_CLS", "query", num_labels=labels, ignore_mismatched_sizes=True)
    adapterkit.merge(base, [adapter], out)
    loaded = BertForTokenClassification.from_pretrained(out)
    assert loaded.config.id2label == {number: f"LABEL_{number}" for number in range(labels)}
    for found, value in zip(outputs(loaded), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert all(one.fits for one in adapterkit.verify(out, base, [adapter]))
    adapterkit.unmerge(out, tmp_path / "back", adapters=[adapter])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (base / file).read_bytes()
    with pytest.raises(FitError, match=f"the adapter has {labels} labels, the base 3: weight 0.5 would mix them"):
        adapterkit.plan_merge(base, [(adapter, 0.5)], tmp_path / "half")


def test_a_head_of_an_unknown_task(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1)).save_pretrained(base)
    train(base, adapter, "SEQ_CLS", "q_proj", num_labels=3, pad_token_id=0)
    (adapter / "adapter_config.json").unlink()
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out", alpha=5)
    assert plan.config["architectures"] == ["LlamaForCausalLM"]
    assert any("the class of the output is not known" in note for note in plan.notes)


def test_classes_are_named_as_in_transformers() -> None:
    tables = [table for name, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)]
    of_type: dict[str, set[str]] = {}
    for table in tables:
        for model, names in table.items():
            of_type.setdefault(model, set()).update([names] if isinstance(names, str) else names)
    for task, kind in (("SEQ_CLS", "SEQUENCE_CLASSIFICATION"), ("TOKEN_CLS", "TOKEN_CLASSIFICATION"), ("QUESTION_ANS", "QUESTION_ANSWERING")):  # fmt: skip
        for model, name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").items():
            for before in of_type[model] - {"JevForDecision"}:
                assert class_for(before, TASK_CLASSES[task], {"model_type": model}) == name
