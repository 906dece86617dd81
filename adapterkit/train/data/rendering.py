"""A program of its own that writes chats as a template of transformers has them: a JSON line in, a JSON line out.

A chat template is a stranger's program: a few nested loops run for years, `"a" * 10**10` takes all memory, and no list
of what it must not do is complete. Here the operating system stops it, and transformers itself renders. Nothing is
imported from the package, so that it starts in a second.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

MEMORY = 1 << 30  # bytes beyond those that are taken before the first chat


def main(limit: int) -> None:
    """Answer every request on stdin, `{"template", "tokens", "messages"}`, by `{"text", "spans"}` or `{"error"}`.

    What takes more than `limit` seconds of processor time ends the process.
    """
    os.environ["USE_TORCH"] = "0"  # which would take seconds to import, and is not used
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # type: ignore[no-untyped-call]
    with open("/proc/self/statm", encoding="ascii") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    bound(resource.RLIMIT_AS, taken + MEMORY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime + limit
        bound(resource.RLIMIT_CPU, math.ceil(seconds))
        sys.stdout.write(json.dumps(answer(tokenizer, **json.loads(line))) + "\n")
        sys.stdout.flush()


def bound(limit: int, most: int) -> None:
    """Lower a limit of this process, which a user or a cluster may have set lower already."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(tokenizer: Any, template: str, tokens: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The text of a chat, and where in it the assistant's turns begin and end, with the tokens that end them."""

    def render(turns: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:turns], chat_template=template, tokenize=False, add_generation_prompt=prompt, **tokens
            )
        )

    def spans() -> Iterator[tuple[int, int]]:
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(at, prompt=True), render(at + 1)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise OtherwiseError(
                        f"the chat template writes turn {at + 1} otherwise when it is generated, or when turns follow, "
                        "so what would be learned is never seen again; expected the same text; or give prompt and "
                        "completion"
                    )
                yield len(before), len(after.rstrip())  # what is written after the token that ends it is not generated

    try:
        whole = render(len(messages))
        return {"text": whole, "spans": list(spans())}
    except OtherwiseError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "the chat template takes too much memory for it"}
    except Exception as error:  # a template refuses what and how it likes
        return {"error": f"the chat template refuses it: {error}"}


class OtherwiseError(Exception):
    """A turn is not written in one way."""


if __name__ == "__main__":
    main(int(sys.argv[1]))
