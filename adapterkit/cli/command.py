"""The base class of commands: grouped help with examples, global options, and suggestions for typos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import click

from adapterkit import __version__
from adapterkit.cli import output, progress
from adapterkit.cli.complete import complete_by_name
from adapterkit.cli.failures import failure_of, name_options
from adapterkit.cli.option_names import in_options
from adapterkit.cli.options import GroupedOption, Spelled
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.text import nearest

LOG = logging.getLogger("adapterkit")
GLOBAL_OPTIONS: tuple[click.Parameter, ...] = (
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
        return [*own, *GLOBAL_OPTIONS, help]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and isinstance(error.param.type, click.Choice):
                raise self._no_such_choice(ctx, given, error) from error
            raise
        _apply_global_options(*(ctx.params.pop(name, None) for name in ("progress", "quiet", "verbose")))
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            name_options(error, self)
            if isinstance(error, BrokenPipeError) and not output.is_of_stream(error):
                failure = failure_of(error)  # click would ignore it as one of stdout
                raise AdapterkitError(*failure.lines, hint=failure.hint) from error
            raise

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summary from the list of commands, then the details."""
        if self.short_help:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(f"{self.short_help}.")
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group: the command's own, then the global ones."""
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
        """Write the examples, unwrapped for copying, and the page of the documentation."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        formatter.write_paragraph()
        formatter.write(f"Docs: docs/{self.docs}\n")

    def _no_such_choice(self, ctx: click.Context, args: list[str], error: click.BadParameter) -> UsageError:
        """The error for an invalid or missing choice, with the nearest valid one."""
        param = error.param
        assert param is not None and isinstance(param.type, click.Choice) and param.name is not None
        found, _, _ = self.make_parser(ctx).parse_args(args)
        value, choices = found.get(param.name), [str(choice) for choice in param.type.choices]
        name = param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
        expected = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
        if isinstance(error, click.MissingParameter):
            return UsageError(f"missing {param.param_type_name} '{name}': expected {expected}")
        spellings = param.type.spellings if isinstance(param.type, Spelled) else ()
        return UsageError(f"{name} {value}: expected {expected}", hint=nearest(str(value), [*choices, *spellings]))


def _apply_global_options(mode: progress.Mode | None, quiet: bool, verbose: bool) -> None:
    """Apply the global options, given before or after the command's name."""
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
