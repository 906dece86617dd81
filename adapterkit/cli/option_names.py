"""Translate the Python parameters in errors and notes to options of the running command."""

from __future__ import annotations

import re

import click

QUOTES = "'\""
PARAMETER = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def in_options(text: str, command: click.Command | None = None) -> str:
    """Replace `overwrite=True` in `text` by --overwrite, for the options of `command`, by default the running one."""
    if command is None:
        context = click.get_current_context(silent=True)
        if context is None:
            return text
        command = context.command
    parameters = {opt.lstrip("-"): param for param in command.params for opt in (*param.opts, param.name or "")}

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        param = parameters.get(name)
        if isinstance(param, click.Argument):
            return param.human_readable_name if value is None else match[0]
        if not isinstance(param, click.Option):
            return match[0]
        if param.is_flag:
            return (param.secondary_opts if value == "False" and param.secondary_opts else param.opts)[-1]
        flag = min(param.opts, key=len)
        return flag if value is None else f"{flag} {value.strip(QUOTES) or value}"

    return PARAMETER.sub(option, text)
