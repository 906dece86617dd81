"""What `import adapterkit` offers: plan a merge, run it step by step or in one call.

>>> plan = adapterkit.plan_merge("base", ["adapter", ("other", 0.3)], "out")  # headers only; raises if it cannot work
>>> for event in adapterkit.run(plan): ...  # TensorMerged …, then Merged
>>> adapterkit.merge("base", ["adapter"], "out").bytes_written  # the same in one call
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.api.inputs import AnyAdapters, AnyPath, number, open_adapters, open_base, renaming, weighted
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import (
    DEFAULT_BLOCKSIZE,
    ROUNDINGS,
    QuantizationSettings,
    Rounding,
    checked,
    writable_kinds,
)
from adapterkit.errors import UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub import hub_id, outlines, resolve
from adapterkit.merging.plan.planner import DTYPES, make_plan
from adapterkit.merging.plan.planner import plan_quantize as make_quantize_plan
from adapterkit.merging.plan.types import MergePlan, inputs_of
from adapterkit.merging.receipts.receipt import check_receipt
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.scheduler import Merged, run

if TYPE_CHECKING:
    import torch

    from adapterkit.merging.verify import Verdict


def plan_merge(
    base: AnyPath,
    adapters: AnyAdapters,
    out: AnyPath | None = None,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    scaling: float | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    calibration: AnyPath | None = None,
    original: AnyPath | None = None,
    accept_loss: bool = False,
    rename: tuple[str, str] | str | None = None,
    allow_partial: bool = False,
    receipt: bool = True,
    link: bool = False,
    overwrite: bool = False,
    download: bool = True,
) -> MergePlan:
    """Plan `base + scale · Σ weight · Δ`, from headers only; nothing is written.

    `base` is a directory, a `.safetensors` or a Hub id; an adapter is a path, a Hub id or an opened `Adapter`,
    alone or with its weight; several are a sequence of these, or a mapping of paths to weights. Without `out`,
    `<base>-merged` beside the base (a Hub id: in the current directory). `dtype` is bf16, fp16 or fp32; by default
    every tensor keeps its own. A quantized base is dequantized, unless `quantize` is a kind to write, or same; where
    that keeps less than half of the update, running the plan raises LossError unless `accept_loss`. `rounding` is
    nearest, stochastic (by `seed`) or compensated (`quant.rounding`), the last also by `calibration`, a text file
    over which running the plan first runs the base. `original` is the 16-bit model that a quantized base was made
    from, to be checked and merged into. With a `receipt` the merge can be undone bit for bit, see `unmerge`. `link`
    has files that stay as they are share their bytes with the base's, where the file system can. What is on the Hub
    is downloaded once its headers fit; without `download` the plan made from them is returned, to be looked at and
    not run. Raises what is listed in `adapterkit.errors`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in (kinds := (*writable_kinds(), "same")):
        raise UsageError(f"quantize {quantize!r}: expected one of {', '.join(kinds)}")
    if quantize is not None and dtype is not None:
        raise UsageError("a quantized output has the dtypes of its scheme: give dtype or quantize, not both")
    _check_rounding(rounding, seed, quantize is not None)
    named, rename = weighted(adapters), renaming(rename)
    if accept_loss and quantize is None:
        raise UsageError("only a quantized output can lose an update: accept_loss goes with quantize")

    def made(where: Callable[[AnyPath], Path]) -> MergePlan:
        checkpoint = open_base(base, where)
        given = open_adapters(named, scale, alpha, scaling, where)
        sixteen = None if original is None else open_base(original, where)
        into = (sixteen, original) if sixteen and original is not None else (checkpoint, base)
        target = Path(out).expanduser() if out is not None else _default_output(*into, "merged")
        plan = make_plan(
            checkpoint, given, target, dtype=dtype, quantize=quantize, rounding=Rounding(rounding, seed),
            original=sixteen, accept_loss=accept_loss, rename=rename, allow_partial=allow_partial,
            calibration=_text(calibration, rounding), receipt=receipt, link=link,
        )  # fmt: skip
        if receipt:
            check_receipt(plan)
        return _placed(plan, overwrite, checkpoint)

    places = [base, *(what for what, _ in named), original]
    with outlines([one for one in places if isinstance(one, str | os.PathLike)]) as where:
        if where is not None:
            plan = made(where)
            if not download:
                return plan
    return made(resolve)


def merge(
    base: AnyPath,
    adapters: AnyAdapters,
    out: AnyPath | None = None,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    scaling: float | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    calibration: AnyPath | None = None,
    original: AnyPath | None = None,
    accept_loss: bool = False,
    rename: tuple[str, str] | str | None = None,
    allow_partial: bool = False,
    receipt: bool = True,
    link: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    report: bool = False,
    device: str | torch.device = "auto",
    resume: bool = False,
) -> Merged:
    """Merge in one call: `plan_merge`, then `run` to its end."""
    plan = plan_merge(
        base, adapters, out, scale=scale, alpha=alpha, scaling=scaling, dtype=dtype, quantize=quantize,
        rounding=rounding, seed=seed, calibration=calibration, original=original, accept_loss=accept_loss,
        rename=rename, allow_partial=allow_partial, receipt=receipt, link=link, overwrite=overwrite,
    )  # fmt: skip
    *_, result = run(plan, threads=threads, report=report, device=device, resume=resume)
    assert isinstance(result, Merged)
    return result


def verify(
    merged: AnyPath,
    base: AnyPath,
    adapters: AnyAdapters,
    *,
    scale: float = 1.0,
    sample: float = 1.0,
    rename: tuple[str, str] | str | None = None,
    threads: int | None = None,
) -> Iterator[Verdict]:
    """Whether `merged` is `base` with the weighted `adapters` in it: a verdict for each tensor; see `merging.verify`.

    `sample` is the share of the rows that is looked at. Raises FitError where it is another model's checkpoint.
    """
    if not 0 < number(sample, "sample") <= 1:
        raise UsageError(f"sample {sample}: expected a share above 0 and up to 1")
    from adapterkit.merging.verify import verify as run_verify

    checkpoint, there = open_base(base), open_base(merged)
    given = open_adapters(adapters, scale)
    check_cached(shard.file for model in (checkpoint, there) for shard in model.shards)
    check_cached(file for one in given for file in one.adapter.files)
    plan = make_plan(checkpoint, given, Path("never written"), rename=renaming(rename))
    return run_verify(plan, there, share=sample, threads=threads or default_threads())


def plan_quantize(
    base: AnyPath,
    out: AnyPath | None = None,
    *,
    to: str,
    blocksize: int = DEFAULT_BLOCKSIZE,
    nested: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    calibration: AnyPath | None = None,
    overwrite: bool = False,
) -> MergePlan:
    """Plan `base` with its linear layers quantized to a kind of `quant.writable_kinds`, as transformers loads them.

    `blocksize` and `nested` (double quantization) are for kinds that have blocks. Without `out`, `<base>-<to>` beside
    the base.
    """
    how = checked(QuantizationSettings(to, blocksize, nested, Rounding(rounding, seed)))
    _check_rounding(rounding, seed, True)
    checkpoint = open_base(base)
    target = Path(out).expanduser() if out is not None else _default_output(checkpoint, base, to)
    return _placed(make_quantize_plan(checkpoint, how, target, _text(calibration, rounding)), overwrite, checkpoint)


def quantize(
    base: AnyPath,
    out: AnyPath | None = None,
    *,
    to: str,
    blocksize: int = DEFAULT_BLOCKSIZE,
    nested: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    calibration: AnyPath | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    device: str | torch.device = "auto",
) -> Merged:
    """Quantize in one call: `plan_quantize`, then `run` to its end."""
    plan = plan_quantize(
        base, out, to=to, blocksize=blocksize, nested=nested, rounding=rounding, seed=seed, calibration=calibration,
        overwrite=overwrite,
    )  # fmt: skip
    *_, result = run(plan, threads=threads, device=device)
    assert isinstance(result, Merged)
    return result


def _check_rounding(rounding: str, seed: int, quantized: bool) -> None:
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}")
    if rounding != "nearest" and not quantized:
        raise UsageError(
            "only a quantized output can be rounded otherwise than to the nearest: rounding goes with quantize"
        )
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed!r}: expected a whole number from 0 to 2^63 - 1")
    if seed and rounding != "stochastic":
        raise UsageError("only stochastic rounding has a seed")


def _text(calibration: AnyPath | None, rounding: str) -> Path | None:
    if calibration is None:
        return None
    if rounding != "compensated":
        raise UsageError("a calibration text is for compensated rounding")
    path = Path(calibration).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: expected a text file to calibrate with")
    return path


def _default_output(checkpoint: Checkpoint, base: AnyPath, what: str) -> Path:
    if hub_id(base):
        return Path(f"{checkpoint.name.rpartition('/')[2]}-{what}")
    path = checkpoint.path.absolute()
    return path.with_name(f"{path.stem}-{what}.safetensors" if path.is_file() else f"{path.name}-{what}")


def _placed(plan: MergePlan, overwrite: bool, base: Checkpoint) -> MergePlan:
    """The plan, once its output may be written; with an original, the quantized `base` is read too."""
    text = (plan.calibration,) if plan.calibration else ()
    plan = replace(plan, overwrite=overwrite, also_read=(*inputs_of(base), *text))
    plan.destination.check()
    return plan
