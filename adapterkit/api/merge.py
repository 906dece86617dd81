"""The Python calls that merge, verify and quantize.

>>> plan = adapterkit.plan_merge("base", ["adapter", ("other", 0.3)], "out")  # headers only; raises if it cannot work
>>> for event in adapterkit.run(plan): ...  # TensorMerged …, then Merged
>>> adapterkit.merge("adapter", out="out")  # into the base that the adapter names
>>> adapterkit.merge("base", ["adapter"], "out").bytes_written  # the same in one call
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.api.inputs import AnyPath, number, open_adapters, open_base, order_hint, renaming, weighted
from adapterkit.api.named_base import named_base
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
from adapterkit.base.fingerprint import compare_rows
from adapterkit.base.quant import QuantizationSettings, Rounding, checked
from adapterkit.errors import UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub import hub_repo, locate_all, resolve
from adapterkit.hub.locate import Location
from adapterkit.merging.plan.planner import make_plan
from adapterkit.merging.plan.planner import plan_quantize as make_quantize_plan
from adapterkit.merging.plan.tokenizers import BASE as BASE_TOKENIZER
from adapterkit.merging.plan.tokenizers import check_tokens, is_tokenizer_file, with_tokenizer
from adapterkit.merging.plan.types import MergePlan, inputs_of
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run_options import RunOptions
from adapterkit.options import takes

if TYPE_CHECKING:
    from adapterkit.merging.verdict import Verdict

TOKENIZER_LATER = "an adapter has tokenizer files, which are compared with the base's once they are downloaded"


@takes(MergeOptions)
def plan_merge(o: MergeOptions) -> MergePlan:
    """Plan `base + scale · Σ weight · Δ` from headers only; nothing is written.

    Without a `base`, it is the one that the adapters name; a single argument is the adapter. A quantized base is
    dequantized, unless `quantize` is given. Compensated rounding runs the base over the `calibration` text when the
    plan is run.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: Arguments contradict each other.
        MissingFileError: The base or an adapter does not exist.
        FormatError: The base or an adapter is corrupt or unsupported.
        FitError: A module of an adapter is not in the base, or its shape differs.
        OutputExistsError: `out` exists, and is not to be replaced.
        NotAllowedError, OfflineError, NoSpaceError: A download from the Hub failed.
    """
    if o.quantize is not None and o.dtype is not None:
        raise UsageError("`dtype` and `quantize` exclude each other: a quantized output has the dtypes of its scheme")
    if o.as_trained is not None and o.original is not None:
        raise UsageError(
            "`as_trained` and `original` exclude each other: one merges onto quantized weights, the other avoids them",
            hint="give the unquantized model as `base` with `as_trained`",
        )
    _check_rounding(o, o.quantize is not None)
    named, rename = weighted(o.adapters), renaming(o.rename)
    base = o.base if o.base is not None else named_base([what for what, _ in named])

    def made(where: Callable[[AnyPath], Path], read: bool = True) -> MergePlan:
        checkpoint = open_base(base, where, hint=order_hint([what for what, _ in named], where))
        given = open_adapters(named, o.scale, o.alpha, o.scaling, where, o.weights, o.orientation)
        sixteen = None if o.original is None else open_base(o.original, where)
        into = (sixteen, o.original) if sixteen and o.original is not None else (checkpoint, base)
        default = Path(f"{checkpoint.name}-merged") if o.base is None else _default_output(*into, "merged")
        target = Path(o.out).expanduser() if o.out is not None else default
        plan = make_plan(
            checkpoint, given, target, dtype=None if o.dtype is None else str(o.dtype),
            quantize=o.quantize, rounding=Rounding(o.rounding, o.seed), original=sixteen, as_trained=o.as_trained,
            rename=rename,
            allow_partial=o.allow_partial, calibration=_text(o),
        )  # fmt: skip
        if read:
            plan = replace(plan, notes=(*plan.notes, *_other_base(given, plan.base)))
            plan = check_tokens(with_tokenizer(plan, o.tokenizer))
        return _placed(plan, o.overwrite, checkpoint)

    specs = [base, *(what for what, _ in named), o.original]
    with _gc_paused(), locate_all([spec for spec in specs if isinstance(spec, str | os.PathLike)]) as places:
        plan = made(places.path_of, read=not places.headers_only)
        if not (places.headers_only and o.download):
            found = [places.known[str(what)] for what, _ in named if str(what) in places.known]
            later = places.headers_only and o.tokenizer != BASE_TOKENIZER and any(map(_may_bring_tokenizer, found))
            return replace(plan, notes=(*plan.notes, *[TOKENIZER_LATER] * later))
    with _gc_paused():
        return made(resolve)


def _may_bring_tokenizer(place: Location) -> bool:
    """Whether an adapter's folder, here or on the Hub, has files of a tokenizer."""
    here = place.path.iterdir() if place.path.is_dir() else ()
    return any(is_tokenizer_file(name) for name in (*place.absent, *(file.name for file in here)))


def _other_base(given: Sequence[WeightedAdapter], base: Checkpoint) -> Iterator[str]:
    """Yield a note for each adapter that was made for a base with other weights."""
    for one in given:
        if note := compare_rows(one.adapter.base_fingerprint, base).note(base.name):
            yield f"{one.label}: {note}"


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
    """Merge in one call: `plan_merge`, then `run` to its end.

    Returns:
        The output and its hashes, and per tensor the share of the update retained after rounding.

    Raises:
        AdapterkitError: See `plan_merge` and `run`; nothing is left behind.
    """
    return in_one_call(plan_merge.of, o, Merged, o.how)


@takes(VerifyOptions)
def verify(o: VerifyOptions) -> Iterator[Verdict]:
    """Check that `merged` is exactly `base` with the weighted `adapters` merged into it, whichever tool merged them.

    Returns:
        A verdict per tensor, computed as it is asked for: exact, rounded, or the kind of the difference.

    Raises:
        UsageError: `sample` is not above 0 and up to 1.
        FitError: `merged` is a checkpoint of another model.
        ChangedError: A file changed while it was read.
    """
    if not 0 < number(o.sample, "sample") <= 1:
        raise UsageError(f"sample {o.sample}: expected a fraction above 0 and at most 1")
    from adapterkit.merging.verify import verify as run_verify

    with downloads_shown(o.progress):
        checkpoint, there = open_base(o.base), open_base(o.merged)
        given = open_adapters(o.adapters, o.scale, weights=o.weights, orientation=o.orientation)
    check_cached(shard.file for model in (checkpoint, there) for shard in model.shards)
    check_cached(file for one in given for file in one.adapter.files)
    plan = make_plan(checkpoint, given, Path("never written"), as_trained=o.as_trained, rename=renaming(o.rename))

    def verdicts() -> Iterator[Verdict]:
        with progress_bar("verifying", "tensors", o.progress) as show:
            yield from run_verify(plan, there, share=o.sample, threads=o.threads or default_threads(), on_tensor=show)

    return verdicts()


@takes(QuantizeOptions)
def plan_quantize(o: QuantizeOptions) -> MergePlan:
    """Plan to quantize the linear layers of `base`, so that transformers loads the output; nothing is written.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: Arguments contradict each other, or the kind has no such blocks.
        MissingFileError: The base does not exist.
        FitError: A layer cannot be quantized.
        OutputExistsError: `out` exists, and is not to be replaced.
    """
    how = checked(QuantizationSettings(o.to, o.blocksize, o.nested, Rounding(o.rounding, o.seed)))
    _check_rounding(o, True)
    checkpoint = open_base(o.base)
    target = Path(o.out).expanduser() if o.out is not None else _default_output(checkpoint, o.base, o.to)
    return _placed(make_quantize_plan(checkpoint, how, target, _text(o)), o.overwrite, checkpoint)


@takes(QuantizeCall)
def quantize(o: QuantizeCall) -> Merged:
    """Quantize in one call: `plan_quantize`, then `run` to its end.

    Returns:
        The output and its hashes.

    Raises:
        AdapterkitError: See `plan_quantize` and `run`; nothing is left behind.
    """
    return in_one_call(plan_quantize.of, o, Merged, RunOptions(o.threads, str(o.device)))


def _check_rounding(o: QuantizingOptions, quantized: bool) -> None:
    if o.rounding != "nearest" and not quantized:
        raise UsageError(f"`rounding={o.rounding}` needs a quantized output", hint="give `quantize`")
    if type(o.seed) is not int or not 0 <= o.seed < 2**63:
        raise UsageError(f"seed {o.seed!r}: expected a whole number from 0 to 2^63 - 1")
    if o.seed and o.rounding != "stochastic":
        raise UsageError("`seed` needs stochastic rounding")


def _text(o: QuantizingOptions) -> Path | None:
    if o.calibration is None:
        return None
    if o.rounding != "compensated":
        raise UsageError("`calibration` needs compensated rounding")
    path = Path(o.calibration).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: expected a calibration text file")
    return path


def _default_output(checkpoint: Checkpoint, base: AnyPath, what: str) -> Path:
    if hub_repo(base):
        return Path(f"{checkpoint.name.rpartition('/')[2]}-{what}")
    path = checkpoint.path.absolute()
    return path.with_name(f"{path.stem}-{what}.safetensors" if path.is_file() else f"{path.name}-{what}")


def _placed(plan: MergePlan, overwrite: bool, base: Checkpoint) -> MergePlan:
    """The plan with its destination checked; with an original, the quantized `base` counts as an input too."""
    text = (plan.calibration,) if plan.calibration else ()
    plan = replace(plan, overwrite=overwrite, also_read=(*inputs_of(base), *text))
    plan.destination(receipt=False).check()
    return plan
