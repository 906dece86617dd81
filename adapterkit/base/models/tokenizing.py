"""Encode and decode text; tokenizers with regular expressions, which are untrusted, run in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

from adapterkit.base.models import tokenizer_subprocess
from adapterkit.errors import FormatError
from adapterkit.files.opening import open_regular
from adapterkit.files.sandbox import Sandbox

SECONDS = 10  # of CPU time per text; a real tokenizer encodes megabytes in one
MEMORY = 1 << 32  # bytes
PROGRAM = Path(tokenizer_subprocess.__file__)
REGEX = re.compile(rb"Regex|\\u00(52|65|67|78)")  # the key of a regular expression, escaped or not
PARTS = ("normalizer", "pre_tokenizer", "decoder")
MAX_ERROR_CHARS = 240
MAX_ANSWER_CHARS = 1 << 30

_processes: WeakKeyDictionary[Any, Sandbox | None] = WeakKeyDictionary()  # by tokenizer; None if it needs no sandbox


def check_loading(folder: Path, name: str) -> None:
    """Raise FormatError if loading the tokenizer in `folder` would take too long, which could not be interrupted."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    with open_regular(file) as stream:
        if not REGEX.search(stream.read()):
            return
    with Sandbox(PROGRAM, SECONDS, MEMORY, f"{name}: its tokenizer") as process:
        process.ask(json.dumps({"folder": str(folder)}), MAX_ANSWER_CHARS)  # other errors are reported on loading


def encode_text(tokenizer: Any, text: str, **options: Any) -> Mapping[str, Any]:
    """Encode `text` with a transformers tokenizer; returns `input_ids`, and `offset_mapping` on request.

    Raises FormatError if the tokenizer fails or takes too long.
    """
    name = getattr(tokenizer, "name_or_path", "the base")
    try:
        process = _process_of(tokenizer, name)
        if process is None:
            encoding: Mapping[str, Any] = tokenizer(text, verbose=False, **options)
        else:
            answer = _ask(tokenizer, process, {"text": text, "special": options.get("add_special_tokens", True)})
            encoding = {"input_ids": answer["ids"], "offset_mapping": answer["offsets"]}
    except (FormatError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a corrupt tokenizer can load, then raise anything here, including Rust panics
        message = " ".join(str(error).split())[:MAX_ERROR_CHARS]
        raise FormatError(f"{name}: its tokenizer failed: {message}") from error
    if not all(0 <= number < 2**31 for number in encoding["input_ids"]):
        raise FormatError(f"{name}: its tokenizer returned a token id above 2,147,483,647")
    return encoding


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens; raises FormatError if the tokenizer takes too long."""
    process = _process_of(tokenizer, getattr(tokenizer, "name_or_path", "the base"))
    if process is None:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return str(_ask(tokenizer, process, {"ids": [int(number) for number in ids]})["text"])


def _process_of(tokenizer: Any, name: str) -> Sandbox | None:
    """Return the sandbox of a tokenizer with regular expressions, or None for any other tokenizer."""
    if tokenizer not in _processes:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        parts = [getattr(backend, part, None) for part in PARTS]
        process = None
        if any(REGEX.search(part.__getstate__()) for part in parts if part is not None):
            process = Sandbox(PROGRAM, SECONDS, MEMORY, f"{name}: its tokenizer")
            finalize(tokenizer, process.end)
            split = bool(getattr(tokenizer, "split_special_tokens", False))
            _ask(tokenizer, process, {"tokenizer": backend.to_str(), "split": split})
        _processes[tokenizer] = process
    return _processes[tokenizer]


def _ask(tokenizer: Any, process: Sandbox, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        answer = process.ask(json.dumps(request), MAX_ANSWER_CHARS)
    except FormatError:
        _processes.pop(tokenizer, None)  # the process has ended, and a new one needs the tokenizer again
        raise
    if "error" in answer:
        raise FormatError(f"{process.what} failed: {' '.join(answer['error'].split())[:MAX_ERROR_CHARS]}")
    return answer
