"""Texts as tokens, and tokens as texts; by a tokenizer with a stranger's regular expressions in a bounded process."""

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

SECONDS = 10  # of processor time for a text, of which a real tokenizer takes megabytes in one
MEMORY = 1 << 32  # bytes for all its texts
PROGRAM = Path(tokenizer_subprocess.__file__)
REGEX = re.compile(rb"Regex|\\u00(52|65|67|78)")  # the key of a regular expression, escaped or not
PARTS = ("normalizer", "pre_tokenizer", "decoder")
SHOWN = 240  # characters of an error
LONGEST = 1 << 30  # characters of an answer

_processes: WeakKeyDictionary[Any, Sandbox | None] = WeakKeyDictionary()  # by tokenizer; None for one without any


def check_loading(folder: Path, name: str) -> None:
    """Raise FormatError where loading the tokenizer in `folder` would take too long, which nothing else could end."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    with open_regular(file) as stream:
        if not REGEX.search(stream.read()):
            return
    with Sandbox(PROGRAM, SECONDS, MEMORY, f"{name}: its tokenizer") as process:
        process.ask(json.dumps({"folder": str(folder)}), LONGEST)  # what else is wrong with it shows when it is loaded


def tokenized(tokenizer: Any, text: str, **options: Any) -> Mapping[str, Any]:
    """What a tokenizer of transformers makes of `text`, `input_ids` among it.

    Raises FormatError where it fails, or takes too long.
    """
    name = getattr(tokenizer, "name_or_path", "the base")
    try:
        process = _process_of(tokenizer, name)
        if process is None:
            made: Mapping[str, Any] = tokenizer(text, verbose=False, **options)
        else:
            answer = _asked(tokenizer, process, {"text": text, "special": options.get("add_special_tokens", True)})
            made = {"input_ids": answer["ids"], "offset_mapping": answer["offsets"]}
    except (FormatError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a broken one loads, and fails here in any way, Rust's panics among them
        raise FormatError(f"{name}: its tokenizer fails: {' '.join(str(error).split())[:SHOWN]}") from error
    if not all(0 <= number < 2**31 for number in made["input_ids"]):
        raise FormatError(f"{name}: its tokenizer has a token beyond 2,147,483,647")
    return made


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that tokens stand for, without special ones; raises FormatError where making it takes too long."""
    process = _process_of(tokenizer, getattr(tokenizer, "name_or_path", "the base"))
    if process is None:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return str(_asked(tokenizer, process, {"ids": [int(number) for number in ids]})["text"])


def _process_of(tokenizer: Any, name: str) -> Sandbox | None:
    """The process that a tokenizer with regular expressions works in, None for any other."""
    if tokenizer not in _processes:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        parts = [getattr(backend, part, None) for part in PARTS]
        process = None
        if any(REGEX.search(part.__getstate__()) for part in parts if part is not None):
            process = Sandbox(PROGRAM, SECONDS, MEMORY, f"{name}: its tokenizer")
            finalize(tokenizer, process.end)
            split = bool(getattr(tokenizer, "split_special_tokens", False))
            _asked(tokenizer, process, {"tokenizer": backend.to_str(), "split": split})
        _processes[tokenizer] = process
    return _processes[tokenizer]


def _asked(tokenizer: Any, process: Sandbox, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        answer = process.ask(json.dumps(request), LONGEST)
    except FormatError:
        _processes.pop(tokenizer, None)  # the process has ended, and the next would know nothing of the tokenizer
        raise
    if "error" in answer:
        raise FormatError(f"{process.what} fails: {' '.join(answer['error'].split())[:SHOWN]}")
    return answer
