"""Bases with an invalid config or tokenizer: one clear error each, without allocating what they claim."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_model

from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.models.config_check import check_described
from adapterkit.base.models.loading import load_tokenizer
from adapterkit.errors import AdapterkitError, FormatError
from adapterkit.train.data.records import Record
from adapterkit.train.data.tokenize import encode_all

NAN, HUGE = float("nan"), 10**30
TEXT, CHAT = Record("t:1", text="w1 w2 w3"), Record("t:1", messages=({"role": "assistant", "content": "w1"},))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    """A base to corrupt."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def check(base: Path) -> None:
    check_described(open_checkpoint(base))


def test_a_valid_base(base: Path) -> None:
    check(base)
    encode_all([TEXT], load_tokenizer(open_checkpoint(base)), 64)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 20_000, "num_hidden_layers is 20,000, but the checkpoint has 21 tensors"),
        ("num_hidden_layers", 2**62, "num_hidden_layers is 4,611,686,018,427,387,904, but the checkpoint has"),
        ("num_hidden_layers", 4000, "it has more than 1,420 modules"),
        ("num_hidden_layers", 1, r"model\.layers\.1\.\S+ is stored, but its config has no such layer"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"), ("num_hidden_layers", -1, "num_hidden_layers is -1"),
        *(("num_hidden_layers", odd, "cannot build a model from it: .*num_hidden_layers")
          for odd in ("many", None, NAN, [2], {"a": 1}, True, 2.5, "")),
        ("num_hidden_layers", HUGE, "num_hidden_layers is a number of more than 30 digits"),
        ("hidden_size", 10**6, "far more parameters than the 19,552 that are stored"),
        ("hidden_size", 64, r"\S+ has shape \(\d+(, 32)?\), but its config expects"), ("hidden_size", 0, "but its config expects"),
        *(("hidden_size", odd, "cannot build a model from it") for odd in (-1, "many", None, NAN, [2], {"a": 1}, 2.5)),
        ("vocab_size", 10**12, "far more parameters"), ("vocab_size", 64, r"has shape \(63, 32\), but its config expects \(64, 32\)"),
        *(("vocab_size", odd, "cannot build a model from it") for odd in (-1, 0, "many", None, NAN, [2])),
        ("intermediate_size", 10**11, "far more parameters"), ("intermediate_size", "x", "cannot build a model from it"),
        ("num_attention_heads", 0, "cannot build a model from it"), ("num_attention_heads", 2**62, "num_attention_heads is"),
        ("num_key_value_heads", 0, "cannot build a model from it"), ("num_key_value_heads", 4, "but its config expects"),
        ("head_dim", 10**9, "far more parameters"), ("hidden_act", "boom", "cannot build a model from it"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0"), ("max_position_embeddings", "x", "cannot build a model from it"),
        ("rms_norm_eps", "x", "cannot build a model from it"), ("rope_parameters", [1], "cannot build a model from it"),
        ("layer_types", {"a": HUGE}, "a is a number"), ("num_experts", 10**9, "num_experts is 1,000,000,000, but the checkpoint has"),
        ("num_labels", 10**9, "num_labels is 1,000,000,000, but the checkpoint has"), ("use_return_dict", "x", "cannot build a model from it"),
        ("model_type", "nonsense", "model_type is 'nonsense', which transformers"),
    ],
)  # fmt: skip
def test_a_config_of_another_model(
    base: Path, key: str, value: Any, said: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """One error, and no output from libraries."""
    change(base / "config.json", **{key: value})
    with pytest.raises(FormatError, match=said):
        check(base)
    assert capfd.readouterr() == ("", "") and not recwarn.list


NO_OBJECTS = ("", "null", "[1]", '"x"', "3", "{", "[" * 100_000, "\0")
TOKENIZERS: dict[str, Callable[[Path], object]] = {
    **{
        f"{name} {raw[:5]!r}": lambda base, name=name, raw=raw: (base / name).write_text(raw)  # type: ignore[misc]
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
        for raw in NO_OBJECTS
        if (name, raw) not in (("special_tokens_map.json", "null"), ("tokenizer_config.json", "null"))
    },
    **{
        f"tokenizer.json {key}={value!r}": lambda base, key=key, value=value: change(  # type: ignore[misc]
            base / "tokenizer.json", **{key: value}
        )
        for key, value in [
            ("model", None), ("model", {}), ("model", {"type": "BPE", "vocab": [], "merges": 3}), ("normalizer", 3),
            ("model", {"type": "WordLevel", "vocab": {"w1": 0}, "unk_token": "<unk>"}), ("pre_tokenizer", {"type": "x"}),
            ("model", {"type": "WordLevel", "vocab": {"<unk>": 2**32 - 1}, "unk_token": "<unk>"}), ("added_tokens", [3]),
            ("model", {"type": "WordLevel", "vocab": {"<unk>": -1}, "unk_token": "<unk>"}), ("post_processor", "x"),
            ("normalizer", {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 1000}),
            ("normalizer", {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "w"}, "content": "wwwwwwwwwwwwwwwwwwww"}] * 9}),
        ]
    },
    "tokenizer.json is gone": lambda base: (base / "tokenizer.json").unlink(),
    "a list of templates": lambda base: change(base / "tokenizer_config.json", chat_template={"a": "{{ 1 }}"}),
    "a number as template": lambda base: change(base / "tokenizer_config.json", chat_template=3),
    "a broken template": lambda base: (base / "chat_template.jinja").write_text("{% for %}"),
    "an eos_token in a list": lambda base: change(base / "tokenizer_config.json", eos_token=[1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_broken_tokenizer_is_one_error(base: Path, kind: str) -> None:
    """transformers and its Rust code raise anything, some only when text is tokenized."""
    TOKENIZERS[kind](base)
    with pytest.raises(AdapterkitError) as caught:
        checkpoint = open_checkpoint(base)
        check_described(checkpoint)
        encode_all([CHAT if "template" in kind else TEXT], load_tokenizer(checkpoint), 64)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 1000


def test_an_invalid_max_length_is_ignored(base: Path) -> None:
    change(base / "tokenizer_config.json", model_max_length="many")
    assert len(encode_all([TEXT], load_tokenizer(open_checkpoint(base)), 64).examples) == 1
