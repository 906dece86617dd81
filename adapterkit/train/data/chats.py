"""Chats as the template of a tokenizer writes them, by a process that can neither hang nor fill the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adapterkit.errors import UsageError
from adapterkit.files.bounded import Bounded
from adapterkit.train.data import rendering
from adapterkit.train.data.records import LINE

SECONDS = 10  # of processor time for a chat with all its turns, which takes milliseconds
MEMORY = 1 << 30  # bytes for it


class Templated(Protocol):
    """What is used of a tokenizer of transformers."""

    @property
    def chat_template(self) -> Any: ...
    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...
    def get_chat_template(self) -> str: ...


class RefusedError(Exception):
    """A chat that cannot be learned from, and why."""


class Chats:
    """A context in which chats are written; the process starts with the first one, and ends with the context."""

    def __init__(self, tokenizer: Templated) -> None:
        self.tokenizer = tokenizer
        self.process = Bounded(Path(rendering.__file__), SECONDS, MEMORY, "the chat template")

    def __enter__(self) -> Chats:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()

    def text_of(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """A chat as text, and where in it stands what the assistant says, with the tokens that end each turn.

        Raises RefusedError where the template refuses the chat, UsageError where there is no template, FormatError
        where it takes too much time or memory.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template, expected one for messages; or give prompt and completion"
            )
        try:
            template, tokens = self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map
        except ValueError as error:  # several templates, and none of them the default
            raise UsageError(f"the tokenizer has no one chat template: {error}") from error
        try:
            request = json.dumps({"template": template, "tokens": tokens, "messages": messages})
        except (TypeError, ValueError, RecursionError) as error:
            raise RefusedError(f"cannot be given to the chat template: {error}") from error
        made = self.process.ask(request, LINE)
        if "error" in made:
            raise RefusedError(made["error"])
        return made["text"], [(begin, end) for begin, end in made["spans"]]
