"""The pages commands.md and calls.md of the site, made from the click commands and the docstrings: a hook of mkdocs."""

from __future__ import annotations

import html
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import adapterkit
from adapterkit.cli.main import group


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, which are nowhere on the disk."""
    files.append(File.generated(config, "commands.md", content=page()))
    files.append(File.generated(config, "calls.md", content=calls()))
    return files


def calls() -> str:
    """The page of the Python calls and classes, a section each, as help() shows them."""
    parts = ["# Python calls", "Made from the docstrings; `help(adapterkit.merge)` prints the same."]
    public = [getattr(adapterkit, name) for name in adapterkit.__all__ if not name.startswith("_")]
    for one in sorted(public, key=lambda one: (isinstance(one, type), one.__name__.lower())):
        about, *sections = (inspect.getdoc(one) or "").split("\n\n")
        text = [block(part) if part.startswith((">>> ", "Args:", "Returns:", "Yields:", "Raises:")) else escaped(part)
                for part in sections]  # fmt: skip
        called = [] if isinstance(one, type) else [block(f"{one.__name__}{arguments(one)}")]
        parts += [f"## {one.__name__}", *called, escaped(about), *text]
    return "\n\n".join(parts) + "\n"


def arguments(call: Callable[..., Any]) -> str:
    """The arguments of a call with their defaults, without types."""
    found = inspect.signature(call).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in found]))


def page() -> str:
    """The whole page, a section a command."""
    context = group.make_context("adapterkit", [], resilient_parsing=True)
    parts = ["# Commands", "Made from the commands themselves; `adapterkit COMMAND --help` prints the same."]
    parts += ["## adapterkit", *described(group, context)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        parts += [f"## {name}", *described(command, click.Context(command, info_name=name, parent=context))]
    return "\n\n".join(parts) + "\n"


def described(command: click.Command, context: click.Context) -> list[str]:
    """One command: usage, text, options, lists and examples."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    summary = [f"{escaped(command.short_help)}."] if command.short_help else []
    details = paragraphs(command.help or "")
    return [block(usage), *summary, *details, options_table(command, context), *rest(command, context)]


def rest(command: click.Command, context: click.Context) -> list[str]:
    """What --help prints below the options: lists and examples."""
    formatter = context.make_formatter()
    command.format_epilog(context, formatter)
    text = textwrap.dedent(formatter.getvalue().strip("\n"))
    return [block(text)] if text else []


def block(text: str) -> str:
    """Text as it is."""
    return f"```text\n{text}\n```"


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a help text; those that click prints as they are (after \\b) as a block of text."""
    found = []
    for part in re.split(r"\n\s*\n", text.partition("\f")[0].strip("\n")):
        lines = part.splitlines()
        if lines and lines[0].strip() == "\b":
            found.append(block("\n".join(lines[1:])))
        elif lines:
            found.append(escaped(" ".join(line.strip() for line in lines)))
    return found


def options_table(command: click.Command, context: click.Context) -> str:
    """The options as a table, in the order of --help."""
    rows = ["| Option | Meaning |", "| --- | --- |"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1]:  # an argument has no help of its own
            names, meaning = (" ".join(text.split()) for text in record)
            rows.append(f"| `{names}` | {escaped(meaning)} |")
    return "\n".join(rows)


def escaped(text: str) -> str:
    """Text of which Markdown takes nothing for its own, outside of `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\[\]*_|])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)
