"""Match untrusted regular expressions without backtracking.

Python's `re` takes exponential time for some short patterns; RE2 takes time proportional to the sizes of pattern and
name. RE2 has no lookarounds or backreferences, which PEFT's patterns don't need; patterns that it would interpret
differently from Python are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

from adapterkit.errors import FormatError
from adapterkit.packages import needed

T = TypeVar("T")

MAX_PATTERN = 500  # characters
MAX_PATTERNS = 2000  # each takes a few kilobytes
MAX_MATCHES, MAX_STEPS = 3_000_000, 10**10  # a few seconds for all patterns and names
DIFFERS_FROM_PYTHON = re.compile(r"\{,|\[[:.=]")  # x{,3} and [[:alpha:]]
MEMORY = 1 << 18  # bytes per pattern


@dataclass(frozen=True, slots=True)
class Matcher:
    """A compiled pattern: `matches(name)` returns whether a name matches; `size` is the size of the RE2 program."""

    matches: Callable[[str], bool]
    size: int


@lru_cache(MAX_PATTERNS)
def compile_pattern(text: str, ends: bool = False) -> Matcher:
    """Compile a pattern for ASCII names; `ends` matches a whole name or a suffix after a dot, as PEFT's `rank_pattern`.

    Raises FormatError, without the file's name, if the pattern is invalid or can't be matched in bounded time.
    """
    if len(text) > MAX_PATTERN:
        raise FormatError(f"the pattern {text[:60]!r} … has {len(text)} characters, expected at most {MAX_PATTERN}")
    re2 = needed("re2", "an adapter whose config has a pattern")
    whole = rf"(.*\.)?({text})$" if ends else text
    try:
        re.compile(whole)
        if DIFFERS_FROM_PYTHON.search(text):
            raise re2.error("has {,n} or a named character class")
        options = re2.Options()
        options.log_errors, options.never_capture, options.max_mem = False, True, MEMORY
        compiled = re2.compile(whole.encode(), options)
    except (re.error, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise FormatError(f"{text[:60]!r} is not a regular expression: {error}") from error
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise FormatError(
            f"the pattern {text[:60]!r} cannot be matched in bounded time ({reason}); rewrite it without lookarounds "
            "and backreferences"
        ) from error
    match = compiled.match if ends else compiled.fullmatch  # like PEFT: a key may close our parenthesis
    return Matcher(lambda name: match(name.encode()) is not None, compiled.programsize)


def check_effort(matchers: Collection[Matcher], names: Collection[str]) -> None:
    """Raise FormatError if matching `names` could take minutes."""
    steps = sum(matcher.size for matcher in matchers) * sum(map(len, names))
    if steps > MAX_STEPS or len(matchers) * len(names) > MAX_MATCHES:
        raise FormatError(f"{len(matchers)} patterns would take too long to match against {len(names)} names")


@dataclass(frozen=True)
class Patterns(Generic[T]):
    """PEFT's `rank_pattern` and `alpha_pattern`: values by patterns for suffixes of module names; first match wins.

    Keys of the form that PEFT and adapterkit write, `^` and an escaped name, are looked up in `names`.
    """

    values: tuple[T, ...] = ()
    names: Mapping[str, int] = field(default_factory=dict)
    matchers: tuple[tuple[int, Matcher], ...] = ()

    @classmethod
    def of(cls, entries: Mapping[str, T]) -> Patterns[T]:
        """Compile the keys of `entries`; raises FormatError, without the file's name, for an invalid pattern."""
        names: dict[str, int] = {}
        matchers: list[tuple[int, Matcher]] = []
        for number, key in enumerate(entries):
            name = re.sub(r"\\(.)", r"\1", key[1:])
            if key == f"^{re.escape(name)}":
                names.setdefault(name, number)
            elif len(matchers) == MAX_PATTERNS:
                raise FormatError(f"has more than {MAX_PATTERNS} patterns that are not `^` and an escaped name")
            else:
                matchers.append((number, compile_pattern(key, ends=True)))
        return cls(tuple(entries.values()), names, tuple(matchers))

    def check(self, names: Collection[str]) -> None:
        """Raise FormatError if matching `names` could take minutes, or if RE2 would differ from Python on them."""
        check_effort([matcher for _, matcher in self.matchers], names)
        if self.matchers and (other := next((name for name in names if not name.isascii()), None)):
            raise FormatError(f"{other[:60]!r} is not ASCII, so it cannot be matched against patterns")

    def first(self, name: str, default: T) -> T:
        """Return the value of the first pattern that `name` matches."""
        exact = self.names.get(name, len(self.values))
        earlier = (number for number, matcher in self.matchers if number < exact and matcher.matches(name))
        number = next(earlier, exact)
        return self.values[number] if number < len(self.values) else default
