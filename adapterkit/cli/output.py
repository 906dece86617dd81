"""The one place that prints: whatever strangers' files hold, a line stays one line and steers no terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO, cast

from adapterkit.text import visible, visible_lines

if TYPE_CHECKING:
    from rich.console import Console


_notes: list[str] = []  # of the command that runs, for its JSON
_warnings: list[str] = []


def say(*lines: str, err: bool = False) -> None:
    """Print lines, on stderr with `err`."""
    print("\n".join(map(visible, lines)), file=sys.stderr if err else sys.stdout, flush=err)


def note(*lines: str) -> None:
    """Print notes on stderr, a line each."""
    _notes.extend(lines)
    for line in lines:
        say(f"note: {line}", err=True)


def warn(*lines: str) -> None:
    """Print warnings on stderr, a line each."""
    _warnings.extend(lines)
    for line in lines:
        say(f"warning: {line}", err=True)


def forget_notes() -> None:
    """Forget the notes and warnings of the command before."""
    _notes.clear()
    _warnings.clear()


def notes_about(name: str) -> list[str]:
    """The notes and warnings so far that are about `name`."""
    return [line for line in (*_notes, *_warnings) if line.startswith(f"{name}: ")]


def say_result(facts: Mapping[str, Any]) -> None:
    """Print the result of a command as JSON, with every note and warning that was printed."""
    say_json({**facts, "notes": _notes, "warnings": _warnings})


def say_json(value: Any, *, indent: int | None = 2, err: bool = False) -> None:
    """Print a value as JSON, in ASCII: every string whole, none of it a control character; NaN and Inf as null."""
    from adapterkit.inspection.summary import finite

    text = json.dumps(finite(value), indent=indent, allow_nan=False).replace("\x7f", r"\u007f")
    print(text, file=sys.stderr if err else sys.stdout, flush=err)


def console(*, err: bool = False) -> Console:
    """What draws tables and bars; it takes texts as they are, which `visible` has to have made."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=getattr(stream, "unguarded", stream), highlight=False, markup=False, emoji=False)


def guard() -> None:
    """Make stdout and stderr show what steers terminals, whoever prints it: also the warnings and bars of libraries."""
    sys.stdout, sys.stderr = (
        cast(TextIO, Guarded(stream)) if stream is not None else stream for stream in (sys.stdout, sys.stderr)
    )


class Guarded:
    """A stream that writes lines of visible text; `unguarded` is the one below, for our own colours."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded: TextIO = getattr(stream, "unguarded", stream)

    def write(self, text: str) -> int:
        return self.unguarded.write(visible_lines(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)
