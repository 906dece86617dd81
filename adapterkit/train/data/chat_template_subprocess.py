"""A sandboxed program that renders chats with a transformers chat template.

A chat template is untrusted code: a few nested loops run for years, `"a" * 10**10` takes all memory, and no blocklist
is complete. Here the operating system limits it, and transformers does the rendering. The program imports nothing from
the package, to start within a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.files.sandbox_subprocess import Limits


def main(limits: Limits, seconds: str) -> None:
    """Answer each request, `{"template", "tokens", "messages"}`, with `{"text", "spans"}` or `{"error"}`."""
    os.environ["USE_TORCH"] = "0"  # unused, and takes seconds to import
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    limits.serve(lambda request: answer(tokenizer, **request), int(seconds))


def answer(tokenizer: Any, template: str, tokens: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The text of a chat, and the spans of the assistant's turns in it, with the tokens that end them."""

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
                    raise InconsistentError(
                        f"the chat template renders turn {at + 1} differently when it is generated or when turns "
                        "follow, so the model would learn a text that never occurs; use prompt and completion instead"
                    )
                yield len(before), len(after.rstrip())  # whitespace after the end token is never generated

    try:
        whole = render(len(messages))
        return {"text": whole, "spans": list(spans())}
    except InconsistentError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "the chat template takes too much memory"}
    except Exception as error:  # templates raise anything
        return {"error": f"the chat template rejects it: {error}"}


class InconsistentError(Exception):
    """A turn is rendered in more than one way."""
