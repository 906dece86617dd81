"""`python -m adapterkit` is the command line."""

from adapterkit.cli.main import main

main()
