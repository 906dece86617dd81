"""A program of its own that makes tokens of texts by the regular expressions of a stranger's tokenizer.

They are matched by backtracking: one of twenty characters runs for hours over a page of text, and holds Python up, so
that not even ctrl-C ends it. Here the operating system stops it. Nothing is imported from the package, so that it
starts at once.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY = 1 << 32  # bytes beyond those that are taken at first
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def main(limit: int) -> None:
    """Answer every request on stdin by a line; what takes more than `limit` seconds of processor time ends the process.

    `{"folder"}` loads what is there. `{"tokenizer", "split"}` is what texts are for, `{"text", "special"}` is answered
    by `{"ids", "offsets"}`, `{"ids"}` by `{"text"}`; what fails by `{"error"}`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    with open("/proc/self/statm", encoding="ascii") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    bound(resource.RLIMIT_AS, taken + MEMORY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer: Any = None
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime + limit
        bound(resource.RLIMIT_CPU, math.ceil(seconds))
        request, answer = json.loads(line), {}
        try:
            if "folder" in request:
                load(Path(request["folder"]))
            elif "tokenizer" in request:
                tokenizer = Tokenizer.from_str(request["tokenizer"])
                tokenizer.no_truncation()
                tokenizer.no_padding()
                tokenizer.encode_special_tokens = request["split"]
            elif "text" in request:
                made = tokenizer.encode(request["text"], add_special_tokens=request["special"])
                answer = {"ids": made.ids, "offsets": made.offsets}
            else:
                answer = {"text": tokenizer.decode(request["ids"], skip_special_tokens=True)}
        except BaseException as error:  # Rust's panics among them
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def bound(limit: int, most: int) -> None:
    """Lower a limit of this process, which a user or a cluster may have set lower already."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def load(folder: Path) -> None:
    """Do what takes time where transformers loads a tokenizer: its normalizer is given every token that is added."""
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_file(str(folder / "tokenizer.json")).normalizer
    for file in (folder / name for name in BESIDE):
        if normalizer is not None and file.is_file():
            for text in strings(json.loads(file.read_text(encoding="utf-8"))):
                normalizer.normalize_str(text)


def strings(node: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for inner in node if isinstance(node, list) else (*node.keys(), *node.values()):
            yield from strings(inner)


if __name__ == "__main__":
    main(int(sys.argv[1]))
