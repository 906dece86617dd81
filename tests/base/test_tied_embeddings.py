"""Tied embeddings: compared with how transformers resolves a config, and with PEFT for adapters that change one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import factors
from matrix.models import Model, registry
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import adapterkit
from adapterkit.base import tied_embeddings
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.tied_embeddings import declared
from adapterkit.base.vocabulary import head_suffix
from adapterkit.errors import FitError

# --- the tables ------------------------------------------------------------------------------------------------------

# Whose parts decide, one with two heads, and four with incomplete configs.
UNKNOWN = {"kosmos-2", "kosmos-2.5", "muse_glimmer", "neomme", "perception_lm", "gemma4_assistant", "step3p7"}
MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM")


def mapped() -> dict[str, list[str]]:
    """Return transformers' classes with a head over the vocabulary, by model_type."""
    classes: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for model, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            classes.setdefault(model, []).extend([names] if isinstance(names, str) else names)
    return classes


def resolved(config: dict[str, Any]) -> bool | None:
    """Return whether transformers ties a model with this config.json."""
    if config["model_type"] in tied_embeddings.NEVER_TIED:
        return False
    found = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return getattr(
        found.text_config if config["model_type"] in tied_embeddings.TEXT_CONFIG_DECIDES else found,
        "tie_word_embeddings",
        None,
    )


def configs(model: str) -> Iterator[dict[str, Any]]:
    """Yield configs of this type with and without the key, in the config and in its text_config."""
    kind: dict[str, Any] = {"model_type": model}
    text = getattr(CONFIG_MAPPING[model].from_dict(kind), "text_config", None)
    if text is None or model == "fun_asr_nano":  # its text model needs more than its type
        yield kind
        yield kind | {"tie_word_embeddings": False}
        return
    for inner in ({}, {"tie_word_embeddings": True}):
        for outer in ({}, {"tie_word_embeddings": False}):
            yield kind | outer | {"text_config": {"model_type": text.model_type} | inner}


def test_every_architecture_is_tied_as_in_transformers() -> None:
    """Fails for new architectures and new defaults, which belong in the tables of `architectures.py`."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    wrong = [
        (config, tied)
        for model in mapped().keys() - UNKNOWN
        for config in configs(model)
        if (tied := resolved(config)) is not declared(config)
    ]
    assert wrong == []


def test_architectures_without_a_tie_in_transformers_are_never_tied() -> None:
    """Except those of which a part has the tie, and those that make it themselves or are unknown."""
    elsewhere = {"dia", "encoder-decoder", "fsmt", "musicgen", "musicgen_melody", "perceiver", "pi0", "pix2struct"}
    elsewhere |= {"qwen2_5_omni", "qwen3_omni_moe", "speech-encoder-decoder", "vision-encoder-decoder"}
    known = tied_embeddings.NEVER_TIED | tied_embeddings.TEXT_CONFIG_DECIDES | elsewhere
    for model, names in mapped().items():
        without = [name for name in names if not getattr(transformers, name)._tied_weights_keys]
        assert model in known or known.issuperset(without), (model, without)
        assert model not in tied_embeddings.NEVER_TIED or len(without) == len(names), model


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "seq2seq", "vision"])
def test_tiny_models_tie_as_their_configs_declare(task: str) -> None:
    """With the key set in the config and in its text_config."""
    wrong = []
    for name in (name for of, name in registry() if of == task):
        for outer, inner in itertools.product((True, False), repeat=2):
            model = Model(task, name, outer)
            with contextlib.suppress(Exception), torch.device("meta"):  # no config of such small sizes
                config = model.config().to_dict()
                if isinstance(config.get("text_config"), dict):
                    config["text_config"]["tie_word_embeddings"] = inner
                made = model.cls(model.cls.config_class.from_dict(dict(config)))
                made.tie_weights()
                embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
                tied = declared(config | {"architectures": [model.cls.__name__]})
                if head is not None and (embedding.weight is head.weight) is not tied:
                    wrong.append((name, outer, inner))
    assert {name for name, *_ in wrong} <= {"encoder-decoder", "t5gemma", "kosmos-2.5"}


def test_every_head_has_its_name_in_transformers() -> None:
    wrong = []
    for model, names in mapped().items():
        for name in names:
            keys = getattr(transformers, name)._tied_weights_keys
            heads = [key for key in keys or {} if key.endswith("weight") and "embed" not in key and "shared" not in key]
            expected = head_suffix({"model_type": model})
            if isinstance(keys, dict) and heads and expected not in heads and model != "gpt_neox":
                wrong.append((model, heads))
    assert wrong == []


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"model_type": "strange"}, None),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": None}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "t5", "tie_word_embeddings": False}, True),
        ({"model_type": "lfm2", "tie_embedding": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, False),
        ({"text_config": {"model_type": "gemma3_text"}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}, "tie_word_embeddings": False}, True),
        ({"model_type": "blip-2", "text_config": {"model_type": "opt"}, "tie_word_embeddings": False}, True),
        ({"model_type": "kimi_linear", "tie_word_embeddings": True}, False),
        ({"model_type": "bigbird_pegasus", "architectures": ["BigBirdPegasusForCausalLM"]}, False),
        ({"model_type": "bigbird_pegasus", "architectures": ["BigBirdPegasusForConditionalGeneration"]}, True),
        ({"text_config": None}, None),
        ({"text_config": [True]}, None),
    ],
)
def test_whether_a_config_ties_embeddings(config: dict[str, Any], tied: bool | None) -> None:
    assert declared(config) is tied


# --- the tensors -----------------------------------------------------------------------------------------------------

LM, DECODER = "lm_head.weight", "cls.predictions.decoder.weight"
FOUND: dict[str, tuple[str | dict[str, Any], str, tuple[str, str, tuple[str, ...], bool, bool] | None]] = {
    # config or model_type, tensors without `.weight`: embedding, head, other embeddings, stored head, certain
    "tied": ("gpt2", "wte h.0.c_fc", ("wte.weight", LM, (), False, True)),
    "tied, and stored": ("gpt2", "transformer.wte lm_head", ("transformer.wte.weight", LM, (), True, True)),
    "untied": ("llama", "model.embed_tokens lm_head", None),
    "no embedding": ("gpt2", "h.0.c_fc lm_head", None),
    "a name that ends alike": ("gpt2", "h.my_wte", None),
    "an embedding of a layer": ("gemma", "model.layers.0.embed_tokens", None),
    "that and one of the model": (
        "gemma", "model.layers.0.embed_tokens model.embed_tokens", ("model.embed_tokens.weight", LM, (), False, True),
    ),
    "shared by an encoder and a decoder": (
        "t5", "decoder.embed_tokens encoder.embed_tokens shared",
        ("shared.weight", LM, ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight"), False, True),
    ),
    **{  # its names in models
        name: ({"tie_word_embeddings": True}, f"layers.0.{name} {name}", (f"{name}.weight", LM, (), False, True))
        for name in (
            "model.shared", "model.embed_tokens", "transformer.wte", "bert.embeddings.word_embeddings",
            "gpt_neox.embed_in", "transformer.tokens_embed", "model.tok_embeddings", "transformer.word_embedding",
            "backbone.embeddings", "transformer.embeddings", "transformer.w",
        )
    },
    "unknown": ("strange", "model.embed_tokens", ("model.embed_tokens.weight", LM, (), False, False)),
    "unknown, and stored": ({}, "model.embed_tokens x.lm_head", ("model.embed_tokens.weight", f"x.{LM}", (), True, False)),
    "a model in a model": (
        {"model_type": "llava", "text_config": {"model_type": "gemma"}}, "language_model.model.embed_tokens vision.x",
        ("language_model.model.embed_tokens.weight", f"language_model.{LM}", (), False, True),
    ),
    "a classifier": (
        {"model_type": "gemma3", "architectures": [None, "Gemma3ForSequenceClassification"]},
        "model.embed_tokens score", None,
    ),
    "a classifier with an encoder and a decoder": (
        {"model_type": "bart", "architectures": ["BartForSequenceClassification"]}, "model.shared classification_head",
        ("model.shared.weight", LM, (), False, True),
    ),
    "a head of several tensors": (
        "bert", "bert.embeddings.word_embeddings cls.predictions.transform.dense",
        ("bert.embeddings.word_embeddings.weight", DECODER, (), False, True),
    ),
    "a head of several tensors, of which none is there": ("bert", "bert.embeddings.word_embeddings", None),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_which_tensors_are_tied(case: str, make_base: Callable[..., Path]) -> None:
    config, names, expected = FOUND[case]
    config = config if isinstance(config, dict) else {"model_type": config}
    base = open_checkpoint(make_base({f"{name}.weight": torch.zeros(2, 2) for name in names.split()}, config))
    tie = tied_embeddings.find_tie(base)
    assert (tie and (tie.embedding, tie.head, tie.others, tie.stored, tie.certain)) == expected
    assert tie is None or tie.implied is (tie.certain and not tie.stored)


OFF = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "embedding", "changed"),
    [
        ({"model_type": "gpt2"}, "wte.weight", OFF),
        ({"model_type": "llama", "tie_word_embeddings": True, "x": 1}, "model.embed_tokens.weight", OFF),
        ({"model_type": "lfm2"}, "model.embed_tokens.weight", OFF),
        ({"model_type": "lfm2", "tie_embedding": True}, "model.embed_tokens.weight", OFF | {"tie_embedding": False}),
        ({"model_type": "t5"}, "shared.weight", {}),
        ({"model_type": "t5"}, "encoder.embed_tokens.weight", {}),
        ({"model_type": "bart"}, "model.shared.weight", {}),
        ({"model_type": "bert"}, "bert.embeddings.word_embeddings.weight", {}),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "embed_tokens.weight", OFF | {"text_config": {"model_type": "gemma"} | OFF}),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, "embed_tokens.weight", OFF | {"text_config": OFF}),
        ({"model_type": "llava", "tie_word_embeddings": True, "text_config": {"model_type": "llama"}}, "embed_tokens.weight", OFF),
    ],
    ids=str,
)  # fmt: skip
def test_an_output_with_both_tensors_is_untied_if_possible(
    config: dict[str, Any], embedding: str, changed: dict[str, Any], make_base: Callable[..., Path]
) -> None:
    head = "cls.predictions.bias" if "bert" in embedding else "x"
    tie = tied_embeddings.find_tie(
        open_checkpoint(make_base({embedding: torch.zeros(2, 2), head: torch.zeros(2)}, config))
    )
    assert tie is not None and tie.certain
    before = json.dumps(config)
    untied, note = tie.untie(config)
    assert untied == config | changed and json.dumps(config) == before
    assert note.endswith("unties them" if changed else "stores both, which transformers 5 and later load")


def test_two_tensors_are_equal_to_the_last_byte(make_base: Callable[..., Path]) -> None:
    """They are compared 16 MB at a time."""
    size = (1 << 24) + 3
    weight = torch.zeros(size, dtype=torch.int8)
    folder = make_base({"wte.weight": weight, LM: weight.clone()}, {"model_type": "gpt2"})
    tie = tied_embeddings.find_tie(open_checkpoint(folder))
    assert tie is not None and tie.equal()
    info = tie.base.tensors[LM]
    with open(info.file, "r+b", buffering=0) as file:
        for at in (0, (1 << 24) - 1, 1 << 24, size - 1):
            os.pwrite(file.fileno(), b"\1", info.start + at)
            assert not tie.equal(), at
            os.pwrite(file.fileno(), b"\0", info.start + at)
    assert tie.equal()


@pytest.mark.parametrize("other", [torch.zeros(2, 4), torch.zeros(4, 2).bfloat16(), torch.zeros(8)], ids=str)
def test_tensors_of_another_shape_or_type_are_not_equal(other: torch.Tensor, make_base: Callable[..., Path]) -> None:
    base = open_checkpoint(make_base({"wte.weight": torch.zeros(4, 2), LM: other}, {"model_type": "gpt2"}))
    tie = tied_embeddings.find_tie(base)
    assert tie is not None and tie.stored and not tie.equal()


# --- logits ----------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 64}
ARCHITECTURES = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gemma": transformers.GemmaConfig(**WIDE, num_key_value_heads=2, head_dim=8),
    "gemma2": transformers.Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=8),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
    "falcon": transformers.FalconConfig(**SMALL),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        attention_types=[[["global"], 1]],
        intermediate_size=48,
    ),
    "cohere": transformers.CohereConfig(**WIDE, num_key_value_heads=2),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
    "starcoder2": transformers.Starcoder2Config(**WIDE, num_key_value_heads=2),
    "mpt": transformers.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=32),
    "biogpt": transformers.BioGptConfig(**WIDE, max_position_embeddings=32),
    "gpt_neox": transformers.GPTNeoXConfig(**WIDE),  # untied, and its head has two names
    "llama": transformers.LlamaConfig(**WIDE, num_key_value_heads=2),
    "llava": transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**WIDE, num_key_value_heads=2, tie_word_embeddings=True),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=63,
    ),
}
SHARED = {
    "t5": transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0),
    "bart": transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    ),
}  # fmt: skip
IDS = torch.arange(20)[None]


def opened(folder: Path) -> torch.nn.Module:
    """Load the model with transformers in float32."""
    kind = AutoModelForImageTextToText if (folder / "vision").exists() else AutoModelForCausalLM
    if json.loads((folder / "config.json").read_text())["model_type"] in SHARED:
        kind = AutoModelForSeq2SeqLM
    model: torch.nn.Module = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, 3:9]} if getattr(model.config, "is_encoder_decoder", False) else {}
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more).logits
    return found


def save_base(kind: str, folder: Path) -> tuple[str, str, str]:
    """Save a random model whose config omits the key; returns its embedding, its head, and one of its layers."""
    config = ARCHITECTURES[kind]
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if kind == "llava":
        (folder / "vision").touch()
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "tie_word_embeddings"}))
    names = {module: name for name, module in model.named_modules()}
    linear = next(name for module, name in names.items() if type(module).__name__ in ("Linear", "Conv1D"))
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()], linear


def trained(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter made with PEFT, moved away from its initialization; returns the logits of base and adapter in PEFT."""
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it merges tied ones incorrectly
        model = get_peft_model(opened(base), LoraConfig(r=4, lora_alpha=6, **config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return logits(PeftModel.from_pretrained(opened(base), folder).eval())


def ways(embedding: str, head: str, linear: str) -> dict[str, dict[str, Any]]:
    """Yield the ways in which an adapter can change an embedding and a head."""
    inside, outside = embedding.split(".")[-1], head.split(".")[-1]
    return {
        "embedding": {"target_modules": [inside]},
        "head": {"target_modules": [outside]},
        "both": {"target_modules": [inside, outside]},
        "saved embedding": {"target_modules": [linear], "modules_to_save": [inside]},
        "saved head": {"target_modules": [linear], "modules_to_save": [outside]},
        "saved both": {"target_modules": [linear], "modules_to_save": [inside, outside]},
        "tokens": {"target_modules": [linear], "trainable_token_indices": {inside: [1, 5, 9]}},
        "tied": {"target_modules": [inside], "ensure_weight_tying": True},
        "saved, tied": {"target_modules": [linear], "modules_to_save": [inside], "ensure_weight_tying": True},
    }


def assert_merged(base: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """Check that a merge and a live model compute what PEFT does, and that undoing restores the base."""
    before = (base / "model.safetensors").read_bytes()
    close = {"atol": 1e-4 * float(expected.abs().max()), "rtol": 1e-4}
    adapterkit.merge(base, [adapter], tmp_path / "out", overwrite=True)
    for marker in base.glob("vision"):
        (tmp_path / "out" / marker.name).touch()
    torch.testing.assert_close(logits(opened(tmp_path / "out")), expected, **close)
    model, applied = opened(base), adapterkit.load(adapter)
    untouched = logits(model)
    adapterkit.apply(model, applied)
    torch.testing.assert_close(logits(model), expected, **close)
    adapterkit.remove(model, applied)
    assert torch.equal(logits(model), untouched) and (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_the_output_computes_what_peft_does(kind: str, tmp_path: Path) -> None:
    embedding, head, linear = save_base(kind, tmp_path / "base")
    for way, config in ways(embedding, head, linear).items():
        expected = trained(tmp_path / "base", tmp_path / way, **config)
        assert_merged(tmp_path / "base", tmp_path / way, expected, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ("gpt2", "gemma")])
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    embedding, head, linear = save_base(kind, tmp_path / "base")
    config = ways(embedding, head, linear)["embedding" if kind != "gpt_neox" else "saved head"]
    expected = trained(tmp_path / "base", tmp_path / "a", **config)
    assert_merged(tmp_path / "base", tmp_path / "a", expected, tmp_path)


def as_transformers_4_wrote_it(config: dict[str, Any]) -> dict[str, Any]:
    """Without the flags that have their default: Gemma 3 has none then, Qwen2-VL only that of its text model."""
    text = config["text_config"] | {"tie_word_embeddings": True}
    if config["model_type"] == "gemma3":
        del text["tie_word_embeddings"]
    return {key: value for key, value in config.items() if key != "tie_word_embeddings"} | {"text_config": text}


@pytest.mark.parametrize("names", ["on disk", "in memory"])
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_the_tied_head_of_a_vision_language_model(kind: str, names: str, tmp_path: Path) -> None:
    """Both flags follow what was trained, and the head has the name that transformers reads beside the embedding's."""
    base, linear = tmp_path / "base", r".*language_model.*q_proj"
    model = Model("vision", kind, True).make()
    model.save_pretrained(base)
    (base / "vision").touch()
    if names == "in memory":
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    ways = {
        "saved head": {"target_modules": linear, "modules_to_save": ["lm_head"]},
        "head": {"target_modules": rf"{linear}|lm_head"},
        "tokens": {"target_modules": linear, "trainable_token_indices": [5, 9]},
    }
    for way, how in itertools.islice(ways.items(), 3 if names == "on disk" else 1):
        (base / "config.json").write_text(json.dumps(config))
        expected = trained(base, tmp_path / way, **how)
        for flags in (config, as_transformers_4_wrote_it(config)) if way == "saved head" else (config,):
            (base / "config.json").write_text(json.dumps(flags))
            assert_merged(base, tmp_path / way, expected, tmp_path)
            out = json.loads((tmp_path / "out" / "config.json").read_text())
            tied = way == "tokens"
            assert out["tie_word_embeddings"] is out["text_config"].get("tie_word_embeddings", tied) is tied


def test_tokens_of_a_model_whose_text_config_ties(tmp_path: Path) -> None:
    """PEFT reads the outer config alone, so that it trains tokens in the embedding and not in the head."""
    base, adapter, kind = tmp_path / "base", tmp_path / "adapter", Model("vision", "blip-2", True)
    kind.make().save_pretrained(base)
    how = {"target_modules": r".*language_model.*q_proj", "trainable_token_indices": {"embed_tokens": [5, 9]}}
    model = get_peft_model(kind.cls.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, **how))
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * ("tokens_delta" in name)
    model.save_pretrained(adapter)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    live = kind.cls.from_pretrained(base)
    adapterkit.apply(live, adapterkit.load(adapter))
    expected = kind.logits(model.eval())
    for found in (kind.cls.from_pretrained(tmp_path / "out"), live):
        torch.testing.assert_close(kind.logits(found.eval()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("stored", ["equal", "different", "without its prefix"])
def test_a_tied_head_that_is_also_stored(stored: str, tmp_path: Path) -> None:
    """transformers ties two stored tensors if they are equal; GPT-2's on the Hub are named without the prefix."""
    base = tmp_path / "base"
    names = save_base("gpt2", base)
    tensors = load_file(base / "model.safetensors")
    if stored == "without its prefix":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    else:
        wte = tensors["transformer.wte.weight"]
        tensors["lm_head.weight"] = wte.clone() if stored == "equal" else torch.randn_like(wte)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for way in ("embedding", "head", "tokens", "saved embedding"):
        expected = trained(base, tmp_path / way, **ways(*names)[way])
        assert_merged(base, tmp_path / way, expected, tmp_path)


@pytest.mark.parametrize("stored", ["equal", "different", ""])
def test_a_tied_head_follows_the_factors_of_the_embedding(stored: str, tmp_path: Path) -> None:
    """With `ensure_weight_tying` PEFT applies the embedding's factors to the head, if a file has no others."""
    names = save_base("gemma", base := tmp_path / "base")
    if stored:
        tensors = load_file(base / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        head = head if stored == "equal" else torch.randn_like(head)
        save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    trained(base, tmp_path / "adapter", **ways(*names)["tied"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    with warnings.catch_warnings(action="ignore"):
        expected = logits(PeftModel.from_pretrained(opened(base), tmp_path / "adapter").eval())
    assert_merged(base, tmp_path / "adapter", expected, tmp_path)


def test_an_adapter_that_changes_neither_preserves_the_tie(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    base = make_base({"model.embed_tokens.weight": torch.randn(16, 8), "model.q.weight": torch.randn(8, 8)}, config)
    adapterkit.merge(base, [make_adapter(factors("model.q", 8, 8), "other")], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"model.embed_tokens.weight", "model.q.weight"}


# --- unknown ties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"model_type": "strange"}])
def test_an_unknown_tie_is_refused(
    config: dict[str, Any], make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"model.embed_tokens.weight": torch.randn(16, 8), "model.q.weight": torch.randn(8, 8)}, config)
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 16),
        "model.embed_tokens.lora_embedding_B": torch.randn(8, 4),
    }
    with pytest.raises(FitError, match="it is unknown whether base ties lm_head.weight to model.embed_tokens.weight"):
        adapterkit.merge(base, [make_adapter(embedding, "embedding")], tmp_path / "out")
    with pytest.raises(
        FitError, match="changes lm_head, which has no tensor in the base, and it is unknown whether base ties"
    ):
        adapterkit.merge(base, [make_adapter(factors("lm_head", 16, 8), "head")], tmp_path / "out")
    adapterkit.merge(base, [make_adapter(factors("model.q", 8, 8), "other")], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    adapterkit.merge(base, [tmp_path / "embedding"], tmp_path / "untied")


@pytest.mark.parametrize("config", [{}, {"model_type": "strange"}])
@pytest.mark.parametrize("where", ["model.embed_tokens", "lm_head"])
def test_two_stored_tensors_with_an_unknown_tie(
    config: dict[str, Any],
    where: str,
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Equal or not, each is changed separately, and the config is unchanged: transformers doesn't tie them either."""
    weight, (A, B) = torch.randn(16, 8), (torch.randn(4, 16), torch.randn(8, 4))
    embedding = {f"{where}.lora_embedding_A": A, f"{where}.lora_embedding_B": B}
    both = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    adapter = make_adapter(embedding if where != "lm_head" else {"lm_head.lora_A.weight": B.T.contiguous(), "lm_head.lora_B.weight": A.T.contiguous()}, "a")  # fmt: skip
    result = adapterkit.merge(make_base(both, config), [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    exact = weight + 1.5 * (B @ A).T.double()
    torch.testing.assert_close(merged[f"{where}.weight"].double(), exact, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(merged[name], tensor) for name, tensor in both.items() if name != f"{where}.weight")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert not any("ties" in note for note in result.notes)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_embeddings_that_an_encoder_and_a_decoder_share(kind: str, copies: bool, tmp_path: Path) -> None:
    """Trained tokens and the head alone are as in PEFT; training a module that is not used is refused.

    Checkpoints from before transformers 5 hold a copy for each tied tensor.

    """
    base, inner = tmp_path / "base", "model." * (kind == "bart")
    model = AutoModelForSeq2SeqLM.from_config(SHARED[kind])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(base)
    if copies:
        tensors = load_file(base / "model.safetensors")
        names = (f"{inner}encoder.embed_tokens.weight", f"{inner}decoder.embed_tokens.weight", "lm_head.weight")
        more = {name: tensors[f"{inner}shared.weight"].clone() for name in names}
        save_file(tensors | more, base / "model.safetensors", {"format": "pt"})
    linear = ["q", "q_proj"]
    for number, config in enumerate((
        {"target_modules": linear}, {"target_modules": ["lm_head"]}, {"target_modules": linear, "modules_to_save": ["lm_head"]},
        {"target_modules": linear, "trainable_token_indices": {"shared": [1, 5, 9]}},
    )):  # fmt: skip
        expected = trained(base, tmp_path / f"{number}", **config)
        assert_merged(base, tmp_path / f"{number}", expected, tmp_path)
    for target in ("shared", "embed_tokens"):
        trained(base, tmp_path / target, target_modules=[target])
        with pytest.raises(FitError, match=f"{target}.weight, which may be tied to .* a decoder is not supported"):
            adapterkit.merge(base, [tmp_path / target], tmp_path / "refused")


def test_shared_embeddings_that_differ_are_refused(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = {"shared.weight": torch.randn(16, 8), "encoder.embed_tokens.weight": torch.randn(16, 8)}
    tokens = make_adapter(
        {"shared.token_adapter.trainable_tokens_delta": torch.randn(2, 8)}, trainable_token_indices={"shared": [1, 5]}
    )
    with pytest.raises(FitError, match="an encoder and a decoder is not supported"):
        adapterkit.merge(make_base(tensors, {"model_type": "t5"}), [tokens], tmp_path / "out")


@pytest.mark.parametrize("recipe", ["tokens", "saved", "factors"])
def test_an_embedding_that_is_shared_but_not_with_the_head(
    recipe: str, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Florence-2's encoder and decoder share theirs, even if the config unties the head."""
    shared = "model.language_model.shared"
    text = {"model_type": "bart", "tie_word_embeddings": True}
    base = make_base(
        {f"{shared}.weight": torch.randn(16, 8), "lm_head.weight": torch.randn(16, 8)},
        {"model_type": "florence2", "tie_word_embeddings": False, "text_config": text},
    )
    tensors, config = {
        "tokens": ({"token_adapter.trainable_tokens_delta": torch.randn(2, 8)}, {"trainable_token_indices": {"shared": [1, 5]}}),
        "saved": ({"weight": torch.randn(16, 8)}, {"modules_to_save": ["shared"]}),
        "factors": ({"lora_embedding_A": torch.randn(4, 16), "lora_embedding_B": torch.randn(8, 4)}, {}),
    }[recipe]  # fmt: skip
    adapter = make_adapter({f"{shared}.{name}": tensor for name, tensor in tensors.items()}, **config)
    with pytest.raises(
        FitError, match=rf"{shared}.weight, which is shared by an encoder and a decoder in .*not all mod"
    ):
        adapterkit.merge(base, [adapter], tmp_path / "out")


def test_two_adapters_of_which_one_ensures_weight_tying(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The head follows the former, and not the latter."""
    weight = torch.randn(16, 8)
    base = make_base({"model.embed_tokens.weight": weight}, {"model_type": "gemma"})
    adapters = []
    for name, config in (("keeps", {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]}), ("parts", {})):
        pair = {"A": torch.randn(4, 16), "B": torch.randn(8, 4)}
        tensors = {f"model.embed_tokens.lora_embedding_{side}": tensor for side, tensor in pair.items()}
        adapters.append((make_adapter(tensors, name, **config), 1.5 * (pair["B"] @ pair["A"]).T.double()))
    adapterkit.merge(base, [folder for folder, _ in adapters], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    (_, keeps), (_, parts) = adapters
    torch.testing.assert_close(merged["lm_head.weight"].double(), weight + keeps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        merged["model.embed_tokens.weight"].double(), weight + keeps + parts, atol=1e-5, rtol=1e-5
    )
