"""A program for `files/limits.py` that writes chats as a template of transformers has them.

A chat template is a stranger's program: a few nested loops run for years, `"a" * 10**10` takes all memory, and no list
of what it must not do is complete. Here the operating system stops it, and transformers itself renders. Nothing is
imported from the package, so that it starts in a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.files.limits import Limits


def main(limits: Limits, seconds: str) -> None:
    """Answer every request, `{"template", "tokens", "messages"}`, by `{"text", "spans"}` or `{"error"}`."""
    os.environ["USE_TORCH"] = "0"  # which would take seconds to import, and is not used
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # type: ignore[no-untyped-call]
    limits.serve(lambda request: answer(tokenizer, **request), int(seconds))


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
