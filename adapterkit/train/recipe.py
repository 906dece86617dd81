"""Everything that decides what a training run does, in one table: the command's options, and a file's keys."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import read_whole
from adapterkit.files.yamlfile import MAX_YAML, parse_yaml

FACTORED = ("lora", "rslora", "dora")
TRAIN_METHODS = (*FACTORED, "full")
QUANTIZE = ("none", "nf4", "fp4")
INITS = ("kaiming", "gaussian", "pissa", "olora", "loftq")
SCHEDULES = ("cosine", "linear", "constant")
MOST = 2**31 - 1  # of what is counted, and of a seed
DTYPES = ("auto", "bf16", "fp16", "fp32")


def option(default: Any, about: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with its line of help, and what it may be."""
    return field(default=default, metadata={"help": about, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """A training run; a step is `batch_size · grad_accum` records, however many processes share them."""

    base: str = option("", "The base model: a directory of transformers, or a Hub id.")
    data: str = option("", "What to train on: JSONL, JSON, CSV, Parquet or text, or a dataset's Hub id.")
    method: str = option("lora", "What to train.", TRAIN_METHODS)
    quantize: str = option("none", "Hold the base's linear layers in 4 bits (QLoRA).", QUANTIZE)
    rank: int = option(8, "The rank of the factors.")
    alpha: float | None = option(None, "Their strength: the scaling is alpha / rank. [default: twice the rank]")
    targets: str = option("q_proj,v_proj", "Which layers: names, all-linear, or a regular expression.")
    layers: str | None = option(None, "Only these layers, as in 0-5,10.")
    rank_pattern: dict[str, int] | None = option(None, "Other ranks, by the end of a module's name.")  # noqa: RUF009
    alpha_pattern: dict[str, float] | None = option(None, "Other alphas, by the end of a module's name.")  # noqa: RUF009
    init: str = option("kaiming", "What the factors are at first.", INITS)
    init_from: str | None = option(None, "Go on training this adapter.")
    dropout: float = option(0.0, "The share of its inputs that the factors do not see.")
    epochs: float = option(1.0, "How often to go through the data.")
    max_steps: int | None = option(None, "Stop after so many steps.")
    batch_size: int = option(8, "Records in memory at a time.")
    grad_accum: int = option(1, "How many such batches make a step.")
    max_length: int = option(1024, "Longer records are cut to so many tokens.")
    packing: bool = option(False, "Fill rows of --max-length tokens with several records; a batch counts rows.")
    lr: float = option(1e-4, "The learning rate of AdamW.")
    lora_plus: float = option(1.0, "How many times that B learns with (LoRA+).")
    schedule: str = option("cosine", "How the learning rate falls.", SCHEDULES)
    warmup: float = option(0.03, "Steps over which it rises first, or below 1 the share of all.")
    weight_decay: float = option(0.0, "AdamW's.")
    clip: float = option(1.0, "The greatest norm of the gradient; 0 for any.")
    dtype: str = option("auto", "What to compute in. [auto: as the base is stored; fp32 to train all of it]", DTYPES)
    device: str = option("auto", "cpu, cuda, cuda:N, or auto.")
    gradient_checkpointing: bool = option(False, "Compute activations twice rather than keep them.")
    compile: bool = option(False, "Compile the model (torch.compile).")
    seed: int = option(0, "Of the factors, the order of the records, and dropout.")
    eval_data: str | None = option(None, "What to measure the loss on.")
    eval_share: float = option(0.0, "Hold back this share of the data to measure the loss on.")
    eval_every: int | None = option(None, "Steps between measurements. [default: each epoch]")
    patience: int | None = option(None, "Stop when so many measurements in a row were no better.")
    save_every: int = option(100, "Steps between checkpoints, from which --resume goes on.")
    skip_bad: bool = option(False, "Leave out records that are empty or malformed, rather than stop.")
    text_field: str = option("text", "What the data calls a text.")
    prompt_field: str = option("prompt", "What it calls a prompt.")
    completion_field: str = option("completion", "What it calls a completion.")
    messages_field: str = option("messages", "What it calls a conversation.")
    sample: tuple[str, ...] = option((), "Complete this prompt before and after.")

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"{_dashed(one.name)} {value}: expected one of {', '.join(choices)}")
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
                raise UsageError(f"{_dashed(name)} {value}: expected 1 or more")
        for name in ("lr", "lora_plus", "epochs", "alpha"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UsageError(f"{_dashed(name)} {value}: expected more than 0")
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for key, value in (getattr(self, name) or {}).items():
                if not (value >= least and 0 < value < math.inf):
                    raise UsageError(f"{name}: {key} {value}: expected {'1 or more' if least else 'more than 0'}")
        for name in ("dropout", "eval_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_dashed(name)} {getattr(self, name)}: expected 0 up to 1")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_dashed(name)} {getattr(self, name)}: expected 0 or more")
        counts = {_dashed(one.name): getattr(self, one.name) for one in fields(self) if "int" in str(one.type)}
        for name, value in {**counts, "--epochs": self.epochs, **(self.rank_pattern or {})}.items():
            if isinstance(value, int | float) and value > MOST:
                raise UsageError(f"{name} {value}: expected {MOST:,} or less")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        full = self.method == "full"
        lora_only = ("alpha", "layers", "rank_pattern", "alpha_pattern", "init_from")
        changed = [name for name in lora_only if getattr(self, name)]
        changed += [
            one.name for one in fields(self) if one.name in _OF_FACTORS and getattr(self, one.name) != one.default
        ]
        if full and changed:
            raise UsageError(f"{_dashed(changed[0])} is for factors, and --method full trains the base itself")
        if full and self.quantize != "none":
            raise UsageError("--method full trains the base itself, which cannot be held in 4 bits")
        taken = set(changed) - {"init_from", "dropout", "lora_plus"}  # what an adapter does not say
        if self.init_from and (taken or self.method != "lora"):
            raise UsageError("--init-from takes rank, targets, kind and scaling from the adapter: leave those out")
        if self.init == "loftq" and self.quantize == "none":
            raise UsageError("--init loftq makes up for quantizing: it goes with --quantize nf4 or fp4")
        if self.init in ("pissa", "olora") and self.quantize != "none":
            raise UsageError(f"--init {self.init} takes factors out of the base, which --quantize would round again")
        if self.eval_data and self.eval_share:
            raise UsageError("--eval-data and --eval-share both say what to measure on: give one of them")
        if self.patience and not (self.eval_data or self.eval_share):
            raise UsageError("--patience needs something to measure: --eval-data or --eval-share")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum


_OF_FACTORS = ("rank", "targets", "init", "dropout", "lora_plus")


def read_recipe(path: Path, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe in a YAML file, with what the command line says instead.

    Raises FormatError where it is not YAML, UsageError for unknown keys, with the nearest there is, and wrong types.
    """
    try:
        given = parse_yaml(read_whole(path, 4 * MAX_YAML).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise FormatError(f"{path}: expected keys and values, as in `rank: 8`")
    return checked(given, str(path), overrides)


def checked(given: Mapping[Any, Any], where: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of these keys and values, `overrides` over them; a number may be text, as YAML reads `1e-4`."""
    from pydantic import TypeAdapter, ValidationError

    names = [one.name for one in fields(Recipe)]
    plain: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = get_close_matches(name[:60], names, 1)
            raise UsageError(f"{where}: unknown key {name[:60]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in plain:
            raise UsageError(f"{where}: has both {name} and {name.replace('_', '-')}, which are one key")
        plain[name] = value
    try:
        return TypeAdapter(Recipe).validate_python(plain | dict(overrides or {}))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {at} is {reprlib.repr(first['input'])}: {first['msg']}") from error


def as_yaml(recipe: Recipe) -> str:
    """Every option of `recipe`, in the order of the table."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
