"""Inspect, merge, combine and convert LoRA adapters, exactly and in a stream, and undo merges bit for bit.

`load` reads the headers of an adapter; its weights are read on access:

>>> import adapterkit
>>> adapter = adapterkit.load("adapter")
>>> adapter
<Adapter: LoRA, rank 4, 4 modules, 1,280 parameters>
>>> adapter["model.layers.0.self_attn.q_proj"].A.shape
torch.Size([4, 32])

Merge it into a base, and undo the merge:

>>> adapterkit.merge("base", adapter, "merged")
<Merged: merged, 4 tensors computed, 13.2 kB>
>>> adapterkit.unmerge("merged", "restored", adapters=adapter)
<Merged: restored, 4 tensors computed, 13.2 kB>

Each verb has a plan, made from headers only. A plan prints what it will do, and runs as a stream of events:

>>> plan = adapterkit.plan_combine(["adapter", ("other", 0.5)], "sum", method="svd", rank=4)
>>> plan
<AdapterPlan: combined by svd to rank 4 → sum, 4 modules to make>
>>> *events, made = adapterkit.run(plan)
>>> len(events), round(made.error, 3)
(4, 0.0)

`progress=True` draws a bar. Every error is an `AdapterkitError`, and Python's own exception if there is one:

>>> adapterkit.load("nowhere")
Traceback (most recent call last):
adapterkit.errors.MissingFileError: nowhere: no such file or directory
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # importing typing would take as long as everything else before ctrl-C is handled
if TYPE_CHECKING:
    from typing import Any

    from adapterkit.adapter.formats import load, save
    from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
    from adapterkit.api.adapters import (
        combine,
        compare,
        convert,
        extract,
        plan_combine,
        plan_convert,
        plan_extract,
        plan_resize,
        resize,
    )
    from adapterkit.api.evaluate import Evaluated, evaluate
    from adapterkit.api.hub import plan_pull, plan_push, pull, push
    from adapterkit.api.inspect import inspect, list_adapters
    from adapterkit.api.merge import merge, plan_merge, plan_quantize, quantize, verify
    from adapterkit.api.run import run
    from adapterkit.api.unmerge import plan_unmerge, unmerge
    from adapterkit.api.unmerge_steps import StepStarted, UnmergePlan
    from adapterkit.combining.plan import AdapterMade, AdapterPlan, ModuleDone
    from adapterkit.errors import AdapterkitError
    from adapterkit.hub.events import BytesDone, Fetched, Pulled, Pushed
    from adapterkit.hub.pull import PullPlan
    from adapterkit.hub.upload.push import PushPlan
    from adapterkit.inspection.report import AdapterReport, BaseReport
    from adapterkit.merging.live.apply import apply, remove
    from adapterkit.merging.plan.types import MergePlan
    from adapterkit.merging.run.finish import Merged, finish
    from adapterkit.merging.run.run import TensorMerged, run_file
    from adapterkit.merging.run_options import RunOptions

# Name -> module; imported on first use, so that `adapterkit --help` stays fast.
_EXPORTS = {
    "Adapter": "adapter.weights", "LazyTensor": "adapter.weights", "LoraWeights": "adapter.weights",
    "AdapterkitError": "errors", "MergePlan": "merging.plan.types", "RunOptions": "merging.run_options",
    **dict.fromkeys(("load", "save"), "adapter.formats"),
    "run": "api.run",
    **dict.fromkeys(("run_file", "TensorMerged"), "merging.run.run"),
    **dict.fromkeys(("finish", "Merged"), "merging.run.finish"),
    **dict.fromkeys(("AdapterMade", "AdapterPlan", "ModuleDone"), "combining.plan"),
    **dict.fromkeys(("merge", "plan_merge", "plan_quantize", "quantize", "verify"), "api.merge"),
    **dict.fromkeys(("StepStarted", "UnmergePlan"), "api.unmerge_steps"),
    **dict.fromkeys(("plan_unmerge", "unmerge"), "api.unmerge"),
    **dict.fromkeys(("combine", "compare", "convert", "extract", "resize"), "api.adapters"),
    **dict.fromkeys(("plan_combine", "plan_convert", "plan_extract", "plan_resize"), "api.adapters"),
    **dict.fromkeys(("apply", "remove"), "merging.live.apply"),
    **dict.fromkeys(("plan_pull", "plan_push", "pull", "push"), "api.hub"),
    **dict.fromkeys(("BytesDone", "Fetched", "Pulled", "Pushed"), "hub.events"),
    **dict.fromkeys(("inspect", "list_adapters"), "api.inspect"),
    **dict.fromkeys(("AdapterReport", "BaseReport"), "inspection.report"),
    **dict.fromkeys(("Evaluated", "evaluate"), "api.evaluate"),
    "PullPlan": "hub.pull", "PushPlan": "hub.upload.push",
}  # fmt: skip

__all__ = [
    "Adapter", "AdapterMade", "AdapterPlan", "AdapterReport", "AdapterkitError", "BaseReport", "BytesDone", "Evaluated",
    "Fetched", "LazyTensor", "LoraWeights", "MergePlan", "Merged", "ModuleDone", "PullPlan", "Pulled", "PushPlan",
    "Pushed", "RunOptions", "StepStarted", "TensorMerged", "UnmergePlan", "__version__", "apply", "combine", "compare",
    "convert", "evaluate", "extract", "finish", "inspect", "list_adapters", "load", "merge", "plan_combine",
    "plan_convert", "plan_extract", "plan_merge", "plan_pull", "plan_push", "plan_quantize", "plan_resize",
    "plan_unmerge", "pull", "push", "quantize", "remove", "resize", "run", "run_file", "save", "unmerge", "verify",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"adapterkit.{_EXPORTS[name]}"), name)
