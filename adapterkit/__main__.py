"""The entry point of `adapterkit` and `python -m adapterkit`: sets up signal handlers before slow imports."""

from __future__ import annotations

import sys

from adapterkit.cli import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    signals.end_at_once()
    from adapterkit.cli.main import main as run

    try:
        signals.end_cleanly()
        run()
    except KeyboardInterrupt as error:  # before `run` handles it, or while it reports an error
        sys.stderr.write("error: interrupted\n")
        sys.exit(getattr(error, "exit_code", 130))
    finally:
        signals.ignore()


if __name__ == "__main__":
    main()
