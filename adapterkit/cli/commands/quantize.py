"""`adapterkit quantize BASE [-o OUT] --to KIND`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.merges import DeviceOptions, QuantizeOptions
from adapterkit.cli.command import Command
from adapterkit.cli.next_commands import next_lines, push_command
from adapterkit.cli.options import as_json, dry_run, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.text import counted, size


@click.command(
    "quantize",
    cls=Command,
    docs="quantized.md",
    examples=[
        "adapterkit quantize base -o base-nf4 --to nf4",
        "adapterkit quantize base --to int8 --dry-run",
    ],
)
@options_of(QuantizeOptions)
@options_of(DeviceOptions, "how")
@dry_run
@as_json("Print the plan or the result as JSON")
def quantize_command(given: dict[str, Any], how: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """Other tensors are unchanged. transformers loads the output like a model that it quantized itself."""
    from adapterkit.api.merge import plan_quantize
    from adapterkit.cli.run_plan import hashes_by_label, print_plan, run_with_bar
    from adapterkit.merging.run.finish import Merged

    plan = plan_quantize(**given)
    if dry_run:
        print_plan(plan, how, as_json)
        return
    ran = run_with_bar(plan, "quantizing", Merged, **how)
    result, before = ran.result, sum(shard.size for shard in plan.base.shards)
    if as_json:
        facts = {
            "output": str(result.out), "bytes_before": before, "bytes_written": result.bytes_written,
            "tensors_quantized": result.tensors, "seconds": round(ran.seconds, 3), "device": result.place,
            "sha256": hashes_by_label(plan, result.hashes),
        }  # fmt: skip
        say_result(facts)
        return
    what = f"{counted(result.tensors, 'weight')} in {ran.seconds:.1f} s"
    say(f"quantized {what}, {size(before)} to {size(result.bytes_written)}")
    say(f"wrote     {result.out}")
    if result.out.is_dir():
        say(*next_lines("push", push_command(result.out)))
