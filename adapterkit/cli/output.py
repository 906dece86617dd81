"""Print everything, escaped: untrusted text can't break lines or control the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from adapterkit.text import visible, visible_lines

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
SCHEMA = 1  # version of the JSON; increases when a field is removed or changes its meaning
COLOURS = {"error": "1;31", "warning": "1;33", "hint": "1;36", "note": "1"}

STDOUT, STDERR = "standard output", "standard error"  # file names in their errors

_notes: list[str] = []  # of the running command, for its JSON
_warnings: list[str] = []
_printed: list[str] = []  # the result, once printed
_quiet = False


def begin() -> None:
    """Reset the state of an earlier command."""
    global _quiet
    _quiet = False
    for lines in (_notes, _warnings, _printed):
        lines.clear()


def be_quiet() -> None:
    """Print results, warnings and errors only."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    """Whether only results, warnings and errors are printed."""
    return _quiet


def say(*lines: str, err: bool = False) -> None:
    """Print lines of a result on stdout, or with `err` status lines on stderr."""
    if not (err and _quiet):
        print("\n".join(map(visible, lines)), file=sys.stderr if err else sys.stdout, flush=err)


def note(*lines: str) -> None:
    """Print notes on stderr, a line each."""
    _add(_notes, "note", lines, shown=not _quiet)


def warn(*lines: str) -> None:
    """Print warnings on stderr, a line each."""
    _add(_warnings, "warning", lines)


def _add(lines_so_far: list[str], label: str, lines: Iterable[str], shown: bool = True) -> None:
    from adapterkit.cli.option_names import in_options

    for line in map(in_options, lines):
        lines_so_far.append(line)
        if shown:
            say_labelled(label, line)


def say_labelled(label: str, *lines: str) -> None:
    """Print `label: ` and lines on stderr, the label in its colour on a terminal."""
    stream = getattr(sys.stderr, "unguarded", sys.stderr)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    shown = f"{label}:" if plain else f"\x1b[{COLOURS[label]}m{label}:\x1b[0m"
    print(shown, "\n".join(map(visible, lines)), file=stream, flush=True)


def say_result(facts: Mapping[str, Any]) -> None:
    """Print the result of a command as JSON, with every note and warning that was printed."""
    _printed.append("result")
    say_json({"schema": SCHEMA, **facts, "notes": _notes, "warnings": _warnings})


def is_result_printed() -> bool:
    """Whether the running command has printed its JSON."""
    return bool(_printed)


def say_json(value: Any, *, indent: int | None = 2, err: bool = False) -> None:
    """Print a value as JSON, in ASCII: every string whole, none of it a control character; NaN and Inf as null."""
    from adapterkit.inspection.module_rows import finite

    text = json.dumps(finite(value), indent=indent, allow_nan=False).replace("\x7f", r"\u007f")
    print(text, file=sys.stderr if err else sys.stdout, flush=err)


def console(*, err: bool = False) -> Console:
    """The console for tables and bars; it doesn't escape text, so pass the result of `visible`."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=getattr(stream, "unguarded", stream), highlight=False, markup=False, emoji=False)


def guard() -> None:
    """Escape control sequences on stdout and stderr, including those in warnings and bars of libraries."""
    sys.stdout, sys.stderr = (
        cast(TextIO, Guarded(getattr(stream, "unguarded", None) or Named(stream, name)))
        for stream, name in ((sys.stdout, STDOUT), (sys.stderr, STDERR))
    )


def is_of_stream(error: BaseException) -> bool:
    """Whether the error is about stdout or stderr."""
    return isinstance(error, OSError) and (error.filename is STDOUT or error.filename is STDERR)


class Named:
    """A stream whose OSErrors carry its name."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    def _named(self, call: Callable[..., T], *args: str) -> T:
        try:
            return call(*args)
        except OSError as error:
            error.filename = self._name
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Guarded:
    """A stream that escapes control sequences; `unguarded` is the underlying one, for our own colours."""

    def __init__(self, stream: Named) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        return self.unguarded.write(visible_lines(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)
