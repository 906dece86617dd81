"""Options of the verbs that make adapters from adapters, and of compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import TYPE_CHECKING

from adapterkit.adapter.formats.table import DEFAULT as DEFAULT_FORMAT
from adapterkit.adapter.formats.table import format_names
from adapterkit.api.options.progress import ProgressOptions
from adapterkit.combining.methods import DEFAULT, METHODS, all_options
from adapterkit.combining.whole_tensors import RULES
from adapterkit.options import Options, argument, option, output, overwrite

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyAdapter, AnyAdapters, AnyModel, AnyPath, AnyWeights

ADAPTER_KINDS = ("dora", "lora", "rslora")

ADAPTERS = "Adapters"
SIZE = "Size of the result"
ENERGY = "Truncate each module to the lowest rank that retains this share of ‖Δ‖²"


@dataclass(frozen=True)
class WeightsOptions(Options):
    """Weights of adapters by module"""

    _: KW_ONLY
    weights: AnyWeights = option(
        None, "Set the weight of the modules of an adapter that match a pattern; of several, the last one counts",
        meaning="Weights by adapter and pattern of module names, such as `{'adapter:layers.0-9': 0.3}`; of several "
        "patterns that match a module, the last one counts",
        flags=("--weight",), metavar="ADAPTER:MODULES=WEIGHT", example="adapter:layers.0-9=0.3", group=ADAPTERS,
        label="weights by module", hint=lambda: "adapter:layers.0-9=0.3 adapter:*.mlp=1.2",
    )  # fmt: skip


@dataclass(frozen=True)
class FormatOptions(Options):
    """How a new adapter is written"""

    _: KW_ONLY
    format: str = option(DEFAULT_FORMAT, "Format of the new adapter", format_names, group="Output", in_form=False)


@dataclass(frozen=True)
class CombineOptions(WeightsOptions, FormatOptions):
    """Adapters into one"""

    adapters: AnyAdapters = argument("Adapters, each with its weight", metavar="ADAPTER[:WEIGHT]...")
    out: AnyPath = output()
    _: KW_ONLY
    method: str = option(DEFAULT, "Method of combining", METHODS, metavar="METHOD")
    options: Mapping[str, float | str] | None = option(
        None, "Set an option of the method, as in density=0.5", meaning="Options of the method, by name",
        flags=("--set",), example="density=0.5",
        label="method options", hint=lambda: " ".join(map(str, all_options())),
    )  # fmt: skip
    rank: int | None = option(None, "Truncate the result to this rank, optimally", group=SIZE)
    energy: float | None = option(None, ENERGY, group=SIZE, in_form=False)
    seed: int | None = option(None, "Random seed, for methods that drop elements", in_form=False)
    saved: str = option(
        "error", "For tensors that several adapters store whole: error, first or average", RULES, metavar="RULE",
        in_form=False,
    )  # fmt: skip
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class CombineCall(ProgressOptions, CombineOptions):
    """Adapters into one, with a bar"""


@dataclass(frozen=True)
class ResizeOptions(FormatOptions):
    """An adapter with another rank"""

    adapter: AnyAdapter = argument("Adapter to resize")
    out: AnyPath = output()
    _: KW_ONLY
    rank: int | None = option(None, "Rank of every module; lower ones are padded", group=SIZE)
    energy: float | None = option(
        None, "Lowest rank of each module that retains this share of ‖Δ‖²", group=SIZE, label="or energy to retain"
    )
    error: float | None = option(
        None, "Lowest rank of each module with no more than this relative error", group=SIZE, in_form=False
    )
    uniform: bool = option(False, "Give every module the highest of these ranks", group=SIZE, in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ResizeCall(ProgressOptions, ResizeOptions):
    """An adapter with another rank, with a bar"""


@dataclass(frozen=True)
class ConvertOptions(FormatOptions):
    """An adapter of another kind"""

    adapter: AnyAdapter = argument("Adapter to convert")
    out: AnyPath = output()
    _: KW_ONLY
    to: str = option(MISSING, "Kind to convert to", ADAPTER_KINDS)
    base: AnyModel | None = option(
        None,
        "Base model, needed to and from DoRA, with `saved=factors`, and from PiSSA or OLoRA without `initial`",
        metavar="BASE",
    )
    saved: str = option(
        "keep", "Modules that the adapter stores whole (modules_to_save): keep them, or turn them into factors",
        ("keep", "factors"), group=SIZE, in_form=False,
    )  # fmt: skip
    initial: AnyAdapter | None = option(
        None, "Initial state of a PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ adapter", metavar="ADAPTER", in_form=False
    )
    rank: int | None = option(
        None, "From DoRA, or with `initial` or `saved`: truncate to this rank, optimally", group=SIZE
    )
    energy: float | None = option(None, ENERGY, group=SIZE, in_form=False)
    seed: int | None = option(None, "Random seed of the low-rank approximation", in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ConvertCall(ProgressOptions, ConvertOptions):
    """An adapter of another kind, with a bar"""


@dataclass(frozen=True)
class ExtractOptions(FormatOptions):
    """An adapter from the difference of two models"""

    base: AnyModel = argument("Model before fine-tuning")
    finetuned: AnyModel = argument("Model after fine-tuning", label="fine-tuned model")
    out: AnyPath = output()
    _: KW_ONLY
    rank: int | None = option(None, "Rank of every module", group=SIZE)
    energy: float | None = option(
        None, "Lowest rank of each module that retains this share of ‖Δ‖²", group=SIZE, in_form=False
    )
    whole: bool = option(False, "Include changed embeddings, norms and heads, as modules_to_save", in_form=False)
    seed: int = option(0, "Random seed of the low-rank approximation", in_form=False)
    overwrite: bool = overwrite()


@dataclass(frozen=True)
class ExtractCall(ProgressOptions, ExtractOptions):
    """An adapter from the difference of two models, with a bar"""


@dataclass(frozen=True)
class CompareOptions(ProgressOptions):
    """Adapters compared, two by two"""

    adapters: AnyAdapters = argument("Adapters, each with its weight", metavar="ADAPTER[:WEIGHT]...")
