"""What `import adapterkit` offers: plan a merge, run it step by step or in one call.

>>> plan = adapterkit.plan_merge("base", ["adapter", ("other", 0.3)], "out")  # headers only; raises if it cannot work
>>> for event in adapterkit.run(plan): ...  # TensorMerged …, then Merged
>>> adapterkit.merge("base", ["adapter"], "out").bytes_written  # the same in one call
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.api.inputs import AnyPath, number, open_adapters, open_base, renaming, weighted
from adapterkit.api.options.merges import (
    MergeCall,
    MergeOptions,
    QuantizeCall,
    QuantizeOptions,
    QuantizingOptions,
    VerifyOptions,
)
from adapterkit.api.progress import downloads_shown, progress_bar
from adapterkit.api.run import in_one_call
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizationSettings, Rounding, checked
from adapterkit.errors import UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub import hub_repo, locate_all, resolve
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.planner import make_plan
from adapterkit.merging.plan.planner import plan_quantize as make_quantize_plan
from adapterkit.merging.plan.types import MergePlan, inputs_of
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.finish import Merged
from adapterkit.options import takes

if TYPE_CHECKING:
    from adapterkit.merging.verify import Verdict


@takes(MergeOptions)
def plan_merge(o: MergeOptions) -> MergePlan:
    """Plan `base + scale · Σ weight · Δ`, from headers only; nothing is written.

    `base` is a directory, a `.safetensors` or a Hub id; an adapter is a path, a Hub id or an opened `Adapter`,
    alone or with its weight; several are a sequence of these, or a mapping of paths to weights. Without `out`,
    `<base>-merged` beside the base (a Hub id: in the current directory). `dtype` is bf16, fp16 or fp32; by default
    every tensor keeps its own. A quantized base is dequantized, unless `quantize` is a kind to write, or same.
    `rounding` is nearest, stochastic (by `seed`) or compensated (`quant.rounding`), the last also by `calibration`, a
    text file over which running the plan first runs the base. `original` is the 16-bit model that a quantized base was
    made from, to be checked and merged into. What is on the Hub is downloaded once its headers fit; without `download`
    the plan made from them is returned, to be looked at and not run. How to run it is for `RunOptions` to say. Raises
    what is listed in `adapterkit.errors`.
    """
    if o.quantize is not None and o.dtype is not None:
        raise UsageError("a quantized output has the dtypes of its scheme: give dtype or quantize, not both")
    _check_rounding(o, o.quantize is not None)
    named, rename = weighted(o.adapters), renaming(o.rename)

    def made(where: Callable[[AnyPath], Path]) -> MergePlan:
        checkpoint = open_base(o.base, where, hint="the base comes first, its adapters follow")
        given = open_adapters(named, o.scale, o.alpha, o.scaling, where)
        sixteen = None if o.original is None else open_base(o.original, where)
        into = (sixteen, o.original) if sixteen and o.original is not None else (checkpoint, o.base)
        target = Path(o.out).expanduser() if o.out is not None else _default_output(*into, "merged")
        plan = make_plan(
            checkpoint, given, target, dtype=None if o.dtype is None else str(o.dtype),
            quantize=o.quantize, rounding=Rounding(o.rounding, o.seed), original=sixteen, rename=rename,
            allow_partial=o.allow_partial, calibration=_text(o),
        )  # fmt: skip
        return _placed(plan, o.overwrite, checkpoint)

    specs = [o.base, *(what for what, _ in named), o.original]
    with _gc_paused(), locate_all([spec for spec in specs if isinstance(spec, str | os.PathLike)]) as places:
        plan = made(places.path_of)
        if not (places.headers_only and o.download):
            return plan
    with _gc_paused():
        return made(resolve)


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would traverse a large plan's millions of objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@takes(MergeCall)
def merge(o: MergeCall) -> Merged:
    """Merge in one call: `plan_merge`, then `run` to its end."""
    return in_one_call(plan_merge.of, o, Merged, o.how)


@takes(VerifyOptions)
def verify(o: VerifyOptions) -> Iterator[Verdict]:
    """Whether `merged` is `base` with the weighted `adapters` in it: a verdict for each tensor; see `merging.verify`.

    `sample` is the share of the rows that is looked at. Raises FitError where it is another model's checkpoint.
    """
    if not 0 < number(o.sample, "sample") <= 1:
        raise UsageError(f"sample {o.sample}: expected a share above 0 and up to 1")
    from adapterkit.merging.verify import verify as run_verify

    with downloads_shown(o.progress):
        checkpoint, there = open_base(o.base), open_base(o.merged)
        given = open_adapters(o.adapters, o.scale)
    check_cached(shard.file for model in (checkpoint, there) for shard in model.shards)
    check_cached(file for one in given for file in one.adapter.files)
    plan = make_plan(checkpoint, given, Path("never written"), rename=renaming(o.rename))

    def verdicts() -> Iterator[Verdict]:
        with progress_bar("verifying", "tensors", o.progress) as show:
            yield from run_verify(plan, there, share=o.sample, threads=o.threads or default_threads(), on_tensor=show)

    return verdicts()


@takes(QuantizeOptions)
def plan_quantize(o: QuantizeOptions) -> MergePlan:
    """Plan `base` with its linear layers quantized to a kind of `quant.writable_kinds`, as transformers loads them.

    `blocksize` and `nested` (double quantization) are for kinds that have blocks. Without `out`, `<base>-<to>` beside
    the base.
    """
    how = checked(QuantizationSettings(o.to, o.blocksize, o.nested, Rounding(o.rounding, o.seed)))
    _check_rounding(o, True)
    checkpoint = open_base(o.base)
    target = Path(o.out).expanduser() if o.out is not None else _default_output(checkpoint, o.base, o.to)
    return _placed(make_quantize_plan(checkpoint, how, target, _text(o)), o.overwrite, checkpoint)


@takes(QuantizeCall)
def quantize(o: QuantizeCall) -> Merged:
    """Quantize in one call: `plan_quantize`, then `run` to its end."""
    return in_one_call(plan_quantize.of, o, Merged, RunOptions(o.threads, str(o.device)))


def _check_rounding(o: QuantizingOptions, quantized: bool) -> None:
    if o.rounding != "nearest" and not quantized:
        raise UsageError(f"`rounding={o.rounding}` needs a quantized output", hint="give `quantize`")
    if type(o.seed) is not int or not 0 <= o.seed < 2**63:
        raise UsageError(f"seed {o.seed!r}: expected a whole number from 0 to 2^63 - 1")
    if o.seed and o.rounding != "stochastic":
        raise UsageError("only stochastic rounding has a seed")


def _text(o: QuantizingOptions) -> Path | None:
    if o.calibration is None:
        return None
    if o.rounding != "compensated":
        raise UsageError("a calibration text is for compensated rounding")
    path = Path(o.calibration).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: expected a text file to calibrate with")
    return path


def _default_output(checkpoint: Checkpoint, base: AnyPath, what: str) -> Path:
    if hub_repo(base):
        return Path(f"{checkpoint.name.rpartition('/')[2]}-{what}")
    path = checkpoint.path.absolute()
    return path.with_name(f"{path.stem}-{what}.safetensors" if path.is_file() else f"{path.name}-{what}")


def _placed(plan: MergePlan, overwrite: bool, base: Checkpoint) -> MergePlan:
    """The plan, once its output may be written; with an original, the quantized `base` is read too."""
    text = (plan.calibration,) if plan.calibration else ()
    plan = replace(plan, overwrite=overwrite, also_read=(*inputs_of(base), *text))
    plan.destination(receipt=False).check()
    return plan
