"""Every setting of an evaluation in one table: the options of `eval`, and the arguments of `evaluate`."""

from __future__ import annotations

import os
import re
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError
from adapterkit.files.safetensors import DTYPE_SPELLINGS
from adapterkit.options import Options, argument, option
from adapterkit.train.recipe import COMPUTE, DATA, DTYPES, QUANTIZE, Recipe

if TYPE_CHECKING:
    import torch

COMPLETIONS, OUTPUT = "Completions", "Output"
TRAINING = {one.name: one for one in fields(Recipe)}


def as_in_training(name: str) -> Any:
    """The field of a recipe."""
    return field(default=TRAINING[name].default, metadata=TRAINING[name].metadata)


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """An evaluation; raises UsageError for invalid options."""

    base: str | os.PathLike[str] = argument("Base model: a transformers directory or a Hub id", in_cli=False)
    data: str | os.PathLike[str] = argument(
        "Records to evaluate on: JSONL, JSON, CSV, Parquet or text, or the Hub id of a dataset", in_cli=False
    )
    adapter: str | os.PathLike[str] | None = argument("Adapter to evaluate with the base", None, in_cli=False)
    _: KW_ONLY
    limit: int | None = option(None, "Evaluate only the first N records", metavar="N", group=DATA)
    max_length: int = as_in_training("max_length")
    skip_bad: bool = as_in_training("skip_bad")
    text_field: str = as_in_training("text_field")
    prompt_field: str = as_in_training("prompt_field")
    completion_field: str = as_in_training("completion_field")
    messages_field: str = as_in_training("messages_field")
    generate: bool | None = option(
        None, "Complete the prompts [default: if records have prompts and completions]", group=COMPLETIONS
    )
    max_new_tokens: int | None = option(
        None, "Maximum length of a completion [default: the longest in the data, plus a few tokens]", group=COMPLETIONS
    )
    answer: str | None = option(
        None, "Score the answer in a completion: the first group of the last match", metavar="REGEX", group=COMPLETIONS
    )
    batch_size: int = option(TRAINING["batch_size"].default, "Records per batch", group=COMPUTE)
    dtype: str | torch.dtype = option(
        "auto", "Compute dtype [auto: the base's stored dtype]", DTYPES, spellings=DTYPE_SPELLINGS, group=COMPUTE
    )
    device: str = as_in_training("device")
    quantize: str = option("none", "Load the base's linear layers in 4 bits", QUANTIZE, group=COMPUTE)
    predictions: Path | str | None = option(
        None, "Write the completions to this file as JSON lines", metavar="FILE", group=OUTPUT
    )
    overwrite: bool = option(False, "Replace the file of predictions", group=OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A recipe checks the options that training has too.
        Recipe(max_length=self.max_length, batch_size=self.batch_size, dtype=str(self.dtype), quantize=self.quantize)
        for name, value in (("limit", self.limit), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"`{name}` {value}: expected 1 or more")
        for name in ("answer", "max_new_tokens", "predictions"):
            if getattr(self, name) is not None and self.generate is False:
                raise UsageError(f"`{name}` and `generate=False` cannot be combined")
        if self.overwrite and self.predictions is None:
            raise UsageError("`overwrite` needs `predictions=FILE`")
        if self.predictions is not None:
            object.__setattr__(self, "generate", True)
        if self.answer is not None:
            try:
                re.compile(self.answer)
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(f"`answer={self.answer}`: invalid regular expression: {error}") from error
