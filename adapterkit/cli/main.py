"""Define the `adapterkit` command group, and set up and end each run."""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import logging
import os
import sys
import traceback
from functools import partial
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from adapterkit.cli import output
from adapterkit.cli import progress as bars
from adapterkit.cli.command import Command
from adapterkit.cli.failures import Failure, fail, failure_of
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.text import nearest

# Group -> command -> summary. The command's module is imported only when it is called, so that --help is fast.
GROUPS = {
    "Look": {
        "list": "List adapters in folders, the Hub cache, or on the Hub",
        "inspect": "Show an adapter's rank, scaling, targets, norms and problems",
        "compare": "Compare adapters: cosine similarity, subspaces, sign conflicts",
        "verify": "Check that a model is exactly this base plus these adapters",
        "tui": "Browse adapters and work with them in the terminal",
    },
    "Change": {
        "merge": "Merge adapters into a base model",
        "unmerge": "Undo a merge exactly, using its receipt",
        "quantize": "Quantize the linear layers of a model",
        "combine": "Combine adapters into one",
        "resize": "Change an adapter's rank",
        "convert": "Convert an adapter: LoRA, rsLoRA, DoRA, PiSSA",
        "extract": "Extract an adapter from a fine-tuned model and its base",
    },
    "Train": {
        "train": "Train a LoRA, rsLoRA, DoRA or QLoRA adapter, or a whole model",
        "eval": "Evaluate a model, with or without an adapter, on a dataset",
    },
    "Hub": {
        "pull": "Download an adapter or model from the Hub and verify every byte",
        "push": "Upload an adapter or model to the Hub",
    },
    "Shell": {
        "completion": "Print a completion script for bash, zsh or fish",
    },
}
COMMANDS = {name: line for commands in GROUPS.values() for name, line in commands.items()}
LOG = logging.getLogger("adapterkit")


class LazyGroup(Command, click.Group):
    """A group that imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"adapterkit.cli.commands.{cmd_name}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, Command)
        command.short_help = COMMANDS[cmd_name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            hint = nearest(args[0], COMMANDS) or "adapterkit --help lists the commands"
            raise UsageError(f"no such command {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, without importing them, and options."""
        named = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        wide = max(map(len, COMMANDS))
        for name, commands in GROUPS.items():
            with formatter.section(name):
                formatter.write_dl([(f"{command:{wide}}", line) for command, line in commands.items()])


@click.group(
    cls=LazyGroup, invoke_without_command=True, docs="index.md",
    examples=[
        "adapterkit list --hub --base HuggingFaceTB/SmolLM2-135M-Instruct",
        "adapterkit pull HuggingFaceTB/SmolLM2-135M-Instruct -o base",
        "adapterkit train base data.jsonl -o adapter",
        "adapterkit merge base adapter -o merged",
        "adapterkit unmerge merged -o restored --adapter adapter",
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
@click.pass_context
def group(ctx: click.Context) -> None:
    """Train, inspect, combine and merge LoRA adapters, exactly, and share them."""
    from adapterkit.hub.locate import on_download

    if ctx.invoked_subcommand is None:
        output.say(*ctx.get_help().split("\n"), err=True)
        ctx.exit(UsageError.exit_code)
    on_download.set(partial(bars.progress, in_bytes=True))


def main() -> NoReturn:
    """Run the command line; every failure is an error on stderr and its own exit code."""
    gc.set_threshold(200_000)  # importing torch makes 600 000 objects, none of them garbage: saves 0.08 s
    atexit.register(gc.freeze)  # no garbage collection at exit: saves 0.15 s
    _begin()
    as_json = "--json" in sys.argv[1:]
    try:
        os.getcwd()
    except FileNotFoundError:
        said = "the current directory no longer exists"
        fail(Failure([said], "change to another directory"), as_json=as_json)
    try:
        result = group.main(prog_name="adapterkit", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # an error at exit would not set the exit code
    except (AdapterkitError, click.ClickException, KeyboardInterrupt, click.Abort, OSError, ImportError) as error:
        _end(error, as_json)
    sys.exit(result if isinstance(result, int) else 0)


def _begin() -> None:
    """Make the streams safe to print to, and reset the state of an earlier command in this process."""
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may not be UTF-8, and terminals may not support it
            stream.reconfigure(errors="backslashreplace")
    output.guard()
    output.begin()
    bars.mode.set("auto")
    LOG.setLevel(logging.NOTSET)
    LOG.addHandler(NOTES)


def _end(error: BaseException, as_json: bool) -> NoReturn:
    """Report the failure and exit."""
    if isinstance(error, click.Abort):  # click wraps the interrupts that it catches
        error = error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else KeyboardInterrupt()
    if LOG.level == logging.DEBUG:
        output.say(*"".join(traceback.format_exception(error)).rstrip("\n").split("\n"), err=True)
    if output.is_of_stream(error):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit works
        if isinstance(error, BrokenPipeError):  # the reader of the pipe has closed it
            sys.exit(1)
    fail(failure_of(error), as_json=as_json)


def _fill_closed_streams() -> None:
    """Open the null device for standard streams that were closed at the start.

    Otherwise the next opened file would get their descriptor, and printed text would be written to it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


class _Notes(logging.Handler):
    """Print the library's log records on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            output.note(record.getMessage())
        else:
            output.say(record.getMessage(), err=True)


NOTES = _Notes()  # a single handler, for repeated calls of `main`
