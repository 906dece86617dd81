"""What a plan takes and what it may cost: threads, memory, a device, room on the disk, and how much of the update."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.base.quant import QuantizedWeight
from adapterkit.errors import LossError, NoSpaceError
from adapterkit.files import system
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.run.hashing import is_copy
from adapterkit.merging.run.pieces import BLOCK_BYTES

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention

ENOUGH_LEFT = 0.5  # of an update, in a quantized output
ENOUGH_KEPT = 0.9  # below, rounding swallows a tenth of the update or more
HARDLY_ANY = 0.1
TORCH_BYTES = 230 << 20  # what importing torch itself takes, for the estimate


def default_threads() -> int:
    """As many as this process may use, up to 8: beyond that the disk is the limit."""
    return min(8, system.usable_cpus())


def estimate_memory(plan: MergePlan, threads: int) -> int:
    """The peak resident bytes to expect: torch, a worker's blocks, and the factors in flight; not the model's size."""
    factors = sorted(
        sum(4 * d.weights.rank * (d.weights.in_features + d.weights.out_features) for d in edit.deltas)
        for file in plan.files
        for edit in file.edits
    )
    merges = list(plan.merges)
    blocks = 3  # the input, and two outputs
    if any(isinstance(edit.source, QuantizedWeight) or edit.checked_against for edit in merges):
        blocks += 4  # its numbers as indices, as float32, and rounded
    if any(edit.packing and edit.packing.rounding.kind == "compensated" for edit in merges):
        blocks += 5
    return TORCH_BYTES + threads * blocks * BLOCK_BYTES + 2 * sum(factors[-threads:])


def check_device(plan: MergePlan, options: RunOptions) -> None:
    """Raise UsageError where the options name a GPU that is not there."""
    if options.device.startswith("cuda"):
        from adapterkit.merging.blocks.device import choose

        choose(options.device, plan, options.threads or default_threads())


def check_space(plan: MergePlan, link: bool) -> None:
    """Raise NoSpaceError where the output would not fit the disk; with `link`, unchanged files take no room there."""
    folder = plan.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    disk, device = shutil.disk_usage(folder), folder.stat().st_dev
    linked = [file for file in plan.files if link and is_copy(file) and file.source.stat().st_dev == device]
    needed = plan.bytes_to_write - sum(file.size for file in linked)
    if disk.total and needed > disk.free:  # some file systems do not say
        raise NoSpaceError(f"{plan.out}: needs {needed / 1e9:.2f} GB, the disk has {disk.free / 1e9:.2f} GB free")


def check_loss(plan: MergePlan, retention: dict[str, Retention]) -> None:
    """Raise LossError for a quantized output in which little of the update is left."""
    quantized = {edit.name for edit in plan.merges if edit.packing and edit.deltas}
    measured = [kept for name, kept in retention.items() if name in quantized]
    if not measured:
        return
    total = measured[0]
    for kept in measured[1:]:
        total += kept
    if total.kept < ENOUGH_LEFT:
        raise LossError(
            f"{plan.out}: quantization would keep only {total.kept:.1%} of the update; nothing was written",
            hint="omit `quantize` for 16 bits, or say `accept_loss=True`",
        )


def warnings_of(plan: MergePlan, retention: dict[str, Retention], unchanged: Sequence[str]) -> tuple[str, ...]:
    """What to warn of: `unchanged` tensors, which came out as the base has them, and updates that rounding swallows."""
    from adapterkit.algebra.updates import Retention

    changes = sum(edit.changes for edit in plan.merges)
    scheme = next(iter(plan.schemes), None)
    what, instead = (scheme, "16 bits keep it") if scheme else ("the output dtype", "`dtype='fp32'` keeps it")
    low = {name: kept for name, kept in retention.items() if kept.kept < ENOUGH_KEPT}
    found = []
    if unchanged:
        which = "all tensors" if len(unchanged) == changes else f"{len(unchanged)} of {changes} tensors"
        why = f", or too small for {what}" if any(name in low for name in unchanged) else ". Is B, alpha or a weight 0?"
        found.append(
            f"{which} that the adapters change come out as in the base (first: {unchanged[0]}): the update is zero{why}"
        )
        low = {name: kept for name, kept in low.items() if name not in unchanged}
    if low:
        total = sum(retention.values(), Retention())
        worst = min(low, key=lambda name: low[name].kept)
        share = "nearly all" if total.kept < HARDLY_ANY else "a tenth or more"
        found.append(
            f"{what} swallows {share} of the update in {len(low)} of {len(retention)} tensors (worst: {worst} keeps "
            f"{low[worst].kept:.0%}, all together {total.kept:.0%}); {instead}"
        )
    return tuple(found)
