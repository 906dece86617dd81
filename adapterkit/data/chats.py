"""Chats as the template of a tokenizer writes them, by a process that can neither hang nor fill the memory."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, Protocol

from adapterkit.data import rendering
from adapterkit.data.records import LINE
from adapterkit.errors import FormatError, UsageError

SECONDS = 10  # of processor time for a chat with all its turns, which takes milliseconds


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
        self.process: Popen[str] | None = None

    def __enter__(self) -> Chats:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

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
        made = self._answer(request)
        if "error" in made:
            raise RefusedError(made["error"])
        return made["text"], [(begin, end) for begin, end in made["spans"]]

    def _answer(self, request: str) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-P", rendering.__file__, str(SECONDS)]
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8")
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline(LINE + 1)
        if line.endswith("\n"):
            made: dict[str, Any] = json.loads(line)
            return made
        if line:
            self._end()
            raise FormatError(f"the chat template writes more than {LINE:,} characters for it")
        if self._end() == -signal.SIGXCPU:
            raise FormatError(f"the chat template takes more than {SECONDS} s of processor time for it")
        raise FormatError("the process in which the chat template is rendered ended")

    def _end(self) -> int | None:
        """End the process; what it ended with before, if it had."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()
        return process.returncode
