"""What can be done: each action is a command of the command line, and a form that fills in its arguments."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterkit.base.quant import writable_kinds
from adapterkit.combining.methods import DEFAULT, METHODS, all_options
from adapterkit.text import command

Kind = Literal["text", "words", "choice", "flag"]
Values = Mapping[str, str | bool]


@dataclass(frozen=True)
class Field:
    """An argument (`base`) or an option (`--rank`) of a command; `words` are several arguments."""

    name: str
    label: str
    kind: Kind = "text"
    default: str = ""
    choices: Collection[str] = ()
    needed: bool = False
    hint: Callable[[], str] = str  # shown where nothing is filled in


@dataclass(frozen=True)
class Action:
    """A command, the key it is on, its form, and the options that make it print its plan and do nothing."""

    command: str
    key: str
    label: str
    fields: tuple[Field, ...]
    plan: tuple[str, ...] = ()

    def argv(self, values: Values) -> list[str]:
        """The arguments of `adapterkit` that `values` mean: arguments first, then options."""
        arguments, options = [self.command], []
        for field in self.fields:
            value = values.get(field.name, "")
            if value in ("", False):
                continue
            if field.kind == "flag":
                options.append(field.name)
            elif field.name.startswith("-"):
                parts = shlex.split(str(value)) if field.kind == "words" else [str(value)]
                options += [word for part in parts for word in (field.name, part)]
            else:
                arguments += shlex.split(str(value)) if field.kind == "words" else [str(value)]
        return [*arguments, *options]

    def missing(self, values: Values) -> list[str]:
        """The labels of what must be filled in and is not."""
        return [field.label for field in self.fields if field.needed and not str(values.get(field.name, "")).strip()]


BASE = Field("base", "base", needed=True)
ADAPTER = Field("adapter", "adapter", needed=True)
OUT = Field("-o", "write to", needed=True)
OVERWRITE = Field("--overwrite", "replace what adapterkit made there before", "flag")

ACTIONS = {
    action.command: action
    for action in (
        Action(
            "merge", "m", "Merge into the base",
            (
                BASE, Field("adapters", "adapters", "words", needed=True), OUT,
                Field("--dtype", "dtype", "choice", choices=("bf16", "fp16", "fp32")),
                Field("--quantize", "quantize", "choice", choices=(*writable_kinds(), "same")), OVERWRITE,
            ),
            ("--dry-run",),
        ),
        Action(
            "unmerge", "u", "Undo a merge",
            (Field("merged", "merged model", needed=True), OUT, Field("--adapter", "adapters", "words"),
             Field("--base", "restore from base")),
            ("--dry-run",),
        ),
        Action(
            "verify", "v", "Verify a merge",
            (Field("merged", "merged model", needed=True), Field("--base", "base", needed=True),
             Field("--adapter", "adapters", "words", needed=True)),
        ),
        Action(
            "combine", "o", "Combine the marked",
            (Field("adapters", "adapters", "words", needed=True), OUT,
             Field("--method", "method", "choice", DEFAULT, METHODS),
             Field("--set", "its options", "words", hint=lambda: " ".join(map(str, all_options()))),
             Field("--rank", "rank"), OVERWRITE),
            ("--dry-run",),
        ),
        Action(
            "resize", "z", "Change the rank",
            (ADAPTER, OUT, Field("--rank", "rank"), Field("--energy", "or energy to keep"), OVERWRITE),
            ("--dry-run",),
        ),
        Action(
            "convert", "D", "Convert to DoRA or back",
            (ADAPTER, OUT, Field("--to", "to", "choice", "dora", ("dora", "lora", "rslora"), True),
             Field("--base", "base"), Field("--rank", "rank"), OVERWRITE),
            ("--dry-run",),
        ),
        Action(
            "extract", "e", "Extract from a fine-tuned model",
            (BASE, Field("finetuned", "fine-tuned model", needed=True), OUT, Field("--rank", "rank"), OVERWRITE),
            ("--dry-run",),
        ),
        Action(
            "train", "t", "Train from a recipe",
            (Field("--recipe", "recipe (YAML)", needed=True), OUT, Field("--resume", "go on with a run", "flag"),
             OVERWRITE),
            ("--memory",),
        ),
        Action("pull", "d", "Download", (Field("id", "Hub id", needed=True), Field("-o", "copy to")), ("--dry-run",)),
        Action(
            "push", "P", "Push to the Hub",
            (Field("path", "folder", needed=True), Field("repo", "repository", needed=True),
             Field("--base-id", "base on the Hub"), Field("--license", "license"), Field("--message", "message"),
             Field("--private", "private", "flag"), Field("--pr", "as a pull request", "flag")),
            ("--dry-run",),
        ),
    )
}  # fmt: skip


def line(argv: Sequence[str]) -> str:
    """The command as it is typed into a shell."""
    return command(["adapterkit", *argv])
