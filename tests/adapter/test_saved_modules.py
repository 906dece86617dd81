"""Modules that PEFT saves whole: by task, by the ends of their names, and in its wrappers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import factors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import adapterkit

IDS = torch.arange(3, 12)[None]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
# The model, its config, and the PEFT config: DistilBERT's pre_classifier ends with `classifier`, so PEFT saves it too.
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=20, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=3),
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]},
    ),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0),
        {"task_type": "SEQ_CLS", "target_modules": ["c_attn"]},
    ),
    "llama, tokens": (
        LlamaForTokenClassification,
        LlamaConfig(**TINY, num_key_value_heads=1, num_labels=4),
        {"task_type": "TOKEN_CLS", "target_modules": ["q_proj"]},
    ),
    "bert, answers": (
        BertForQuestionAnswering,
        BertConfig(**TINY),
        {"task_type": "QUESTION_ANS", "target_modules": ["query"], "bias": "all"},
    ),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig(**TINY, num_labels=3),
        {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"]},
    ),
    "roberta, a saved module in a saved module": (
        RobertaForSequenceClassification,
        RobertaConfig(**TINY, num_labels=3),
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["out_proj"]},
    ),
}


@pytest.fixture(params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path, list[torch.Tensor]]:
    """A class, a base of it, an adapter, and the outputs of PEFT's model before it was saved."""
    cls, config, how = MODELS[request.param]
    cls(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), LoraConfig(r=2, lora_alpha=5, **how))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return cls, tmp_path / "base", tmp_path / "adapter", outputs(model)


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """The model's outputs for fixed tokens."""
    with torch.no_grad():
        return [one for one in model.eval()(input_ids=IDS).to_tuple() if isinstance(one, torch.Tensor)]


def assert_computes(model: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    for one, other in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def configured(adapter: Path, out: Path, change: Callable[[dict[str, Any]], None] | None) -> Path:
    """Copy an adapter with a changed config, or without one."""
    copytree(adapter, out)
    file = out / "adapter_config.json"
    config = json.loads(file.read_text())
    if change is None:
        file.unlink()
    else:
        change(config)
        file.write_text(json.dumps(config))
    return out


def test_heads_are_read_however_peft_recorded_them(trained: Any, tmp_path: Path) -> None:
    """The config lists them, older versions left `modules_to_save` null, and files get lost."""
    cls, base, adapter, expected = trained
    older = configured(adapter, tmp_path / "older", lambda config: config.update(modules_to_save=None))
    alone = configured(adapter, tmp_path / "alone", None)
    merged = []
    for path, strength in ((adapter, {}), (older, {}), (alone, {"alpha": 5})):
        out = tmp_path / f"out-{path.name}"
        adapterkit.merge(base, [path], out, **strength)
        assert_computes(cls.from_pretrained(out), expected)
        merged.append((out / "model.safetensors").read_bytes())
        assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert merged[1:] == merged[:1] * 2
    adapterkit.unmerge(tmp_path / "out-older", tmp_path / "back", adapters=[older])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert not [one for one in adapterkit.load(adapter).problems if "has tensors" in one.what]
    assert adapterkit.compare([older, adapter])


def test_peft_loads_what_is_made_of_adapters_with_heads(trained: Any, tmp_path: Path) -> None:
    cls, base, adapter, expected = trained
    adapterkit.resize(adapter, tmp_path / "resized", rank=2)
    adapterkit.combine([(adapter, 0.5), (adapter, 0.5)], tmp_path / "combined", saved="first")
    for made in ("resized", "combined"):
        with warnings.catch_warnings(action="ignore"):
            model = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / made)
        assert (
            model.peft_config["default"].task_type
            == json.loads((adapter / "adapter_config.json").read_text())["task_type"]
        )
        assert_computes(model, expected)


def test_counters_in_saved_modules(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """SegFormer's decode head has a batch norm, which counts batches in an integer."""
    norm = {"weight": torch.randn(4), "running_mean": torch.randn(4)}
    saved = {f"decode_head.norm.{leaf}": tensor for leaf, tensor in norm.items()}
    before = {name: torch.zeros(4) for name in saved} | {"q.weight": torch.randn(6, 10)}
    base = make_base(before | {"decode_head.norm.num_batches_tracked": torch.tensor(3)})
    counter = {"decode_head.norm.num_batches_tracked": torch.tensor(7)}
    adapter = make_adapter(factors("q", 6, 10) | saved | counter, modules_to_save=["decode_head"])
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert "adapter: leaves 1 counter of batches (num_batches_tracked)" in plan.notes
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in saved.items())
    assert merged["decode_head.norm.num_batches_tracked"] == 3
