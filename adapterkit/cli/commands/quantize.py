"""`adapterkit quantize BASE [-o OUT] --to KIND`."""

from __future__ import annotations

import time

import click

from adapterkit.api import merge
from adapterkit.base.quant import DEFAULT_BLOCKSIZE, ROUNDINGS, blocksizes, writable_kinds
from adapterkit.cli.command import Command
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.run_plan import DEVICE_HELP, hashes_by_label, run_with_bar
from adapterkit.merging.run.budget import default_threads
from adapterkit.text import counted, size


@click.command("quantize", cls=Command)
@click.argument("base")
@click.option("-o", "--output", type=click.Path(), help="Where to write. Default: BASE-KIND beside the base.")
@click.option("--to", type=click.Choice(writable_kinds()), required=True, help="What to quantize to.")
@click.option("--blocksize", type=click.Choice([str(size) for size in blocksizes()]), default=str(DEFAULT_BLOCKSIZE),
              show_default=True,
              help="Elements that share a scale, for kinds that have blocks.")  # fmt: skip
@click.option("--nested", is_flag=True, help="Quantize the scales too (double quantization).")
@click.option("--rounding", type=click.Choice(ROUNDINGS), default="nearest", help="How to quantize what is in between.")
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option("--calibration", metavar="TEXT", help="For compensated rounding, by what this file makes the layers see.")
@click.option("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: the cores there are, at most 8.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def quantize_command(
    base: str, output: str | None, to: str, blocksize: str, nested: bool, rounding: str, seed: int,
    calibration: str | None, device: str, threads: int | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Quantize the linear layers of BASE, a few rows at a time; everything else stays.

    transformers loads the output like one that it quantized itself.
    """
    plan = merge.plan_quantize(
        base, output, to=to, blocksize=int(blocksize), nested=nested, rounding=rounding, seed=seed,
        calibration=calibration, overwrite=overwrite,
    )  # fmt: skip
    note(*plan.notes)
    began = time.perf_counter()
    result = run_with_bar(plan, "quantizing", threads or default_threads(), device)
    seconds = time.perf_counter() - began
    before = sum(shard.size for shard in plan.base.shards)
    if as_json:
        facts = {
            "output": str(result.out), "bytes_before": before, "bytes_written": result.bytes_written,
            "tensors_quantized": result.tensors, "seconds": round(seconds, 3), "device": result.place,
            "sha256": hashes_by_label(plan, result.hashes),
        }  # fmt: skip
        say_result(facts)
        return
    what = f"{counted(result.tensors, 'weight')} in {seconds:.1f} s"
    say(f"quantized {what}, {size(before)} to {size(result.bytes_written)}")
    say(f"wrote     {result.out}")
