"""How a base checkpoint is printed: what it is, and how its weights are stored."""

from __future__ import annotations

from dataclasses import asdict

from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.quant import shapes_need_values
from adapterkit.cli.lookup import fetched_of
from adapterkit.cli.output import say, say_result
from adapterkit.errors import FormatError
from adapterkit.hub.locate import Location
from adapterkit.inspection.base_summary import inventory, unsupported
from adapterkit.text import counted, size


def show_base(there: Location, given: str, as_json: bool) -> None:
    """Print the base that is `there`, which the user calls `given`."""
    checkpoint = open_checkpoint(there.path)
    if there.headers_only and shapes_need_values(checkpoint.tensors):
        raise FormatError(
            f"{given}: how its weights are quantized stands among the weights, not in a header; say --full"
        )
    rows = inventory(checkpoint)
    warning = unsupported(checkpoint, rows)
    stored = sum(shard.size for shard in checkpoint.shards)
    model = str(checkpoint.config.get("model_type", "not named"))
    if as_json:
        facts = {
            "path": given, "model_type": model, "files": len(checkpoint.shards), "bytes": stored,
            "quantization": checkpoint.quantization, "stored": [asdict(row) for row in rows], "unsupported": warning,
            "fetched": there.fetched,
        }  # fmt: skip
        say_result(facts)
        return
    say(f"base        {given}")
    say(f"model       {model}")
    say(
        f"weights     {sum(row.weights for row in rows):,} in {counted(len(checkpoint.shards), 'file')}, {size(stored)}"
    )
    say(f"parameters  {sum(row.parameters for row in rows):,}")
    if fetched_of(there):
        say(f"fetched     {fetched_of(there)}")
    if warning:
        say(f"⚠ {warning}")
    width = max(len("stored as"), *(len(row.scheme) for row in rows)) if rows else 0
    say("", f"{'stored as':{width}}  weights     parameters        bytes  merge")
    for row in rows:
        say(f"{row.scheme:{width}}  {row.weights:7,}  {row.parameters:13,}  {size(row.bytes):>11}  {row.merge}")
