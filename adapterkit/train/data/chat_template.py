"""Render chats with a tokenizer's template, in a subprocess with limited time and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adapterkit.errors import UsageError
from adapterkit.files.sandbox import Sandbox
from adapterkit.train.data import chat_template_subprocess
from adapterkit.train.data.records import LINE

SECONDS = 10  # CPU time limit for a chat with all its turns, which normally takes milliseconds
MEMORY = 1 << 30  # byte limit for a chat


class Templated(Protocol):
    """The part of a transformers tokenizer that has the chat template."""

    @property
    def chat_template(self) -> Any: ...
    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...
    def get_chat_template(self) -> str: ...


class RefusedError(Exception):
    """A chat or text that cannot be trained on; the message says why."""


class Chats:
    """A context for rendering chats; the subprocess starts with the first chat and ends with the context."""

    def __init__(self, tokenizer: Templated) -> None:
        self.tokenizer = tokenizer
        self.process = Sandbox(Path(chat_template_subprocess.__file__), SECONDS, MEMORY, "the chat template")

    def __enter__(self) -> Chats:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()

    def text_of(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Render a chat.

        Returns:
            The text, and the spans of the assistant's turns in it, with the tokens that end each turn.

        Raises:
            RefusedError: The template rejects the chat.
            UsageError: The tokenizer has no template.
            FormatError: The template exceeds its time or memory limit.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template, and messages need one; use prompt and completion instead"
            )
        try:
            template, tokens = self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map
        except ValueError as error:  # several templates without a default
            raise UsageError(f"the tokenizer has no default chat template: {error}") from error
        try:
            request = json.dumps({"template": template, "tokens": tokens, "messages": messages})
        except (TypeError, ValueError, RecursionError) as error:
            raise RefusedError(f"cannot be passed to the chat template: {error}") from error
        answer = self.process.ask(request, LINE)
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer["text"], [(begin, end) for begin, end in answer["spans"]]
