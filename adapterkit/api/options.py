"""What each verb takes: one table, of which its Python call, its command's options and its form in the app are made"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import TYPE_CHECKING

from adapterkit.api.inputs import AnyAdapter, AnyAdapters, AnyPath
from adapterkit.base.quant import DEFAULT_BLOCKSIZE, ROUNDINGS, blocksizes, writable_kinds
from adapterkit.combining.methods import DEFAULT, METHODS, all_options
from adapterkit.combining.whole_tensors import RULES
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.planner import DTYPES
from adapterkit.options import Options, argument, option, output, overwrite, threads

if TYPE_CHECKING:
    import torch

ADAPTER_KINDS = ("dora", "lora", "rslora")
SIZE = "Size of the result"
ADAPTERS = "Adapters"
QUANTIZATION = "Quantization"
ENERGY = "Truncate each module to the lowest rank that keeps this share of ‖Δ‖²"


@dataclass(frozen=True)
class ProgressOptions(Options):
    """Whether a call shows how far it is"""

    _: KW_ONLY
    progress: bool = option(False, "Draw a progress bar, in a notebook or on stderr", in_form=False, in_cli=False)


@dataclass(frozen=True)
class CombineOptions(Options):
    """Adapters into one"""

    adapters: AnyAdapters = argument("Adapters, each with its weight", metavar="ADAPTER[:WEIGHT]...")
    out: AnyPath = output()
    _: KW_ONLY
    method: str = option(DEFAULT, "Method; see below", METHODS, metavar="METHOD")
    options: Mapping[str, float | str] | None = option(
        None, "Set an option of the method, as in density=0.5", flags=("--set",), example="density=0.5",
        label="method options", hint=lambda: " ".join(map(str, all_options())),
    )  # fmt: skip
    rank: int | None = option(None, "Truncate the result to this rank, optimally", group=SIZE)
    energy: float | None = option(None, ENERGY, group=SIZE, in_form=False)
    seed: int | None = option(None, "Random seed, for methods that leave something to chance", in_form=False)
    saved: str = option(
        "error", "For tensors that several adapters store whole: error, first or average", RULES, metavar="RULE",
        in_form=False,
    )  # fmt: skip
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class CombineCall(ProgressOptions, CombineOptions):
    """Adapters into one, with a bar"""


@dataclass(frozen=True)
class CompareOptions(ProgressOptions):
    """Adapters compared, two by two"""

    adapters: AnyAdapters = argument("Adapters, each with its weight", metavar="ADAPTER[:WEIGHT]...")


@dataclass(frozen=True)
class ResizeOptions(Options):
    """An adapter with another rank"""

    adapter: AnyAdapter = argument("Adapter to resize")
    out: AnyPath = output()
    _: KW_ONLY
    rank: int | None = option(None, "Rank of every module; lower ones are padded", group=SIZE)
    energy: float | None = option(
        None, "Lowest rank of each module that keeps this share of ‖Δ‖²", group=SIZE, label="or energy to retain"
    )
    error: float | None = option(
        None, "Lowest rank of each module with no more than this relative error", group=SIZE, in_form=False
    )
    uniform: bool = option(
        False, "Give every module the highest rank that one of them needs", group=SIZE, in_form=False
    )
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ResizeCall(ProgressOptions, ResizeOptions):
    """An adapter with another rank, with a bar"""


@dataclass(frozen=True)
class ConvertOptions(Options):
    """An adapter of another kind"""

    adapter: AnyAdapter = argument("Adapter to convert")
    out: AnyPath = output()
    _: KW_ONLY
    to: str = option(MISSING, "Kind to convert to", ADAPTER_KINDS)
    base: AnyPath | None = option(None, "Base model, needed to and from DoRA", metavar="BASE")
    initial: AnyAdapter | None = option(
        None, "The adapter before its training, of PiSSA or OLoRA", metavar="ADAPTER", in_form=False
    )
    rank: int | None = option(None, "From DoRA, or with --initial: truncate to this rank, optimally", group=SIZE)
    energy: float | None = option(None, ENERGY, group=SIZE, in_form=False)
    seed: int | None = option(None, "Random seed of the search for the best rank, from DoRA", in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ConvertCall(ProgressOptions, ConvertOptions):
    """An adapter of another kind, with a bar"""


@dataclass(frozen=True)
class ExtractOptions(Options):
    """An adapter from the difference of two models"""

    base: AnyPath = argument("The model before fine-tuning")
    finetuned: AnyPath = argument("The model after it", label="fine-tuned model")
    out: AnyPath = output()
    _: KW_ONLY
    rank: int | None = option(None, "Rank of every module", group=SIZE)
    energy: float | None = option(
        None, "Lowest rank of each module that keeps this share of ‖Δ‖²", group=SIZE, in_form=False
    )
    whole: bool = option(False, "Take embeddings, norms and heads that differ too, as modules_to_save", in_form=False)
    seed: int = option(0, "Random seed of the search for the best rank", in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ExtractCall(ProgressOptions, ExtractOptions):
    """An adapter from the difference of two models, with a bar"""


@dataclass(frozen=True)
class DeviceOptions(Options):
    """How a merge is computed"""

    _: KW_ONLY
    device: str | torch.device = option(
        "auto", "Device: cpu, cuda, cuda:N, or auto, which takes a GPU where the job gains from one",
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
class StrengthOptions(Options):
    """How strongly adapters are merged, and by which names"""

    _: KW_ONLY
    scale: float = option(1.0, "Multiply every adapter's strength", group=ADAPTERS, in_form=False)
    rename: str | tuple[str, str] | None = option(
        None, "Rename parts of the adapter's module names", flags=("--map",), metavar="OLD=NEW", group=ADAPTERS,
        in_form=False,
    )  # fmt: skip


@dataclass(frozen=True)
class MergeOptions(StrengthOptions, QuantizingOptions):
    """Adapters into a base"""

    base: AnyPath = argument("Base model: a directory, a .safetensors file or a Hub id")
    adapters: AnyAdapters = argument("Adapters, each with its weight", metavar="ADAPTER[:WEIGHT]...")
    out: AnyPath | None = output(None, "Output directory or file [default: BASE-merged beside the base]", asked=True)
    _: KW_ONLY
    alpha: float | None = option(
        None, "Alpha of an adapter without a config (scaling = alpha / rank)", group=ADAPTERS, in_form=False
    )
    scaling: float | None = option(None, "Scaling itself of an adapter without a config", group=ADAPTERS, in_form=False)
    allow_partial: bool = option(False, "Skip modules that don't exist in the base", group=ADAPTERS, in_form=False)
    dtype: str | None = option(None, "Convert the output; by default dtypes stay", DTYPES, group="Output")
    quantize: str | None = option(
        None, "Quantize the output; by default it is not", lambda: (*writable_kinds(), "same"), group=QUANTIZATION
    )
    original: AnyPath | None = option(
        None, "Merge into the unquantized model that BASE was made from", metavar="BASE16", group=QUANTIZATION,
        in_form=False,
    )  # fmt: skip
    overwrite: bool = overwrite()
    download: bool = option(
        True, "Plan from headers alone where the base or an adapter is not downloaded", in_form=False, in_cli=False
    )


@dataclass(frozen=True)
class MergeRunOptions(DeviceOptions):
    """How a merge of adapters is computed"""

    _: KW_ONLY
    report: bool = option(
        False, "Measure what rounding kept of the update, by layer; with --json, by tensor", in_form=False
    )
    resume: bool = option(False, "Take over the shards that an interrupted merge had finished", in_form=False)
    accept_loss: bool = option(
        False, "Proceed even if quantization erases more than half of the update", group=QUANTIZATION, in_form=False
    )
    receipt: bool = option(
        True, "Don't write a receipt (the merge can't be undone without the base)", group="Output", in_form=False
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
class VerifyOptions(ProgressOptions, StrengthOptions):
    """A merge checked"""

    merged: AnyPath = argument("Model to check", label="merged model")
    base: AnyPath = argument("Base that it should be made of", flags=("--base",), metavar="BASE")
    adapters: AnyAdapters = argument(
        "An adapter that should be in it; can be given several times", flags=("--adapter",),
        metavar="ADAPTER[:WEIGHT]",
    )  # fmt: skip
    _: KW_ONLY
    sample: float = option(1.0, "Look at this share of the rows only", in_form=False)
    threads: int | None = threads()


@dataclass(frozen=True)
class QuantizeOptions(QuantizingOptions):
    """A base quantized"""

    base: AnyPath = argument("Base model to quantize")
    out: AnyPath | None = output(None, "Output directory or file [default: BASE-KIND beside the base]", asked=True)
    _: KW_ONLY
    to: str = option(MISSING, "Kind to quantize to", writable_kinds, group=QUANTIZATION)
    blocksize: int = option(
        DEFAULT_BLOCKSIZE,
        "Elements that share a scale, for kinds that have blocks",
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
class UnmergeOptions(Options):
    """A merge undone"""

    merged: AnyPath = argument("Model to undo the merge of", label="merged model")
    out: AnyPath = output(help="Output directory or file")
    _: KW_ONLY
    adapters: AnyAdapters = option(
        (), "An adapter that was merged, where it is not found by itself", flags=("--adapter",),
        metavar="ADAPTER[:WEIGHT]",
    )  # fmt: skip
    every: bool = option(
        False, "Undo every merge, one after the other, not only the last", flags=("--all",), in_form=False
    )
    base: AnyPath | None = option(
        None, "Restore from this base, checked to be the one", metavar="BASE", label="restore from base"
    )
    approximate: bool = option(False, "Subtract the adapters, whatever MERGED is", in_form=False)


@dataclass(frozen=True)
class UnmergeCall(ProgressOptions, DeviceOptions, UnmergeOptions):
    """A merge undone, and how"""
