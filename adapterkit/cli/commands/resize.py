"""`adapterkit resize ADAPTER -o OUT`."""

from __future__ import annotations

import time

import click

from adapterkit.cli.adapter_result import bar_of, show_result
from adapterkit.cli.command import Command


@click.command("resize", cls=Command)
@click.argument("adapter")
@click.option("-o", "--output", type=click.Path(), required=True, help="The directory to write.")
@click.option("--rank", type=int, help="The rank of every module; what has less is padded.")
@click.option("--energy", type=float, help="The least rank of each module that keeps this share of ‖Δ‖².")
@click.option("--error", type=float, help="The least rank of each module with no more than this relative error.")
@click.option("--uniform", is_flag=True, help="The same rank for all: the greatest that one needs.")
@click.option("--dry-run", is_flag=True, help="Check what headers tell, print the plan, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every module.")
def resize_command(
    adapter: str, output: str, rank: int | None, energy: float | None, error: float | None, uniform: bool,
    dry_run: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Change the rank of ADAPTER: downwards to the best approximation there is, upwards exactly."""
    from adapterkit.api.adapters import resize

    began = time.perf_counter()
    with bar_of("resizing", output, dry_run, as_json) as on_module:
        result = resize(
            adapter, output, rank=rank, energy=energy, error=error, uniform=uniform, overwrite=overwrite,
            on_module=on_module,
        )  # fmt: skip
    show_result(result, output, "resized   1 adapter", time.perf_counter() - began, as_json)
