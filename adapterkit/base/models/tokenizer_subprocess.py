"""Encode and decode text with an untrusted tokenizer, as a sandboxed program.

The tokenizers library matches them by backtracking: one of twenty characters can run for hours on a page of text, and
blocks Python, so that ctrl-C has no effect. Here the operating system stops it. Nothing is imported from the package,
so that the process starts fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.files.sandbox_subprocess import Limits

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def main(limits: Limits, seconds: str) -> None:
    """Answer requests.

    `{"folder"}` does the slow steps of loading a tokenizer. `{"tokenizer", "split"}` sets the tokenizer for later
    requests: `{"text", "special"}` gets `{"ids", "offsets"}`, and `{"ids"}` gets `{"text"}`. Failures get `{"error"}`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer: Any = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal tokenizer
        try:
            if "folder" in request:
                load(Path(request["folder"]))
            elif "tokenizer" in request:
                tokenizer = Tokenizer.from_str(request["tokenizer"])
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.encode_special_tokens = request["split"]
            elif "text" in request:
                encoding = tokenizer.encode(request["text"], add_special_tokens=request["special"])
                return {"ids": encoding.ids, "offsets": encoding.offsets}
            else:
                return {"text": tokenizer.decode(request["ids"], skip_special_tokens=True)}
        except BaseException as error:  # including Rust panics
            return {"error": str(error)}
        return {}

    limits.serve(answer, int(seconds))


def load(folder: Path) -> None:
    """Normalize every added token, the slow step when transformers loads a tokenizer."""
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_file(str(folder / "tokenizer.json")).normalizer
    for file in (folder / name for name in BESIDE):
        if normalizer is not None and file.is_file():
            for text in strings(json.loads(file.read_text(encoding="utf-8"))):
                normalizer.normalize_str(text)


def strings(node: Any) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for inner in node if isinstance(node, list) else (*node.keys(), *node.values()):
            yield from strings(inner)
