"""`adapterkit completion bash|zsh|fish`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from adapterkit.cli.command import Command
from adapterkit.cli.output import say


@click.command(
    "completion",
    cls=Command,
    docs="index.md",
    examples=[
        "adapterkit completion bash >> ~/.bashrc",
        "adapterkit completion zsh >> ~/.zshrc",
        "adapterkit completion fish > ~/.config/fish/completions/adapterkit.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """The script completes commands, options and their values, paths, and names in the Hub cache."""
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "adapterkit", "_ADAPTERKIT_COMPLETE").source()
    say(*script.rstrip("\n").split("\n"))
