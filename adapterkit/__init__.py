"""adapterkit: inspect LoRA adapters and merge them into base weights, exactly and streaming."""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = (
    False  # as `typing` has it, which takes as long to import as all else that comes before ctrl-C is handled
)
if TYPE_CHECKING:
    from typing import Any

    from adapterkit.adapter import Adapter, LazyTensor, LoraWeights
    from adapterkit.adapters import combine, compare, convert, extract, resize
    from adapterkit.api import merge, plan_merge, plan_quantize, quantize, verify
    from adapterkit.errors import AdapterkitError
    from adapterkit.formats import load, save
    from adapterkit.live import apply, remove
    from adapterkit.plan import MergePlan
    from adapterkit.restoring import plan_unmerge, unmerge
    from adapterkit.stream import Merged, TensorMerged, run

# Name -> module; imported on first use, so that `adapterkit --help` stays fast.
_EXPORTS = {
    "Adapter": "adapter", "LazyTensor": "adapter", "LoraWeights": "adapter", "AdapterkitError": "errors",
    "load": "formats", "save": "formats", "merge": "api", "plan_merge": "api", "plan_quantize": "api",
    "quantize": "api", "run": "stream", "Merged": "stream", "TensorMerged": "stream", "MergePlan": "plan",
    "apply": "live", "remove": "live", "verify": "api", "plan_unmerge": "restoring", "unmerge": "restoring",
    **dict.fromkeys(("combine", "compare", "convert", "extract", "resize"), "adapters"),
}  # fmt: skip

__all__ = [
    "Adapter", "AdapterkitError", "LazyTensor", "LoraWeights", "MergePlan", "Merged", "TensorMerged", "__version__",
    "apply", "combine", "compare", "convert", "extract", "load", "merge", "plan_merge", "plan_quantize", "plan_unmerge",
    "quantize", "remove", "resize", "run", "save", "unmerge", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"adapterkit.{_EXPORTS[name]}"), name)
