"""Every setting of a training run in one table: the options of `train`, and the keys of a recipe file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.base.quant import loadable_kinds
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import read_whole
from adapterkit.files.safetensors import DTYPE_SPELLINGS, OUTPUT_DTYPES
from adapterkit.files.yamlfile import MAX_YAML, parse_yaml
from adapterkit.options import argument, option, parameters
from adapterkit.packages import needed

FACTORED = ("lora", "rslora", "dora")
TRAIN_METHODS = (*FACTORED, "full")
QUANTIZE = ("none", *loadable_kinds())
INITS = ("kaiming", "gaussian", "pissa", "olora", "loftq")
SCHEDULES = ("cosine", "linear", "constant")
MAX_INT = 2**31 - 1  # for counts and seeds
DTYPES = ("auto", *OUTPUT_DTYPES)
ADAPTER, DATA, OPTIMIZATION, VALIDATION, COMPUTE = "Adapter", "Data", "Optimization", "Validation", "Compute"


@dataclass(frozen=True)
class Recipe:
    """A training run; a step is `batch_size · grad_accum` records, divided among all processes."""

    base: str = argument("Base model: a transformers directory or a Hub id", "")
    data: str = argument("Training data: JSONL, JSON, CSV, Parquet or text, or the Hub id of a dataset", "")
    method: str = option("lora", "Training method", TRAIN_METHODS)
    quantize: str = option("none", "Load the base's linear layers in 4 bits (QLoRA)", QUANTIZE)
    rank: int = option(8, "Rank of the factors", group=ADAPTER)
    alpha: float | None = option(
        None, "LoRA alpha; the scaling is alpha / rank [default: twice the rank]", group=ADAPTER
    )
    targets: str = option("q_proj,v_proj", "Target modules: names, all-linear, or a regular expression", group=ADAPTER)
    layers: str | None = option(None, "Train only these layers, such as 0-5,10", group=ADAPTER)
    rank_pattern: dict[str, int] | None = option(
        None, "Rank for modules whose name ends with NAME", example="down_proj=16", group=ADAPTER
    )
    alpha_pattern: dict[str, float] | None = option(
        None, "Alpha for modules whose name ends with NAME", example="down_proj=32", group=ADAPTER
    )
    init: str = option("kaiming", "Initialization of the factors", INITS, group=ADAPTER)
    init_from: str | None = option(None, "Continue training this adapter", group=ADAPTER)
    dropout: float = option(0.0, "Dropout on the inputs of the factors", group=ADAPTER)
    epochs: float = option(1.0, "Passes over the data", group=OPTIMIZATION)
    max_steps: int | None = option(None, "Maximum number of steps", group=OPTIMIZATION)
    batch_size: int = option(8, "Records per batch", group=OPTIMIZATION)
    grad_accum: int = option(1, "Batches per step (gradient accumulation)", group=OPTIMIZATION)
    max_length: int = option(1024, "Truncate records to this many tokens", group=DATA)
    packing: bool = option(
        False, "Pack several records into each row of `max_length` tokens; a batch counts rows", group=DATA
    )
    lr: float = option(1e-4, "Learning rate (AdamW)", group=OPTIMIZATION)
    lora_plus: float = option(1.0, "Learning-rate multiplier for B (LoRA+)", group=OPTIMIZATION)
    schedule: str = option("cosine", "Learning-rate schedule", SCHEDULES, group=OPTIMIZATION)
    warmup: float = option(0.03, "Warmup steps, or below 1 a share of all steps", group=OPTIMIZATION)
    weight_decay: float = option(0.0, "Weight decay (AdamW)", group=OPTIMIZATION)
    clip: float = option(1.0, "Maximum gradient norm; 0 disables clipping", group=OPTIMIZATION)
    dtype: str = option(
        "auto",
        "Compute dtype [auto: the base's stored dtype; fp32 for `method=full`]",
        DTYPES,
        spellings=DTYPE_SPELLINGS,
        group=COMPUTE,
    )
    device: str = option("auto", "Compute device: cpu, cuda, cuda:N or auto", group=COMPUTE)
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory", group=COMPUTE
    )
    compile: bool = option(False, "Compile the model (torch.compile)", group=COMPUTE)
    seed: int = option(0, "Random seed for the factors, the order of records and dropout", group=DATA)
    eval_data: str | None = option(None, "Validation data", group=VALIDATION)
    eval_share: float = option(0.0, "Share of the data to hold out for validation", group=VALIDATION)
    eval_every: int | None = option(None, "Steps between validations [default: one epoch]", group=VALIDATION)
    patience: int | None = option(
        None, "Stop after this many validations in a row without improvement", group=VALIDATION
    )
    save_every: int = option(100, "Steps between checkpoints for `resume`")
    skip_bad: bool = option(False, "Skip empty or malformed records instead of failing", group=DATA)
    text_field: str = option("text", "Field that holds the text", group=DATA)
    prompt_field: str = option("prompt", "Field that holds the prompt", group=DATA)
    completion_field: str = option("completion", "Field that holds the completion", group=DATA)
    messages_field: str = option("messages", "Field that holds the messages of a chat", group=DATA)
    sample: tuple[str, ...] = option(
        (), "Complete this prompt before and after training", metavar="PROMPT", group=VALIDATION
    )

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for one in parameters(type(self)):
            value = one.canonical(getattr(self, one.name))
            if one.choices and value not in one.choices:
                raise UsageError(f"{_parameter(one.name)} {value}: expected one of {', '.join(one.choices)}")
            object.__setattr__(self, one.name, value)
        for name in (
            "rank",
            "batch_size",
            "grad_accum",
            "max_length",
            "max_steps",
            "eval_every",
            "save_every",
            "patience",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{_parameter(name)} {value}: expected 1 or more")
        for name in ("lr", "lora_plus", "epochs", "alpha"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UsageError(f"{_parameter(name)} {value}: expected more than 0")
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for key, value in (getattr(self, name) or {}).items():
                if not (value >= least and 0 < value < math.inf):
                    raise UsageError(f"{name}: {key} {value}: expected {'1 or more' if least else 'more than 0'}")
        for name in ("dropout", "eval_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_parameter(name)} {getattr(self, name)}: expected at least 0 and less than 1")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_parameter(name)} {getattr(self, name)}: expected 0 or more")
        counts = {_parameter(item.name): getattr(self, item.name) for item in fields(self) if "int" in str(item.type)}
        for name, value in {**counts, _parameter("epochs"): self.epochs, **(self.rank_pattern or {})}.items():
            if isinstance(value, int | float) and value > MAX_INT:
                raise UsageError(f"{name} {value}: expected {MAX_INT:,} or less")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        full = self.method == "full"
        lora_only = ("alpha", "layers", "rank_pattern", "alpha_pattern", "init_from")
        changed = [name for name in lora_only if getattr(self, name)]
        changed += [
            item.name
            for item in fields(self)
            if item.name in _FACTOR_OPTIONS and getattr(self, item.name) != item.default
        ]
        if full and changed:
            raise UsageError(f"{_parameter(changed[0])} applies to factors, but `method='full'` trains the base itself")
        if full and self.quantize != "none":
            raise UsageError("`method='full'` trains the base itself, and 4-bit weights cannot be trained")
        conflicting = set(changed) - {"init_from", "dropout", "lora_plus"}  # dropout and LoRA+ are the run's own
        if self.init_from and (conflicting or self.method != "lora"):
            raise UsageError(
                "`init_from` takes rank, targets, method and scaling from the adapter", hint="omit those options"
            )
        if self.init == "loftq" and self.quantize == "none":
            raise UsageError(
                f"`init='loftq'` compensates for quantization: it needs `quantize` {' or '.join(QUANTIZE[1:])}"
            )
        if self.init in ("pissa", "olora") and self.quantize != "none":
            raise UsageError(
                f"`init='{self.init}'` subtracts the factors from the base, and `quantize` would round the rest again"
            )
        if self.eval_data and self.eval_share:
            raise UsageError("`eval_data` and `eval_share` both select validation data", hint="give one of them")
        if self.patience and not (self.eval_data or self.eval_share):
            raise UsageError("`patience` needs validation data: `eval_data` or `eval_share`")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum


_FACTOR_OPTIONS = ("rank", "targets", "init", "dropout", "lora_plus")


def read_recipe(path: Path, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe from a YAML file; `overrides`, from the command line, replace its values.

    Raises:
        FormatError: The file is not valid YAML.
        UsageError: A key is unknown (the nearest one is suggested), or a value has the wrong type.
    """
    try:
        values = parse_yaml(read_whole(path, 4 * MAX_YAML).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected keys and values, such as `rank: 8`")
    return checked(values, str(path), overrides)


def checked(values: Mapping[Any, Any], where: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Make a recipe of `values`, replaced by `overrides`; numbers may be strings, as YAML reads `1e-4`."""
    pydantic = needed("pydantic", "training")
    names = [item.name for item in fields(Recipe)]
    plain: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = get_close_matches(name[:60], names, 1)
            raise UsageError(f"{where}: unknown key {name[:60]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in plain:
            raise UsageError(f"{where}: {name} and {name.replace('_', '-')} are the same key")
        plain[name] = value
    try:
        recipe: Recipe = pydantic.TypeAdapter(Recipe).validate_python(plain | dict(overrides or {}))
        return recipe
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UsageError):  # a ValueError, which pydantic wraps
            raise cause from None
        at = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {at} is {reprlib.repr(first['input'])}: {first['msg']}") from error


def as_yaml(recipe: Recipe) -> str:
    """All options of `recipe` as YAML, in the order of the table."""
    yaml = needed("yaml", "writing a recipe")
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _parameter(name: str) -> str:
    return f"`{name}`"
