"""Errors of commands: `error: …` and `hint: …` on stderr, with `--json` an object on stdout, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from adapterkit.cli.option_names import PARAMETER, in_options
from adapterkit.cli.output import SCHEMA, is_result_printed, say_json, say_labelled
from adapterkit.errors import AdapterkitError
from adapterkit.packages import missing


@dataclass(frozen=True)
class Failure:
    """The lines of an error, its hint, and the exit code."""

    lines: Sequence[str]
    hint: str = ""
    code: int = 1

    @property
    def facts(self) -> dict[str, Any]:
        """The failure, for JSON."""
        return {"error": "\n".join(self.lines), "hint": self.hint or None, "exit_code": self.code}


def failure_of(error: BaseException) -> Failure:
    """The failure that `error` is reported as."""
    notes = getattr(error, "__notes__", [])  # about unfinished work
    match error:
        case AdapterkitError():
            *lines, last = error.lines or [""]
            return Failure([*lines, "; ".join([last, *notes])], error.hint, error.exit_code)
        case click.ClickException():
            return _click_failure(error)
        case KeyboardInterrupt():
            said = ["interrupted", *filter(None, [str(error)]), *notes]
            return Failure(["; ".join(said)], code=getattr(error, "exit_code", 130))
        case OSError(filename=None):
            return Failure([error.strerror or str(error)], "-v shows where it happened")
        case OSError():
            return Failure([f"{error.filename}: {error.strerror}"])
        case ImportError() if error.name and not error.name.startswith("adapterkit"):
            return failure_of(missing(error, error.name))
    raise error


def fail(failure: Failure, *, as_json: bool = False) -> NoReturn:
    """Report the failure and exit."""
    say_labelled("error", *failure.lines)
    if failure.hint:
        say_labelled("hint", failure.hint)
    if as_json and not is_result_printed():
        say_json({"schema": SCHEMA, **failure.facts})
    sys.exit(failure.code)


def name_options(error: BaseException, command: click.Command) -> None:
    """Replace the Python parameters in an error's message by the options of `command`."""
    error.args = tuple(in_options(part, command) if isinstance(part, str) else part for part in error.args)
    if isinstance(error, AdapterkitError):
        hint = in_options(error.hint, command).replace("`out`", "output")
        error.hint = "" if PARAMETER.search(hint) else hint  # about an option that the command does not have
    if notes := getattr(error, "__notes__", None):
        notes[:] = [in_options(line, command) for line in notes]


def _click_failure(error: click.ClickException) -> Failure:
    """Convert an error of click: no capital, no full stop, the nearest name as the hint."""
    text = error.message if isinstance(error, click.NoSuchOption) else error.format_message()
    text = (text[:1].lower() + text[1:]).rstrip(".")
    hint = ""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        hint = f"did you mean {error.possibilities[0]}?"
    elif isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"{error.ctx.command_path} --help shows the arguments and options"
    return Failure(text.split("\n"), hint, error.exit_code)
