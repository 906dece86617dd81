"""`adapterkit combine ADAPTER[:WEIGHT]… -o OUT` and `adapterkit resize ADAPTER -o OUT`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from adapterkit.cli.running import weighted
from adapterkit.errors import UsageError
from adapterkit.methods import METHODS

if TYPE_CHECKING:
    from adapterkit.combining import Combined, ModuleDone

LIST = "\n".join(f"  {name:16}{method.help}" for name, method in METHODS.items())


@click.command("combine", epilog=f"\b\nMethods:\n{LIST}")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--method", default="linear", show_default=True, help="How; see below.")
@click.option("--rank", type=int, help="Truncate the result to this rank, optimally.")
@click.option("--energy", type=float, help="Truncate each module to the least rank that keeps this share of ‖Δ‖².")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the method: density=0.5.")
@click.option("--inner", help="How core and knots combine in their bases: ties or linear.")
@click.option("--seed", type=int, help="Of what dare methods drop.")
@click.option("--saved", default="error", show_default=True,
              help="What to do with tensors that several hold whole: error, first or average.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def combine_command(
    adapters: tuple[str, ...], output: str, method: str, rank: int | None, energy: float | None,
    settings: tuple[str, ...], inner: str | None, seed: int | None, saved: str, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Combine adapters into one, e.g. `a:0.7 b:0.3`; different ranks, scalings and targets go together.

    Prints how far the result is from what was meant, where that has too high a rank to be kept.
    """
    from adapterkit.adapters import combine

    options: dict[str, float | str] = dict(_setting(text) for text in settings)
    if inner is not None:
        options["inner"] = inner
    began = time.perf_counter()
    with _bar("combining") as on_module:
        result = combine(
            [weighted(text) for text in adapters], output, method=method, rank=rank, energy=energy, options=options,
            seed=seed, saved=saved, overwrite=overwrite, on_module=on_module,
        )  # fmt: skip
    _show(result, output, f"combined  {len(adapters)} adapters by {method}", time.perf_counter() - began, as_json)


@click.command("resize")
@click.argument("adapter")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--rank", type=int, help="The rank of every module; what has less is padded.")
@click.option("--energy", type=float, help="The least rank of each module that keeps this share of ‖Δ‖².")
@click.option("--error", type=float, help="The least rank of each module with no more than this relative error.")
@click.option("--uniform", is_flag=True, help="The same rank for all: the greatest that one needs.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def resize_command(
    adapter: str, output: str, rank: int | None, energy: float | None, error: float | None, uniform: bool,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Change the rank of ADAPTER: downwards to the best approximation there is, upwards exactly."""
    from adapterkit.adapters import resize

    began = time.perf_counter()
    with _bar("resizing") as on_module:
        result = resize(
            adapter, output, rank=rank, energy=energy, error=error, uniform=uniform, overwrite=overwrite,
            on_module=on_module,
        )  # fmt: skip
    _show(result, output, "resized   1 adapter", time.perf_counter() - began, as_json)


def _setting(text: str) -> tuple[str, float | str]:
    """`name=value` with its value as a number where it is one."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: expected NAME=VALUE, as in density=0.5")
    try:
        return name, float(value)
    except ValueError:
        return name, value


@contextmanager
def _bar(what: str) -> Iterator[Callable[[ModuleDone], None]]:
    """What draws the modules that are done, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda row: bar.update(task, completed=row.done, total=row.total)


def _show(result: Combined, output: str, what: str, seconds: float, as_json: bool) -> None:
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        rows = [
            {"name": row.name, "rank": row.rank, "norm": row.energy**0.5, "error": row.error} for row in result.modules
        ]
        facts = {"output": output, "error": result.error, "seconds": round(seconds, 3), "modules": rows}
        print(json.dumps(facts | {"notes": list(result.notes)}, indent=2))
        return
    ranks = sorted({row.rank for row in result.modules})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no ranks"
    print(f"{what} in {seconds:.1f} s: {len(result.modules)} modules, {span}")
    if result.error:
        worst = max(result.modules, key=lambda row: row.error)
        print(
            f"kept      {1 - result.error**2:.2%} of ‖Δ‖², relative error {result.error:.3g} "
            f"(worst: {worst.name}, {worst.error:.3g})"
        )
    print(f"wrote     {output}")
