"""The actions of the app: each is a command of the CLI, with a form for its arguments."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterkit.api.options.adapters import CombineOptions, ConvertOptions, ExtractOptions, ResizeOptions
from adapterkit.api.options.hub import PullOptions, PushOptions
from adapterkit.api.options.merges import MergeOptions, UnmergeOptions, VerifyOptions
from adapterkit.api.options.training import TrainRunOptions
from adapterkit.options import Parameter, parameters
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
    hint: Callable[[], str] = str  # shown in an empty field


@dataclass(frozen=True)
class Action:
    """A command, its key, its form, and the options for a dry run (`plan`)."""

    command: str
    key: str
    label: str
    fields: tuple[Field, ...]
    plan: tuple[str, ...] = ()

    def argv(self, values: Values) -> list[str]:
        """The command line for `values`, without `adapterkit`: arguments first, then options."""
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
        """The labels of the required fields that are empty."""
        return [field.label for field in self.fields if field.needed and not str(values.get(field.name, "")).strip()]

    def suggested(self, adapters: Sequence[str], base: str) -> Values:
        """The initial values of the form, for the selected `adapters` and the chosen `base`."""
        first = adapters[0] if adapters else ""
        short = first.rstrip("/").rpartition("/")[2]
        where = f"{short or 'adapter'}-{'merged' if self.command == 'merge' else self.command}"
        quoted = [shlex.quote(name) for name in adapters]
        return {
            "base": base, "adapter": first, "adapters": " ".join(quoted),
            "-o": "" if self.command in ("pull", "train") else where,
            "--base": base if self.command in ("verify", "convert") else "", "ids": "".join(quoted[:1]),
            "path": first, "--adapter": " ".join(quoted), "repo": short,
        }  # fmt: skip


def form_of(options: type) -> tuple[Field, ...]:
    """A field for each parameter of a verb that its form shows."""
    return tuple(_field(parameter) for parameter in parameters(options) if parameter.about.in_form)


def _field(parameter: Parameter) -> Field:
    choices = parameter.choices
    kind: Kind = "choice" if choices else "text"
    if parameter.kind in ("flag", "adapters", "words", "pairs", "weights"):
        kind = "flag" if parameter.kind == "flag" else "words"
    default = next(iter(choices), "") if parameter.required else "" if kind == "flag" else parameter.default or ""
    name = parameter.flags[0] if parameter.flags else parameter.name
    needed = parameter.required or parameter.about.asked
    return Field(name, parameter.label, kind, str(default), choices, needed, parameter.about.hint)


PLAN = ("--dry-run",)

ACTIONS = {
    action.command: action
    for action in (
        Action("merge", "m", "Merge into the base", form_of(MergeOptions), PLAN),
        Action("unmerge", "u", "Undo a merge", form_of(UnmergeOptions), PLAN),
        Action("verify", "v", "Verify a merge", form_of(VerifyOptions)),
        Action("combine", "o", "Combine selected", form_of(CombineOptions), PLAN),
        Action("resize", "z", "Change the rank", form_of(ResizeOptions), PLAN),
        Action("convert", "D", "Convert to DoRA or back", form_of(ConvertOptions), PLAN),
        Action("extract", "e", "Extract from a fine-tuned model", form_of(ExtractOptions), PLAN),
        Action("train", "t", "Train from a recipe", form_of(TrainRunOptions), ("--memory",)),
        Action("pull", "d", "Download", form_of(PullOptions), PLAN),
        Action("push", "P", "Push to the Hub", form_of(PushOptions), PLAN),
    )
}  # fmt: skip


def line(argv: Sequence[str]) -> str:
    """The command line, quoted for a shell."""
    return command(["adapterkit", *argv])
