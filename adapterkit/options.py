"""One table of options a verb, from which its Python call, its command and its form in the app are made.

>>> @dataclass(frozen=True)
... class GreetOptions(Options):
...     name: str = argument("Whom to greet")
...     _: KW_ONLY
...     times: int = option(1, "How often")
>>> @takes(GreetOptions)
... def greet(options): ...
>>> greet("Ada", times=2)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from adapterkit.errors import UsageError
from adapterkit.text import nearest

Kind = Literal["text", "int", "float", "flag", "path", "paths", "adapters", "words", "pairs"]

# How the type of a field begins -> what is asked for.
KINDS: dict[str, Kind] = {
    "bool": "flag", "int": "int", "float": "float", "str": "text", "AnyPath": "path", "AnyPaths": "paths",
    "AnyModel": "text", "AnyAdapter": "text", "AnyAdapters": "adapters", "AnyNames": "words", "tuple": "words",
    "dict": "pairs", "Mapping": "pairs",
}  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class About:
    """What a field means: its line of help, what it may be, and how the command line and the app ask for it."""

    help: str
    choices: Collection[Any] | Callable[[], Collection[Any]] = ()  # called where they depend on what modules there are
    least: int | None = None
    most: int | None = None
    group: str = ""
    flags: tuple[str, ...] = ()  # by default --name, or for what is true by default --no-name
    metavar: str | None = None
    example: str = ""  # of NAME=VALUE
    label: str = ""  # in the app, by default the name
    hint: Callable[[], str] = str  # what the app shows where nothing is filled in
    in_form: bool = True  # whether the app's form has it
    in_cli: bool = True  # whether the command has it as an option
    asked: bool = False  # whether the form wants it filled in, though it has a default


def argument(help: str, default: Any = MISSING, *, flags: tuple[str, ...] = (), **more: Any) -> Any:
    """A field that the Python call takes by position, and the command too unless it has `flags`."""
    return field(default=default, metadata={"about": About(help, flags=flags, **more), "by_position": not flags})


def option(default: Any, help: str, choices: Collection[Any] | Callable[[], Collection[Any]] = (), **more: Any) -> Any:
    """A field that is given by its name."""
    return field(default=default, metadata={"about": About(help, choices, **more), "by_position": False})


def output(default: Any = MISSING, help: str = "Output directory", label: str = "write to", **more: Any) -> Any:
    """The field of where the result goes."""
    return argument(help, default, flags=("-o", "--output"), label=label, group="Output", **more)


def overwrite() -> Any:
    """The field that says whether what is there gives way."""
    label = "replace an output that adapterkit wrote"
    return option(False, "Replace an output that adapterkit wrote", group="Output", label=label)


def threads() -> Any:
    """The field of how many workers there are."""
    help = "Number of workers [default: one a core, at most 8]"
    return option(None, help, least=1, most=256, metavar="N", in_form=False)


@dataclass(frozen=True)
class Parameter:
    """A field of an options class, as those that ask for it see it."""

    name: str
    kind: Kind
    default: Any  # MISSING where it has to be given
    by_position: bool
    about: About

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """Its names on the command line; none for an argument."""
        if self.by_position:
            return ()
        dashed = self.name.replace("_", "-")
        return self.about.flags or (f"--no-{dashed}" if self.default is True else f"--{dashed}",)

    @property
    def help(self) -> str:
        """Its line of help, with the default where that says something."""
        plain = self.default in (None, (), "", MISSING) or isinstance(self.default, bool) or "[" in self.about.help
        return self.about.help if plain else f"{self.about.help}  [default: {self.default}]"

    @property
    def choices(self) -> Collection[Any]:
        """What it may be; nothing where it may be anything."""
        return self.about.choices() if callable(self.about.choices) else self.about.choices

    @property
    def label(self) -> str:
        """What it is called in the app and in errors."""
        return self.about.label or self.name.replace("_", " ")

    def check(self, value: Any) -> None:
        """Raise UsageError where the value is none of the choices, with the nearest of them."""
        choices = self.choices
        if choices and value not in choices and value is not self.default:
            words = [str(choice) for choice in choices]
            hint = nearest(value, words) if isinstance(value, str) else ""
            raise UsageError(f"{self.label} {value!r}: expected one of {', '.join(words)}", hint=hint)


class Options:
    """The base of options classes, frozen dataclasses: what is given is checked against the choices."""

    def __post_init__(self) -> None:
        for one in parameters(type(self)):
            one.check(getattr(self, one.name))


def parameters(options: type[Any]) -> tuple[Parameter, ...]:
    """The parameters of an options class, those that are given by position first."""
    return tuple(_parameters(options))


def _parameters(options: type[Any]) -> Iterator[Parameter]:
    for one in sorted(fields(options), key=lambda field: bool(field.kw_only)):
        kind = KINDS[inspect.formatannotation(one.type).strip("'").partition(" |")[0].partition("[")[0]]
        yield Parameter(one.name, kind, one.default, one.metadata["by_position"], one.metadata["about"])


class Call(Protocol[P, T_contra, R_co]):
    """A function of the fields of an options class."""

    @property
    def options(self) -> Callable[P, Any]:
        """The options class."""

    @property
    def of(self) -> Callable[[T_contra], R_co]:
        """The same function of an instance of it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def takes(options: Callable[P, T]) -> Callable[[Callable[[T], R]], Call[P, T, R]]:
    """Make a function of an options class one of its fields: the same arguments, keywords, defaults and types."""

    def decorate(function: Callable[[T], R]) -> Call[P, T, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(options(*args, **kwargs))

        returns = inspect.signature(function).return_annotation
        facts = {"options": options, "of": function}
        vars(call).update(facts, __signature__=inspect.signature(options).replace(return_annotation=returns))
        return cast("Call[P, T, R]", call)

    return decorate
