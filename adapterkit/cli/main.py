"""`adapterkit`: the group of commands, and how their failures end."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from adapterkit.errors import AdapterkitError
from adapterkit.version import __version__

# Command -> the module under adapterkit.cli that holds a click command of that name, and its line of help: modules are
# imported when they are called, so that --help costs nothing.
COMMANDS = {
    "inspect": ("inspect", "What an adapter is: rank, scaling, targets, norms, and what is wrong with it."),
    "merge": ("merge", "Merge adapters into a base model, streaming, rounded once."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"adapterkit.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adapterkit")
def group() -> None:
    """Inspect LoRA adapters and merge them into base weights, exactly."""


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and its own exit code."""
    try:
        result = group.main(standalone_mode=False)
    except AdapterkitError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing was kept", 130)
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"adapterkit: {message}", file=sys.stderr)
    sys.exit(code)
