"""The tokenizer of a merged model: that of the adapter's folder where it differs, and the base's again after unmerge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import factors
from handmade import adapterkit as command
from handmade import contents
from safetensors.torch import save_file
from tiny import save_tiny_model
from transformers import AutoTokenizer

import adapterkit
from adapterkit.errors import UnsafeFileError, UsageError

TEMPLATE = "{{ messages[0]['content'] }} w1"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["q_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter, and beside it a tokenizer with new `tokens` and a chat template, or copies of the base's files."""

    def made(name: str = "adapter", tokens: tuple[str, ...] = (), template: str | None = None, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if tokens or template:
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.add_tokens(list(tokens))
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        save_file(factors("model.layers.0.self_attn.q_proj", 32, 32), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 4}))
        return folder

    return made


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if "token" in file.name or "chat" in file.name}


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapters_tokenizer_is_taken_and_given_back(base: Path, make: Callable[..., Path], tmp_path: Path, with_base: bool) -> None:  # fmt: skip
    (base / "special_tokens_map.json").write_text("{}")  # the adapter's vocabulary has no such file
    (base / "chat_template.jinja").write_text("an older template")
    adapter, out = make(tokens=("<new>",), template=TEMPLATE), tmp_path / "out"
    plan = adapterkit.plan_merge(base, [adapter], out)
    note, too_many = [note for note in plan.notes if "tokenizer" in note]
    assert too_many.startswith("the tokenizer of adapter has 64 tokens, but the embedding has 63 rows")
    assert note.startswith("the tokenizer is that of adapter, whose tokenizer.json, ") and "chat_template.jinja" in note
    assert plan.facts()["tokenizer"] == "adapter"
    assert note in command("merge", base, adapter, "-o", out, "--dry-run").err
    adapterkit.merge(base, [adapter], out)
    assert tokenizer_files(out) == tokenizer_files(adapter)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<new>") == 63 and tokenizer.chat_template == TEMPLATE
    assert note in (out / "README.md").read_text()
    adapterkit.unmerge(out, tmp_path / "back", **({"base": base} if with_base else {"adapters": [adapter]}))
    assert contents(tmp_path / "back") == contents(base)


def test_the_bases_tokenizer_is_kept_on_request(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    adapterkit.merge(base, [make(tokens=("<new>",))], tmp_path / "out", tokenizer="base")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(base)


def test_a_chat_template_is_added_to_the_bases_tokenizer(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    adapter, out = make(chat_template__jinja=TEMPLATE), tmp_path / "out"
    adapterkit.merge(base, [adapter], out)
    assert tokenizer_files(out) == tokenizer_files(base) | tokenizer_files(adapter)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    adapterkit.unmerge(out, tmp_path / "back", adapters=[adapter])
    assert contents(tmp_path / "back") == contents(base)


def test_the_same_tokenizer_is_the_bases(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    """JSON that was only written in another way does not differ."""
    config = json.dumps(json.loads((base / "tokenizer_config.json").read_text()), indent=7)
    adapter = make(tokenizer_config__json=config, tokenizer__json=(base / "tokenizer.json").read_text())
    for wanted in (None, "adapter"):
        plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out", tokenizer=wanted)
        assert plan.tokenizer is None and not any("tokenizer" in note for note in plan.notes)


def test_adapters_with_different_tokenizers(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    one, same, other = make("one", ("<new>",)), make("same", ("<new>",)), make("other", ("<newer>",))
    plain = make("plain")
    plan = adapterkit.plan_merge(base, [plain, one, same], tmp_path / "out")
    assert plan.facts()["tokenizer"] == "one"
    with pytest.raises(UsageError, match="one and other bring different tokenizers") as error:
        adapterkit.plan_merge(base, [one, same, other], tmp_path / "out")
    assert error.value.hint == "`tokenizer=adapter` takes that of one, `tokenizer=base` that of base"
    plan = adapterkit.plan_merge(base, [other, one], tmp_path / "out", tokenizer="adapter")
    assert plan.facts()["tokenizer"] == "other"
    assert adapterkit.plan_merge(base, [one, other], tmp_path / "out", tokenizer="base").tokenizer is None


def test_a_wanted_tokenizer_that_does_not_exist(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter's folder has tokenizer files"):
        adapterkit.plan_merge(base, [make()], tmp_path / "out", tokenizer="adapter")
    with pytest.raises(UsageError, match="the output is a single file"):
        adapterkit.plan_merge(base / "model.safetensors", [make("new", ("<new>",))], tmp_path / "out.safetensors", tokenizer="adapter")  # fmt: skip
    assert (
        adapterkit.plan_merge(base / "model.safetensors", [tmp_path / "new"], tmp_path / "o.safetensors").tokenizer
        is None
    )


def test_files_beside_a_lone_adapter_are_not_its_own(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make(tokens=("<new>",))
    (adapter / "adapter_config.json").unlink()
    lone = adapterkit.plan_merge(base, [adapter / "adapter_model.safetensors"], tmp_path / "out", alpha=5)
    folder = adapterkit.plan_merge(base, [adapter], tmp_path / "out", alpha=5)
    assert (lone.tokenizer, folder.facts()["tokenizer"]) == (None, "adapter")


def test_links_are_refused_before_anything_is_written(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    secret, adapter = tmp_path / "secret", make(tokens=("<new>",))
    secret.write_text("not for the Hub")
    os.symlink(secret, adapter / "chat_template.jinja")
    with pytest.raises(UnsafeFileError, match=re.escape("chat_template.jinja: is a link")):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    adapterkit.merge(base, [adapter], tmp_path / "out", tokenizer="base")
    assert "chat_template.jinja" not in contents(tmp_path / "out")


def test_a_tokenizer_that_changes_during_a_merge(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    adapter, out = make(tokens=("<new>",)), tmp_path / "out"
    plan = adapterkit.plan_merge(base, [adapter], out)
    events = adapterkit.run(plan)
    next(events)
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(adapterkit.errors.ChangedError, match="tokenizer.json"):
        list(events)
    assert not out.exists()
