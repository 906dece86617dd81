"""`adapterkit extract BASE FINETUNED -o OUT`."""

from __future__ import annotations

import time

import click

from adapterkit.cli.adapter_result import bar_of, show_result
from adapterkit.cli.command import Command


@click.command("extract", cls=Command)
@click.argument("base")
@click.argument("finetuned")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--rank", type=int, help="The rank of every module.")
@click.option("--energy", type=float, help="The least rank of each module that keeps this share of ‖Δ‖².")
@click.option("--whole", is_flag=True, help="Take embeddings, norms and heads that differ too, as modules_to_save.")
@click.option("--seed", type=int, default=0, help="Where the search for the best rank begins.")
@click.option("--dry-run", is_flag=True, help="Check what headers tell, print the plan, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def extract_command(
    base: str, finetuned: str, output: str, rank: int | None, energy: float | None, whole: bool, seed: int,
    dry_run: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Extract the adapter that makes FINETUNED of BASE, a few rows at a time, and say what it does not hold."""
    from adapterkit.api.adapters import extract

    began = time.perf_counter()
    with bar_of("extracting", output, dry_run, as_json) as on_module:
        result = extract(
            base, finetuned, output, rank=rank, energy=energy, whole=whole, seed=seed, overwrite=overwrite,
            on_module=on_module,
        )  # fmt: skip
    show_result(result, output, "extracted", time.perf_counter() - began, as_json)
