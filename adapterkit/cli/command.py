"""What every command has: its line of help, options that stand before and after its name, and near names for typos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import click

from adapterkit import __version__
from adapterkit.cli import output, progress
from adapterkit.cli.complete import complete_by_name
from adapterkit.cli.failures import failure_of, speak_options
from adapterkit.cli.naming import in_options
from adapterkit.cli.options import GroupedOption, Spelled
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.text import nearest

LOG = logging.getLogger("adapterkit")
SHARED: tuple[click.Parameter, ...] = (
    click.Option(["--progress"], type=click.Choice(["auto", "json", "none"]),
                 help="Progress on stderr: a bar on a terminal (auto), JSON lines, or none.  [default: auto]"),
    click.Option(["-q", "--quiet"], is_flag=True, help="Print only results, warnings and errors."),
    click.Option(["-v", "--verbose"], is_flag=True, help="Print details too, and a traceback with an error."),
    click.Option(["-V", "--version"], is_flag=True, is_eager=True, expose_value=False,
                 callback=lambda ctx, _, wanted: _print_version(ctx) if wanted else None,
                 help="Print the version and exit."),
)  # fmt: skip


class Command(click.Command):
    """A command of `adapterkit`, with the shared options, examples and the page of docs/ that describes it."""

    def __init__(self, *args: Any, docs: str, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.docs, self.examples = docs, examples
        complete_by_name(self.params)
        for param in self.params:
            if isinstance(param, click.Option) and param.help:
                param.help = in_options(param.help, self)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help = super().get_params(ctx)
        return [*own, *SHARED, help]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and isinstance(error.param.type, click.Choice):
                raise self._no_such_choice(ctx, given, error) from error
            raise
        _heed(*(ctx.params.pop(name, None) for name in ("progress", "quiet", "verbose")))
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            speak_options(error, self)
            if isinstance(error, BrokenPipeError) and not output.is_of_stream(error):
                failure = failure_of(error)  # click would take it for one of stdout, and say nothing
                raise AdapterkitError(*failure.lines, hint=failure.hint) from error
            raise

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the line of help that the list of commands has, then the details."""
        if self.short_help:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(f"{self.short_help}.")
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group: the command's own, those of its groups, and what every command has."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.params:
            if isinstance(param, click.Option) and (line := param.get_help_record(ctx)) is not None:
                group = param.group if isinstance(param, GroupedOption) else ""
                sections.setdefault(group or "Options", []).append(line)
        everywhere = self.get_params(ctx)[len(self.params) :]
        sections["Global options"] = [line for param in everywhere if (line := param.get_help_record(ctx)) is not None]
        for title, lines in sections.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, unwrapped so that they can be copied, and the page of the documentation."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        formatter.write_paragraph()
        formatter.write(f"Docs: docs/{self.docs}\n")

    def _no_such_choice(self, ctx: click.Context, args: list[str], error: click.BadParameter) -> UsageError:
        """The error of an option that has no such choice, and the choice that is most like it."""
        param = error.param
        assert param is not None and isinstance(param.type, click.Choice) and param.name is not None
        found, _, _ = self.make_parser(ctx).parse_args(args)
        value, choices = found.get(param.name), [str(choice) for choice in param.type.choices]
        name = param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
        said = f"{name} {value}: expected {', '.join(choices[:-1])} or {choices[-1]}"
        spellings = param.type.spellings if isinstance(param.type, Spelled) else ()
        return UsageError(said, hint=nearest(str(value), [*choices, *spellings]))


def _heed(mode: progress.Mode | None, quiet: bool, verbose: bool) -> None:
    """Do what the shared options say, wherever they stood."""
    if quiet:
        output.be_quiet()
    if verbose:
        LOG.setLevel(logging.DEBUG)
    if output.is_quiet() and LOG.level == logging.DEBUG:
        raise UsageError("--quiet and --verbose exclude each other", hint="give one of them")
    if mode is not None:
        progress.mode.set(mode)
    elif quiet and progress.mode.get() == "auto":
        progress.mode.set("none")


def _print_version(ctx: click.Context) -> None:
    output.say(f"adapterkit {__version__}")
    ctx.exit()
