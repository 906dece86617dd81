"""Adapters and bases with hostile strings everywhere: control sequences, markup of every kind, forged lines."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from handmade import CONFIG, MODULES, factors, write_adapter, write_base
from safetensors.torch import load_file, save_file

from adapterkit.text import BLANK

STEERS = "a\x1b[38;5;201m\x1b]0;t\x07\x9b2J\u202e\u2066\u200b\0\x7f\r\nFORGED\t"
MARKUP = "[bold]b[/] a[/] [link=x]:warning: $x$ | `y` <img src=x> --- {z}"
HOSTILE = STEERS + MARKUP
FOLDER = HOSTILE.replace("\0", "").replace("/", "\\")  # as a file name
MODULE = "model.layers.0.[b]c[/] $x$ | `y` <img src=x> :warning:"


def write_hostile_adapter(folder: Path, alpha: int = 6, **config: Any) -> Path:
    """Write an adapter with a hostile value in every string field."""
    tensors = factors()
    for side in "AB":
        tensors[f"base_model.model.{MODULE}.lora_{side}.weight"] = tensors[
            f"base_model.model.{MODULES[0]}.lora_{side}.weight"
        ].clone()
    texts = dict.fromkeys(("base_model_name_or_path", "task_type", "revision", "peft_version", HOSTILE), HOSTILE)
    texts |= {"target_modules": [HOSTILE, "q_proj", MODULE], "auto_mapping": {HOSTILE: HOSTILE}, "lora_alpha": alpha}
    write_adapter(folder, tensors, CONFIG | texts | {"modules_to_save": None} | config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={HOSTILE: HOSTILE, "format": "pt"})
    for name in ("adapterkit_training.json", "adapterkit_adapter.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"made": HOSTILE, "steps": HOSTILE, HOSTILE: HOSTILE}))
    (folder / "README.md").write_text(HOSTILE)
    return folder


def write_hostile_base(folder: Path) -> Path:
    """Write a base with hostile strings."""
    write_base(folder, shards=1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULES[0]}.weight"].clone()
    save_file(tensors, file, metadata={HOSTILE: HOSTILE, "format": HOSTILE})
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    texts = dict.fromkeys(("model_type", "_name_or_path", "chat_template", HOSTILE), HOSTILE)
    for name in names:
        (folder / name).write_text(json.dumps(texts | {"architectures": [HOSTILE]}))
    (folder / FOLDER).write_text(HOSTILE)
    return folder


def steering(text: str) -> set[str]:
    """Return the characters of `text` that control a terminal or are invisible."""
    return {c for c in text if c != "\n" and unicodedata.category(c)[0] == "C"} | (set(text) & BLANK)
