"""`adapterkit combine ADAPTER[:WEIGHT]… -o OUT`."""

from __future__ import annotations

import time

import click

from adapterkit.cli.adapter_result import bar_of, show_result
from adapterkit.cli.command import Command
from adapterkit.cli.run_plan import weighted
from adapterkit.combining.methods import DEFAULT, METHODS, all_options
from adapterkit.errors import UsageError
from adapterkit.text import counted


class CombineCommand(Command):
    """A command whose help lists the methods."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every method, and every option that one of them has."""
        with formatter.section("Methods"):
            formatter.write_dl([(name, method.help) for name, method in METHODS.items()])
        with formatter.section("Options of methods, for --set"):
            formatter.write_dl(
                [(str(one), f"{one.help}: {one.expected} ({', '.join(names)})") for one, names in all_options().items()]
            )


@click.command("combine", cls=CombineCommand)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--method", default=DEFAULT, show_default=True, help="How; see below.")
@click.option("--rank", type=int, help="Truncate the result to this rank, optimally.")
@click.option("--energy", type=float, help="Truncate each module to the least rank that keeps this share of ‖Δ‖².")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the method: density=0.5.")
@click.option("--inner", help="Short for --set inner=VALUE.")
@click.option("--seed", type=int, help="Random seed, for methods that leave something to chance.")
@click.option("--saved", default="error", show_default=True,
              help="What to do with tensors that several hold whole: error, first or average.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check what headers tell, print the plan, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def combine_command(
    adapters: tuple[str, ...], output: str, method: str, rank: int | None, energy: float | None,
    settings: tuple[str, ...], inner: str | None, seed: int | None, saved: str, dry_run: bool, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Combine adapters into one, e.g. `a:0.7 b:0.3`; different ranks, scalings and targets go together.

    Prints how far the result is from what was meant, where that has too high a rank to be kept.
    """
    from adapterkit.api.adapters import combine

    options: dict[str, float | str] = dict(_setting(text) for text in settings)
    if inner is not None:
        options["inner"] = inner
    began = time.perf_counter()
    with bar_of("combining", output, dry_run, as_json) as on_module:
        result = combine(
            [weighted(text) for text in adapters], output, method=method, rank=rank, energy=energy, options=options,
            seed=seed, saved=saved, overwrite=overwrite, on_module=on_module,
        )  # fmt: skip
    what = f"combined  {counted(len(adapters), 'adapter')} by {method}"
    show_result(result, output, what, time.perf_counter() - began, as_json)


def _setting(text: str) -> tuple[str, float | str]:
    """`name=value` with its value as a number where it is one."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: expected NAME=VALUE, as in density=0.5")
    try:
        return name, float(value)
    except ValueError:
        return name, value
