"""The page commands.md of the site, made from the click commands: a hook of mkdocs (see mkdocs.yml)."""

from __future__ import annotations

import html
import re
import textwrap

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from adapterkit.cli.main import group


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page, which is nowhere on the disk."""
    files.append(File.generated(config, "commands.md", content=page()))
    return files


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
