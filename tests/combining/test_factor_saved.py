"""Saved modules as factors, judged by the logits that PEFT computes with both adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors
from handmade import adapterkit as run
from handmade import contents
from safetensors.torch import load_file

import adapterkit
from adapterkit.adapter.weights import LazyTensor
from adapterkit.errors import FitError, UsageError

Make = Callable[..., Path]
SIZE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
IDS = torch.arange(12)[None]


def save_model(folder: Path, kind: str, tied: bool) -> None:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=1)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    elif kind == "classifier":
        config = transformers.LlamaConfig(**SIZE, pad_token_id=0, num_labels=3)
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(**SIZE, tie_word_embeddings=tied)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def load(base: Path, kind: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32)


def save_adapter(base: Path, out: Path, kind: str, **config: Any) -> None:
    """An adapter by PEFT, with random numbers in everything that it trains."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn" if kind == "gpt2" else "q_proj"]} | config
    save_embeddings = config.pop("save_embedding_layers", "auto")
    model = get_peft_model(load(base, kind), LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:  # factors hold no biases
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(out, save_embedding_layers=save_embeddings)


def logits(base: Path, adapter: Path, kind: str) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(load(base, kind), adapter)(input_ids=IDS).logits


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "embedding and head": ("llama", False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied head": ("llama", True, {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("llama", True, {"modules_to_save": ["embed_tokens"]}),
    "both, tied": ("llama", True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding that stays tied": ("llama", True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ("llama", False, {"trainable_token_indices": [2, 7, 40]}),
    "tied tokens": ("llama", True, {"trainable_token_indices": [2, 7, 40]}),
    "linear layers, rsLoRA": ("llama", False, {"modules_to_save": ["down_proj"], "use_rslora": True}),
    "patterns": ("llama", False, {
        "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    }),
    "Conv1D": ("gpt2", True, {"modules_to_save": ["c_fc", "wte"]}),
    "classifier": ("classifier", False, {"task_type": "SEQ_CLS"}),
    "unchanged embeddings below factors": ("llama", False, {
        "target_modules": ["q_proj", "embed_tokens"], "save_embedding_layers": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same_logits_at_full_rank(name: str, tmp_path: Path) -> None:
    kind, tied, config = CASES[name]
    save_model(tmp_path / "base", kind, tied)
    save_adapter(tmp_path / "base", tmp_path / "adapter", kind, **config)
    before = contents(tmp_path / "adapter")
    to = "rslora" if config.get("use_rslora") else "lora"
    made = adapterkit.convert(
        tmp_path / "adapter", tmp_path / "out", to=to, base=tmp_path / "base", saved="factors", rank=64
    )
    assert contents(tmp_path / "adapter") == before
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in tensors)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert made.error < 1e-5
    expected, found = (logits(tmp_path / "base", tmp_path / out, kind) for out in ("adapter", "out"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = load(tmp_path / "base", kind)(input_ids=IDS).logits
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


# --- without PEFT ----------------------------------------------------------------------------------------------------


@pytest.fixture
def base(make_base: Make) -> Path:
    """A base in bf16 with a head of its own, and a bias and a norm that adapters may store whole."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(24, 16), "model.layers.0.q.weight": torch.randn(16, 16),
        "model.layers.0.q.bias": torch.randn(16), "model.norm.weight": torch.ones(16), "lm_head.weight": torch.randn(24, 16),
    }  # fmt: skip
    return make_base({name: tensor.bfloat16() for name, tensor in tensors.items()}, {"model_type": "llama"})


def convert(model: Path, adapter: Path, out: Path, **how: Any) -> Any:
    return adapterkit.convert(adapter, out, **({"to": "lora", "base": model, "saved": "factors", "rank": 4} | how))


def delta(adapter: Any, module: str) -> torch.Tensor:
    weights = adapter[module]
    return weights.scaling * weights.B.double() @ weights.A.double()


def test_the_loss_is_that_of_the_best_approximation_and_is_stated(
    base: Path, make_adapter: Make, tmp_path: Path
) -> None:
    """On top of factors that the module has already, whose sum is approximated."""
    W = load_file(base / "model.safetensors")["lm_head.weight"].float()
    saved = W + torch.randn(24, 16) * torch.logspace(0, -2, 16)
    parts = factors("lm_head", 24, 16) | factors("model.layers.0.q", 16, 16)
    adapter = make_adapter(parts | {"lm_head.base_layer.weight": saved})
    made = convert(base, adapter, tmp_path / "out")
    exact = (saved - W).double() + 1.5 * parts["lm_head.lora_B.weight"].double() @ parts[
        "lm_head.lora_A.weight"
    ].double()
    sigma = torch.linalg.svdvals(exact)
    assert (delta(made.adapter, "lm_head") - exact).norm() == pytest.approx(float(sigma[4:].norm()), rel=1e-2)
    row = next(row for row in made.modules if row.name == "lm_head")
    assert row.error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-2)
    assert torch.equal(made.adapter["model.layers.0.q"].A, parts["model.layers.0.q.lora_A.weight"])
    assert convert(base, adapter, tmp_path / "all", rank=16).error < 1e-6
    energy = convert(base, adapter, tmp_path / "energy", rank=None, energy=0.9).adapter
    assert energy.modules["lm_head"].rank == int((sigma.square().cumsum(0) < 0.9 * sigma.square().sum()).sum()) + 1
    given = ["convert", adapter, "-o", tmp_path / "cli", "--to", "lora", "--saved", "factors", "--base", base]
    shown = run(*given, "--rank", "4")
    assert shown.code == 0 and "(worst: lm_head," in shown.out, shown
    planned = json.loads(run(*given[:3], tmp_path / "new", *given[4:], "--rank", "4", "--dry-run", "--json").out)
    assert planned["modules"] == 2 and planned["made"] == "converted to lora to rank 4, saved modules to factors"


def test_a_merge_of_the_factors_is_that_of_the_adapter(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    parts = {"model.embed_tokens.weight": torch.randn(24, 16), "lm_head.weight": torch.randn(24, 16)}
    parts |= {"model.norm.weight": before["model.norm.weight"].float()}  # equal, so it needs no factors
    adapter = make_adapter(
        parts | factors("model.layers.0.q", 16, 16), modules_to_save=["embed_tokens", "lm_head", "norm"]
    )
    made = convert(base, adapter, tmp_path / "out", rank=16)
    assert made.adapter.modules["model.embed_tokens"].kind == "embedding"
    for name in ("adapter", "out"):
        adapterkit.merge(base, tmp_path / name, tmp_path / f"merged-{name}", dtype="fp32")
    one, other = (load_file(tmp_path / f"merged-{name}" / "model.safetensors") for name in ("adapter", "out"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-5), name

    adapterkit.quantize(base, tmp_path / "nf4", to="nf4")  # the difference is from what is dequantized
    made = convert(tmp_path / "nf4", adapter, tmp_path / "quantized", rank=16)
    assert torch.allclose(
        delta(made.adapter, "lm_head"), delta(adapterkit.load(tmp_path / "out"), "lm_head"), atol=1e-5
    )


def test_what_equals_the_base_is_left_out(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    same = {"lm_head.weight": load_file(base / "model.safetensors")["lm_head.weight"]}
    adapter = make_adapter(same | factors("model.layers.0.q", 16, 16), modules_to_save=["lm_head"])
    made = convert(base, adapter, tmp_path / "out")
    assert list(made.adapter.modules) == ["model.layers.0.q"]
    assert made.notes == ("left out 1 saved module equal to the base's (first: lm_head)",)
    with pytest.raises(FitError, match="only: all that it stores equals the base"):
        convert(base, make_adapter(same, "only", modules_to_save=["lm_head"]), tmp_path / "none")


def test_what_factors_cannot_hold_is_refused(base: Path, make_adapter: Make, make_base: Make, tmp_path: Path) -> None:
    q = factors("model.layers.0.q", 16, 16)
    refused: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
        "norm": ({"model.norm.weight": torch.randn(16)}, {}, "norm.weight differs from the base's, and factors hold only"),
        "bias": ({"model.layers.0.q.bias": torch.randn(16)}, {}, "q.bias differs from the base's"),
        "new": ({"score.weight": torch.randn(3, 16)}, {}, "score.weight is not in the base, so it has no difference"),
        "grown": ({"lm_head.weight": torch.randn(26, 16)}, {}, r"is \(26, 16\), in the base \(24, 16\): factors add no"),
        "token": (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(1, 16)},
            {"trainable_token_indices": {"embed_tokens": [24]}}, "factors add no rows",
        ),
        "dora": (
            {"lm_head.base_layer.weight": torch.randn(24, 16), "lm_head.lora_magnitude_vector": torch.rand(24)}
            | factors("lm_head", 24, 16) | {"model.layers.0.q.lora_magnitude_vector": torch.rand(16)},
            {"use_dora": True}, "convert the adapter to lora first",
        ),
    }  # fmt: skip
    for name, (parts, config, says) in refused.items():
        saved = {} if "token" in name or "dora" in name else {"modules_to_save": ["norm", "q", "score", "lm_head"]}
        adapter = make_adapter(q | parts, name, **saved, **config)
        with pytest.raises((FitError, UsageError), match=says):
            convert(base, adapter, tmp_path / "out")
    for value in (torch.nan, torch.inf):
        adapter = make_adapter({"lm_head.weight": torch.full((24, 16), value)}, f"{value}", modules_to_save=["lm_head"])
        with pytest.raises(FitError, match="lm_head: W_saved − W contains NaN or Inf"):
            convert(base, adapter, tmp_path / "out")
    plain = make_adapter(q, "plain")
    for how, says in (
        ({}, "plain: stores no module whole; omit `saved`"),
        ({"rank": None}, "give `rank` or `energy`"),
        ({"base": None}, "converting saved modules needs the base model"),
        ({"to": "dora"}, "convert the adapter to lora first"),
        ({"saved": "whole"}, "expected one of keep, factors"),
    ):
        with pytest.raises(UsageError, match=says):
            convert(base, plain, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "unheard"}, "it is unknown whether base ties"),
        ({"model_type": "t5"}, "may be shared by an encoder"),
    ],
)
def test_embeddings_that_may_be_tied_are_refused(
    config: dict[str, Any], says: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    tied = make_base({"shared.weight": torch.randn(24, 16)}, config)
    adapter = make_adapter({"shared.weight": torch.randn(24, 16)}, modules_to_save=["shared"])
    with pytest.raises(FitError, match=says):
        convert(tied, adapter, tmp_path / "out")


def test_trained_tokens_over_a_saved_embedding_in_memory(base: Path, make_adapter: Make, tmp_path: Path) -> None:
    """The tensors of an adapter in memory stay as they are."""
    saved, rows = torch.randn(24, 16), torch.randn(2, 16)
    module = "model.embed_tokens.token_adapter"
    parts = {f"{module}.base_layer.weight": saved, f"{module}.trainable_tokens_delta": rows}
    config = {"trainable_token_indices": {"embed_tokens": [3, 20]}}
    opened = adapterkit.load(make_adapter(parts | factors("model.layers.0.q", 16, 16), **config))
    whole = LazyTensor.of(saved.clone())
    adapter = replace(opened, replaced={"model.embed_tokens.weight": whole}, config={})
    made = convert(base, adapter, tmp_path / "out", rank=16)
    assert torch.equal(whole.read(), saved)
    expected = saved.clone()
    expected[[3, 20]] = rows
    W = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.allclose(delta(made.adapter, "model.embed_tokens").T.float(), expected - W, atol=1e-5)
