"""Resources of a run (threads, memory, device, disk space), and checks on the retention of the update."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.base.quant import QuantizedWeight
from adapterkit.errors import LossError, NoSpaceError
from adapterkit.files import os_calls
from adapterkit.merging.plan.edits import STACK_BYTES
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.run.hashing import is_copy
from adapterkit.merging.run.pieces import BLOCK_BYTES
from adapterkit.merging.run_options import RunOptions

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention

MIN_QUANTIZED_RETENTION = 0.5  # of an update in a quantized output
LOW_RETENTION = 0.9  # below, warn that rounding loses a tenth of the update or more
NO_RETENTION = 0.1  # below, warn that rounding loses nearly all of it
TORCH_BYTES = 230 << 20  # resident memory of an imported torch


def default_threads() -> int:
    """One thread per usable core, at most 8: beyond that the disk is the bottleneck."""
    return min(8, os_calls.usable_cpus())


def estimate_memory(plan: MergePlan, threads: int) -> int:
    """Estimate the peak resident memory: torch, the blocks of each worker, and the factors in flight."""
    factors = sorted(
        sum(4 * d.weights.rank * (d.weights.in_features + d.weights.out_features) for d in edit.deltas)
        for file in plan.files
        for edit in file.edits
    )
    merges = list(plan.merges)
    blocks = 3  # the input, and two outputs
    if any(isinstance(edit.source, QuantizedWeight) or edit.checked_against or edit.as_trained for edit in merges):
        blocks += 4  # packed bytes as indices, as float32, and rounded
    if any(edit.packing and edit.packing.rounding.kind == "compensated" for edit in merges):
        blocks += 5
    stacked = any(delta.weights.experts > 1 for file in plan.files for edit in file.edits for delta in edit.deltas)
    return TORCH_BYTES + threads * blocks * BLOCK_BYTES + 2 * sum(factors[-threads:]) + stacked * STACK_BYTES


def check_device(plan: MergePlan, options: RunOptions) -> None:
    """Raise UsageError if the requested GPU does not exist."""
    if options.device.startswith("cuda"):
        from adapterkit.merging.blocks.device import choose

        choose(options.device, plan, options.threads or default_threads())


def check_space(plan: MergePlan, link: bool) -> None:
    """Raise NoSpaceError if the output does not fit on the disk; with `link`, unchanged files take no space."""
    folder = plan.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    disk, device = shutil.disk_usage(folder), folder.stat().st_dev
    linked = [file for file in plan.files if link and is_copy(file) and file.source.stat().st_dev == device]
    needed = plan.bytes_to_write - sum(file.size for file in linked)
    if disk.total and needed > disk.free:  # some file systems report no size
        raise NoSpaceError(f"{plan.out}: needs {needed / 1e9:.2f} GB, the disk has {disk.free / 1e9:.2f} GB free")


def check_loss(plan: MergePlan, retention: dict[str, Retention]) -> None:
    """Raise LossError if quantization erases more than half of the update."""
    quantized = {edit.name for edit in plan.merges if edit.packing and edit.deltas}
    measured = [one for name, one in retention.items() if name in quantized]
    if not measured:
        return
    total = measured[0]
    for one in measured[1:]:
        total += one
    if total.retained < MIN_QUANTIZED_RETENTION:
        raise LossError(
            f"{plan.out}: quantization would keep only {total.retained:.1%} of the update; nothing was written",
            hint="omit `quantize` to write 16 bits, or give `accept_loss=True`",
        )


def warnings_of(plan: MergePlan, retention: dict[str, Retention], unchanged: Sequence[str]) -> tuple[str, ...]:
    """Warn about `unchanged` tensors, which equal the base's, and about updates lost to rounding."""
    from adapterkit.algebra.updates import Retention

    changes = sum(edit.changes for edit in plan.merges)
    scheme = next(iter(plan.schemes), None)
    dtype, instead = (scheme, "16 bits retain it") if scheme else ("the output dtype", "`dtype='fp32'` retains it")
    low = {name: one for name, one in retention.items() if one.retained < LOW_RETENTION}
    found = []
    if unchanged:
        why = f" or too small for {dtype}" if any(name in low for name in unchanged) else "; is B, alpha or a weight 0?"
        found.append(
            f"{len(unchanged)} of {changes} merged tensors equal the base's (first: {unchanged[0]}): "
            f"the update is zero{why}"
        )
        low = {name: one for name, one in low.items() if name not in unchanged}
    if low:
        total = sum(retention.values(), Retention())
        worst = min(low, key=lambda name: low[name].retained)
        share = "nearly all" if total.retained < NO_RETENTION else "a tenth or more"
        found.append(
            f"rounding to {dtype} loses {share} of the update in {len(low)} of {len(retention)} tensors (worst: "
            f"{low[worst].retained:.0%} retained in {worst}; {total.retained:.0%} in total); {instead}"
        )
    return tuple(found)
