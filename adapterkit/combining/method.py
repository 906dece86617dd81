"""Methods: functions that combine the adapters' parts of a module; the options are keywords of the function.

>>> @method()
... def mean(parts: Sequence[Part], *, power: Annotated[float, Range(0, 9), "Exponent of the weights"] = 1.0):
...     '''The first line is the method's help.'''

Modules of `methods` are imported to list the methods, so they import torch inside functions, as this one does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, ParamSpec, TypeVar, get_args, get_origin

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.lowrank import Product
    from adapterkit.algebra.sketch import Matrix

Value = float | str
P = ParamSpec("P")
Result = TypeVar("Result", bound="Product | Matrix", covariant=True)


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's part in a module, `Δ = scaling · left · right`, and its weight.

    Methods on factors get a batch of modules of one shape. Elementwise methods get a single matrix, with a `name` that
    seeds its random numbers.
    """

    factors: Product
    scaling: torch.Tensor  # (batch,)
    weight: float
    name: str = ""

    @property
    def delta(self) -> Product:
        """Δ, not weighted."""
        return self.factors.times(self.scaling)

    def matrix(self, index: int, name: str) -> Part:
        """Matrix `index` of a batch."""
        factors = replace(self.factors, left=self.factors.left[index], right=self.factors.right[index])
        return replace(self, factors=factors, scaling=self.scaling[index], name=name)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.factors.left.shape[-2], self.factors.right.shape[-1]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first:last` of the Δ of a matrix, in float32."""
        return (self.factors.left[first:last] * self.scaling @ self.factors.right).float()


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers greater than `above` and at most `most`."""

    above: float
    most: float

    def __str__(self) -> str:
        return f"above {self.above:g} and at most {self.most:g}"


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a method, from a keyword of its function: a `number`, float or int, or one of `choices`."""

    name: str
    default: Value
    help: str
    number: type[float] | None
    range: Range | None
    choices: tuple[str, ...]

    @classmethod
    def of(cls, parameter: inspect.Parameter, names: Mapping[str, Any]) -> Option:
        """From a keyword of a function; its annotation is evaluated with the `names` of the module."""
        written = parameter.annotation
        kind, *facts = get_args(eval(written, dict(names)) if isinstance(written, str) else written)
        [text] = [fact for fact in facts if isinstance(fact, str)]
        span = next((fact for fact in facts if isinstance(fact, Range)), None)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        return cls(parameter.name, parameter.default, text, None if choices else kind, span, choices)

    def __str__(self) -> str:
        return f"{self.name}={self.default}"

    @property
    def expected(self) -> str:
        """The accepted values, for errors and help."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        number = "a whole number" if self.number is int else "a number"
        return f"{number} {self.range}" if self.range else number

    def checked(self, value: object) -> Value:
        """`value` as the type that the method takes. Raises UsageError if it is not accepted."""
        if self.number is None and value in self.choices:
            return str(value)
        if self.number is not None and isinstance(value, Real) and not isinstance(value, bool) and isfinite(value):
            number = self.number(value)
            if number == value and (self.range is None or self.range.above < number <= self.range.most):
                return number
        raise UsageError(f"{self.name} {value!r}: expected {self.expected}")


# Options shared by several methods.
Density = Annotated[float, Range(0, 1), "Share of the elements of each update to keep"]
Inner = Annotated[Literal["ties", "linear"], "Merge by TIES or sum, in the common basis"]


@dataclass(frozen=True, slots=True)
class Method(Generic[P, Result]):
    """A function that combines parts, and its properties; see `method`."""

    function: Callable[P, Result]
    truncate: Literal["if asked", "always", "never"]
    elementwise: bool
    biases: bool

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def help(self) -> str:
        """The first line of the docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0].rstrip(".")

    @property
    def options(self) -> dict[str, Option]:
        """The keywords of the function except the seed, by name."""
        names = self.function.__globals__
        return {name: Option.of(keyword, names) for name, keyword in self._keywords.items() if name != "seed"}

    @property
    def seeded(self) -> bool:
        """Whether the result depends on a seed."""
        return "seed" in self._keywords

    @property
    def _keywords(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters
        return {name: one for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}

    def settings(self, given: Mapping[str, object], seed: int | None) -> dict[str, Value]:
        """All keywords for a call: `given` and defaults. Raises UsageError for unknown options and invalid values."""
        options = self.options
        for name in given:
            if name not in options:
                takes = f"it takes {', '.join(options)}" if options else "it takes none"
                raise UsageError(f"{self.name} has no option {name!r}: {takes}")
        if seed is not None and not self.seeded:
            raise UsageError(f"{self.name} is deterministic and takes no seed")
        found = {name: option.checked(given.get(name, option.default)) for name, option in options.items()}
        return found | ({"seed": seed or 0} if self.seeded else {})


def method(
    truncate: Literal["if asked", "always", "never"] = "if asked", *, elementwise: bool = False, biases: bool = False
) -> Callable[[Callable[P, Result]], Method[P, Result]]:
    """Make a function of `Sequence[Part]` a method, named after it; annotated keywords are its options.

    Args:
        truncate: "always" truncates to the highest rank among the adapters if there is no limit; "never" takes none.
        elementwise: the function takes single matrices and returns a `Matrix` of full rank, which is always truncated;
            otherwise it takes batches of factors and returns a `Product`.
        biases: the method is linear in the adapters, so trained biases are summed like the updates.
    """
    return lambda function: Method(function, "always" if elementwise else truncate, elementwise, biases)
