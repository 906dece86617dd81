"""One options class per verb, which defines its Python call, its command and its form in the app.

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
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from adapterkit.errors import UsageError
from adapterkit.text import nearest

Kind = Literal["text", "int", "float", "flag", "path", "paths", "adapters", "words", "pairs", "weights"]

# The start of a field's type -> the kind of its value.
KINDS: dict[str, Kind] = {
    "bool": "flag", "int": "int", "float": "float", "str": "text", "AnyPath": "path", "AnyPaths": "paths",
    "AnyModel": "text", "AnyAdapter": "text", "AnyAdapters": "adapters", "AnyNames": "words", "tuple": "words",
    "dict": "pairs", "Mapping": "pairs", "AnyWeights": "weights", "Path": "path",
}  # fmt: skip

WIDTH = 100  # columns of docstrings

# What a Python call accepts for a kind.
FORMS: dict[Kind, str] = {
    "adapters": ": a path, a Hub id or an `Adapter`, alone or as (adapter, weight), several of these, or a mapping of "
    "paths to weights",
}

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class About:
    """The metadata of a field: help, valid values, and its presentation on the command line and in the app.

    The help names other fields in backticks, as errors do; the command line replaces them by its options.
    """

    help: str
    choices: Collection[Any] | Callable[[], Collection[Any]] = ()  # a function if they are found at run time
    spellings: Mapping[str, Any] = field(default_factory=dict)  # other names of the choices, in lower case
    meaning: str = ""  # the help of the Python argument, if it differs from the option's
    least: int | None = None
    most: int | None = None
    group: str = ""
    flags: tuple[str, ...] = ()  # by default --name, or --no-name if the default is True
    metavar: str | None = None
    example: str = ""  # of NAME=VALUE
    label: str = ""  # in the app, by default the name
    hint: Callable[[], str] = str  # the placeholder in the app
    in_form: bool = True  # part of the app's form
    in_cli: bool = True  # an option of the command
    asked: bool = False  # required in the form, despite a default


def argument(help: str, default: Any = MISSING, *, flags: tuple[str, ...] = (), **more: Any) -> Any:
    """Define a field that is positional in the Python call, and in the command unless it has `flags`."""
    return field(default=default, metadata={"about": About(help, flags=flags, **more), "by_position": not flags})


def option(default: Any, help: str, choices: Collection[Any] | Callable[[], Collection[Any]] = (), **more: Any) -> Any:
    """Define a field that is passed by name."""
    return field(default=default, metadata={"about": About(help, choices, **more), "by_position": False})


def output(default: Any = MISSING, help: str = "Output directory", label: str = "write to", **more: Any) -> Any:
    """Define the field for the output's path."""
    return argument(help, default, flags=("-o", "--output"), label=label, group="Output", **more)


def overwrite() -> Any:
    """Define the field for replacing an existing output."""
    label = "replace an output that adapterkit wrote"
    return option(False, "Replace an output that adapterkit wrote", group="Output", label=label)


def plotted(what: str) -> Any:
    """Define the field for the file of a plot."""
    return option(None, f"Plot {what} to this PNG or SVG file", metavar="FILE", group="Output", in_form=False)


def threads() -> Any:
    """Define the field for the number of workers."""
    help = "Number of workers [default: one per core, at most 8]"
    return option(None, help, least=1, most=256, metavar="N", in_form=False)


@dataclass(frozen=True)
class Parameter:
    """A field of an options class."""

    name: str
    kind: Kind
    default: Any  # MISSING if required
    by_position: bool
    about: About

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """Its option names on the command line; empty for an argument."""
        if self.by_position:
            return ()
        dashed = self.name.replace("_", "-")
        return self.about.flags or (f"--no-{dashed}" if self.default is True else f"--{dashed}",)

    @property
    def help(self) -> str:
        """Its help line, with the default if that is informative."""
        plain = self.default in (None, (), "", MISSING) or isinstance(self.default, bool) or "[" in self.about.help
        return self.about.help if plain else f"{self.about.help}  [default: {self.default}]"

    @property
    def meaning(self) -> str:
        """The help of the Python argument, with the valid values."""
        text = (self.about.meaning or self.about.help).rstrip(".") + FORMS.get(self.kind, "")
        *others, last = map(str, self.choices or ("",))
        return text if not last or last in text else f"{text} ({', '.join(others)} or {last})"

    @property
    def choices(self) -> Collection[Any]:
        """Its valid values; empty if there is no restriction."""
        return self.about.choices() if callable(self.about.choices) else self.about.choices

    @property
    def label(self) -> str:
        """Its name in the app and in errors."""
        return self.about.label or self.name.replace("_", " ")

    def canonical(self, value: Any) -> Any:
        """The choice that `value` is a spelling of, or `value` itself."""
        return self.about.spellings.get(str(value).lower(), value)

    def checked(self, value: Any) -> Any:
        """The value in its canonical spelling; raises UsageError if it is out of range or not one of the choices."""
        least, most = self.about.least, self.about.most
        whole = type(value) is int and (least is None or value >= least) and (most is None or value <= most)
        if least is not None and value is not self.default and not whole:
            expected = f"from {least} to {most}" if most is not None else f"of {least} or more"
            raise UsageError(f"{self.label} {value!r}: expected a whole number {expected}")
        choices, value = self.choices, self.canonical(value)
        if choices and value not in choices and value is not self.default:
            words = [str(choice) for choice in choices]
            hint = nearest(str(value), [*words, *self.about.spellings])
            raise UsageError(f"{self.label} {value!r}: expected one of {', '.join(words)}", hint=hint)
        return value


class Options:
    """The base class of options classes, which are frozen dataclasses; checks values against their choices."""

    def __post_init__(self) -> None:
        for one in parameters(type(self)):
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))


def parameters(options: type[Any]) -> tuple[Parameter, ...]:
    """Return the parameters of an options class, positional ones first."""
    return tuple(_parameters(options))


def _parameters(options: type[Any]) -> Iterator[Parameter]:
    for one in sorted(fields(options), key=lambda field: bool(field.kw_only)):
        kind = KINDS[inspect.formatannotation(one.type).strip("'").partition(" |")[0].partition("[")[0]]
        yield Parameter(one.name, kind, one.default, one.metadata["by_position"], one.metadata["about"])


class Call(Protocol[P, T_contra, R_co]):
    """A function that takes the fields of an options class as arguments."""

    @property
    def options(self) -> Callable[P, Any]:
        """The options class."""

    @property
    def of(self) -> Callable[[T_contra], R_co]:
        """The same function, taking an instance of it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def takes(options: Callable[P, T]) -> Callable[[Callable[[T], R]], Call[P, T, R]]:
    """Make a function of an options instance accept the fields as arguments, with their defaults and types."""

    def decorate(function: Callable[[T], R]) -> Call[P, T, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(options(*args, **kwargs))

        returns = inspect.signature(function).return_annotation
        facts = {"options": options, "of": function}
        call.__doc__ = _documented(function.__doc__ or "", parameters(cast("type[Any]", options)))
        vars(call).update(facts, __signature__=inspect.signature(options).replace(return_annotation=returns))
        return cast("Call[P, T, R]", call)

    return decorate


def _documented(doc: str, arguments: Sequence[Parameter]) -> str:
    """Insert a section of arguments into a docstring, before `Returns`, `Yields` and `Raises`."""
    lines = [
        textwrap.fill(f"{one.name}: {one.meaning}.", WIDTH, initial_indent="    ", subsequent_indent=" " * 8)
        for one in arguments
    ]
    args = "\n".join(["Args:", *lines])
    about, *rest = re.split(r"\n\n(?=Returns:|Yields:|Raises:)", inspect.cleandoc(doc))
    return "\n\n".join([about, args, *rest]) + "\n"
