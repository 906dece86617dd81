"""Options of merge, unmerge, verify and quantize."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass
from typing import TYPE_CHECKING

from adapterkit.adapter.weights import ORIENTATIONS
from adapterkit.api.options.adapters import ADAPTERS, WeightsOptions
from adapterkit.api.options.progress import ProgressOptions
from adapterkit.base.quant import DEFAULT_BLOCKSIZE, ROUNDINGS, blocksizes, training_kinds, writable_kinds
from adapterkit.errors import UsageError
from adapterkit.files.safetensors import DTYPE_SPELLINGS, OUTPUT_DTYPES
from adapterkit.merging.plan.tokenizers import TOKENIZERS
from adapterkit.merging.run_options import RunOptions
from adapterkit.options import Options, argument, option, output, overwrite, threads

if TYPE_CHECKING:
    import torch

    from adapterkit.api.inputs import AnyAdapters, AnyModel, AnyPath

QUANTIZATION = "Quantization"


@dataclass(frozen=True)
class DeviceOptions(Options):
    """How a merge is computed"""

    _: KW_ONLY
    device: str | torch.device = option(
        "auto", "Device: cpu, cuda, cuda:N, or auto (a GPU if it is faster)",
        metavar="DEVICE", in_form=False,
    )  # fmt: skip
    threads: int | None = threads()


@dataclass(frozen=True)
class QuantizingOptions(Options):
    """How an output is quantized"""

    _: KW_ONLY
    rounding: str = option(
        "nearest", "Rounding mode for quantized weights", ROUNDINGS, group=QUANTIZATION, in_form=False
    )
    seed: int = option(0, "Random seed for stochastic rounding", group=QUANTIZATION, in_form=False)
    calibration: AnyPath | None = option(
        None, "Calibration text for compensated (GPTQ) rounding", metavar="TEXT", group=QUANTIZATION, in_form=False
    )


@dataclass(frozen=True)
class OrientationOptions(WeightsOptions):
    """How adapters of stacked experts are read"""

    _: KW_ONLY
    orientation: str | None = option(
        None, "Add Δ of stacked experts plain or transposed, where it is square [default: by the adapter and the base]",
        ORIENTATIONS, group=ADAPTERS, in_form=False,
    )  # fmt: skip


@dataclass(frozen=True)
class MergedOptions(OrientationOptions):
    """Strength and names of merged adapters, and what they are merged onto"""

    _: KW_ONLY
    as_trained: str | None = option(
        None, "Merge onto `base` as quantized to this kind for training (QLoRA)", training_kinds, group=QUANTIZATION,
        in_form=False,
    )  # fmt: skip
    scale: float = option(1.0, "Multiply every adapter's strength", group=ADAPTERS, in_form=False)
    rename: str | tuple[str, str] | None = option(
        None, "Rename parts of the adapter's module names",
        meaning="Rename parts of the adapter's module names: (old, new)",
        flags=("--map",), metavar="OLD=NEW", group=ADAPTERS, in_form=False,
    )  # fmt: skip


@dataclass(frozen=True)
class MergeOptions(MergedOptions, QuantizingOptions):
    """Adapters into a base"""

    base: AnyModel | None = argument(
        "Base model: a directory, a .safetensors file or a Hub id [default: the base that the adapters name]", None,
        hint=lambda: "the base that the adapter names",
    )  # fmt: skip
    adapters: AnyAdapters = argument("Adapters, each with its weight", (), metavar="ADAPTER[:WEIGHT]...", asked=True)
    out: AnyPath | None = output(None, "Output directory or file [default: `base`-merged beside the base]", asked=True)
    _: KW_ONLY
    alpha: float | None = option(
        None, "Alpha of an adapter without a config (scaling = alpha / rank)", group=ADAPTERS, in_form=False
    )
    scaling: float | None = option(None, "Scaling of an adapter without a config", group=ADAPTERS, in_form=False)
    allow_partial: bool = option(False, "Skip modules that don't exist in the base", group=ADAPTERS, in_form=False)
    dtype: str | torch.dtype | None = option(
        None, "Dtype of the output [default: as in the base]", OUTPUT_DTYPES, spellings=DTYPE_SPELLINGS, group="Output"
    )
    quantize: str | None = option(
        None, "Quantize the output [default: unquantized]", lambda: (*writable_kinds(), "same"), group=QUANTIZATION
    )
    original: AnyModel | None = option(
        None, "Merge into the unquantized model that `base` was made from", metavar="BASE16", group=QUANTIZATION,
        in_form=False,
    )  # fmt: skip
    tokenizer: str | None = option(
        None, "Tokenizer of the output [default: the adapter's, if its folder brings another]", TOKENIZERS,
        group="Output",
    )  # fmt: skip
    overwrite: bool = overwrite()
    download: bool = option(
        True,
        "Download from the Hub once headers match; otherwise the plan cannot be run",
        in_form=False,
        in_cli=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters == () and self.base is not None:  # a single argument is the adapter
            object.__setattr__(self, "adapters", self.base)
            object.__setattr__(self, "base", None)
        if self.adapters == ():
            raise UsageError("no adapter given: nothing to merge", hint="give `adapters`")


@dataclass(frozen=True)
class MergeRunOptions(DeviceOptions):
    """How a merge of adapters is computed"""

    _: KW_ONLY
    report: bool = option(
        False,
        "Measure the share of the update retained, by layer; with `json`, by tensor",
        in_form=False,
        meaning="Measure retention after rounding on all elements, instead of a sample",
    )
    resume: bool = option(False, "Reuse the shards that an interrupted merge finished", in_form=False)
    accept_loss: bool = option(
        False, "Proceed even if quantization erases more than half of the update", group=QUANTIZATION, in_form=False
    )
    receipt: bool = option(
        True,
        "Don't write a receipt (the merge can't be undone without the base)",
        group="Output",
        in_form=False,
        meaning="Write a receipt, by which `unmerge` undoes the merge without the base",
    )
    link: bool = option(
        False, "Let unchanged files share the base's bytes (reflink, hard link)", group="Output", in_form=False
    )


@dataclass(frozen=True)
class MergeCall(ProgressOptions, MergeRunOptions, MergeOptions):
    """Adapters into a base, and how that is computed"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.how.check(quantized=self.quantize is not None, resumable=self.calibration is None)

    @property
    def how(self) -> RunOptions:
        """How the plan is run."""
        return RunOptions(
            self.threads, str(self.device), self.report, self.resume, self.receipt, self.link, self.accept_loss
        )


@dataclass(frozen=True)
class VerifyOptions(ProgressOptions, MergedOptions):
    """A merge checked"""

    merged: AnyModel = argument("Model to check", label="merged model")
    base: AnyModel = argument("Expected base", flags=("--base",), metavar="BASE")
    adapters: AnyAdapters = argument(
        "Expected adapter; can be given several times", flags=("--adapter",),
        metavar="ADAPTER[:WEIGHT]",
    )  # fmt: skip
    _: KW_ONLY
    sample: float = option(1.0, "Check only this fraction of the rows", in_form=False)
    threads: int | None = threads()


@dataclass(frozen=True)
class QuantizeOptions(QuantizingOptions):
    """A base quantized"""

    base: AnyModel = argument("Base model to quantize")
    out: AnyPath | None = output(
        None,
        "Output directory or file [default: BASE-KIND beside the base]",
        asked=True,
        meaning="Output directory or file [default: `base`-`to` beside the base]",
    )
    _: KW_ONLY
    to: str = option(MISSING, "Kind to quantize to", writable_kinds, group=QUANTIZATION)
    blocksize: int = option(
        DEFAULT_BLOCKSIZE,
        "Elements per scale, for kinds with blocks",
        blocksizes,
        group=QUANTIZATION,
        label="block size",
        in_form=False,
    )
    nested: bool = option(False, "Quantize the scales too (double quantization)", group=QUANTIZATION, in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class QuantizeCall(ProgressOptions, DeviceOptions, QuantizeOptions):
    """A base quantized, and how that is computed"""


@dataclass(frozen=True)
class UnmergeOptions(OrientationOptions):
    """A merge undone"""

    merged: AnyModel = argument("Merged model", label="merged model")
    out: AnyPath = output(help="Output directory or file")
    _: KW_ONLY
    adapters: AnyAdapters = option(
        (), "A merged adapter, if it is not found automatically", flags=("--adapter",),
        meaning="The merged adapters, if they are not found by name and SHA-256",
        metavar="ADAPTER[:WEIGHT]",
    )  # fmt: skip
    every: bool = option(False, "Undo all merges, not only the last", flags=("--all",), in_form=False)
    base: AnyModel | None = option(
        None, "Restore from this base, after checking it", metavar="BASE", label="restore from base"
    )
    approximate: bool = option(False, "Subtract the adapters without checking `merged`", in_form=False)


@dataclass(frozen=True)
class UnmergeCall(ProgressOptions, DeviceOptions, UnmergeOptions):
    """A merge undone, and how"""
