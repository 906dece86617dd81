"""`adapterkit`: the group of commands, and how their failures end."""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import click

from adapterkit import __version__
from adapterkit.cli.output import forget_notes, guard, note, say
from adapterkit.errors import AdapterkitError

if TYPE_CHECKING:
    from adapterkit.cli.progress import Mode

# Command -> its line of help. The module of that name is imported when it is called, so that --help costs nothing.
COMMANDS = {
    "list": "Which adapters there are: in folders, in the Hub cache, on the Hub.",
    "inspect": "What an adapter is: rank, scaling, targets, norms, and what is wrong with it.",
    "merge": "Merge adapters into a base model, streaming, rounded once.",
    "unmerge": "Undo a merge bit for bit, by the receipt it left.",
    "verify": "Check that a checkpoint is just this base with just these adapters in it.",
    "combine": "Combine adapters into one: exact sums, SVD, TIES, DARE, KnOTS and more.",
    "resize": "Change an adapter's rank, optimally, and say what that costs.",
    "convert": "Make an adapter another kind: LoRA to DoRA, DoRA to LoRA, rsLoRA, PiSSA to LoRA.",
    "extract": "Extract an adapter from a fine-tuned model and its base.",
    "compare": "How alike adapters are: angles, subspaces, signs, and what adding them up loses.",
    "train": "Train a small adapter: LoRA, rsLoRA, DoRA, QLoRA; or all of a model.",
    "eval": "How well a model, with an adapter or without, does on held-out records.",
    "quantize": "Quantize a base model to NF4, FP4 or LLM.int8, streaming.",
    "pull": "Get an adapter or a base from the Hub, checked byte by byte.",
    "push": "Send an adapter or a model to the Hub, checked before and in one commit.",
    "tui": "Browse adapters and work with them in the terminal.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"adapterkit.cli.commands.{cmd_name}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adapterkit")
@click.option("--progress", type=click.Choice(["auto", "json", "none"]), default="auto", show_default=True,
              help="How progress is shown on stderr: a bar on a terminal, JSON lines, or not at all.")  # fmt: skip
def group(progress: Mode) -> None:
    """Train, inspect, combine and merge LoRA adapters, exactly, and share them."""
    from adapterkit.cli import progress as bars
    from adapterkit.hub import download

    forget_notes()
    bars.mode = progress
    download.shown = partial(bars.progress, in_bytes=True)


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and its own exit code."""
    gc.set_threshold(200_000)  # importing torch makes 600 000 objects, none of them garbage: 0.08 s less
    atexit.register(gc.freeze)  # nor does it pay to look for garbage in them at the end: 0.15 s less
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths need not be UTF-8, and terminals need not show it
            stream.reconfigure(errors="backslashreplace")
    guard()
    logging.getLogger("adapterkit").addHandler(NOTES)
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail(1, "the current directory does not exist any more: change to another")
    try:
        result = group.main(prog_name="adapterkit", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # at exit it would be too late for one line and an exit code
    except AdapterkitError as error:
        _fail(error.exit_code, *"; ".join([str(error), *_notes(error)]).split("\n"))
    except click.ClickException as error:
        error.show(said := io.StringIO())
        say(*said.getvalue().rstrip("\n").split("\n"), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        why = error.__cause__ if isinstance(error, click.Abort) else error  # click wraps what it catches
        _fail(getattr(why, "exit_code", 130), "; ".join(["interrupted", *filter(None, [str(why or "")]), *_notes(why)]))
    except OSError as error:
        if error.filename:
            _fail(1, f"{error.filename}: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit works
        if isinstance(error, BrokenPipeError):  # the reader of a pipe went away: nothing to tell anyone
            sys.exit(1)
        _fail(1, f"standard output: {error.strerror or error}")
    sys.exit(result if isinstance(result, int) else 0)


def _fill_closed_streams() -> None:
    """Give a program that was started with a closed stream one that goes nowhere.

    Else the next file opened would get its number, and whatever a library prints would be written into that.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


class _Notes(logging.Handler):
    """What the library has to say while it works, as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _notes(error: BaseException | None) -> list[str]:
    """What became of an output that was not finished, as `staged` notes it."""
    return getattr(error, "__notes__", [])


NOTES = _Notes()  # one, however often `main` is called


def _fail(code: int, message: str, *more: str) -> NoReturn:
    """End with an error of one line, or of more where it lists what is wrong."""
    say(f"adapterkit: {message}", *more, err=True)
    sys.exit(code)
