"""`adapterkit convert ADAPTER -o OUT --to KIND`."""

from __future__ import annotations

import time

import click

from adapterkit.cli.adapter_result import bar_of, show_result
from adapterkit.cli.command import Command


@click.command("convert", cls=Command)
@click.argument("adapter")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--to", type=click.Choice(["dora", "lora", "rslora"]), required=True, help="What to make of it.")
@click.option("--base", help="The base model, to and from DoRA.")
@click.option("--initial", metavar="ADAPTER", help="What a PiSSA or OLoRA adapter was before training.")
@click.option("--rank", type=int, help="From DoRA, or with --initial: truncate to this rank, optimally.")
@click.option("--energy", type=float, help="The same by the share of ‖Δ‖² that each module keeps.")
@click.option("--seed", type=int, help="Where the search for the best rank begins, from DoRA.")
@click.option("--dry-run", is_flag=True, help="Check what headers tell, print the plan, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def convert_command(
    adapter: str, output: str, to: str, base: str | None, initial: str | None, rank: int | None, energy: float | None,
    seed: int | None, dry_run: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make ADAPTER another kind.

    LoRA to DoRA is exact: the magnitudes are the norms of W + s·B·A. DoRA to LoRA is the best approximation of the
    rank or energy asked for. lora and rslora otherwise describe the same update by another scaling; with --initial,
    what a PiSSA or OLoRA adapter changed in the base is taken off.
    """
    from adapterkit.api.adapters import convert

    began = time.perf_counter()
    with bar_of("converting", output, dry_run, as_json) as on_module:
        result = convert(
            adapter, output, to=to, base=base, initial=initial, rank=rank, energy=energy, seed=seed,
            overwrite=overwrite, on_module=on_module,
        )  # fmt: skip
    show_result(result, output, f"converted to {to}", time.perf_counter() - began, as_json)
