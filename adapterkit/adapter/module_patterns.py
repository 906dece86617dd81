r"""Patterns of module names, by which an adapter is weighted module by module.

A pattern is a run of dotted segments anywhere in a name, so that `mlp` matches every module in an MLP. `layers.0-9` has
a range of numbers, both ends included. `*` alone is one or more segments; within a segment it is any characters. A
backslash takes the next character literally: `0\-9`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache, partial

from adapterkit.errors import UsageError

Segment = Callable[[str], bool]

RANGE = re.compile(r"(\d{1,9})-(\d{1,9})", re.ASCII)
CHARACTERS = re.compile(r"\\(.)|(\*)|(.)", re.DOTALL)


@lru_cache(1 << 17)  # a plan asks for every name several times
def last_match(patterns: tuple[str, ...], name: str) -> int | None:
    """Return the index of the last of `patterns` that matches `name`, or None."""
    return next((index for index in reversed(range(len(patterns))) if matches(patterns[index], name)), None)


def matches(pattern: str, name: str) -> bool:
    """Return whether some run of segments of `name` matches `pattern`. Raises UsageError for an invalid pattern."""
    segments = name.split(".")
    starts = set(range(len(segments)))  # where the rest of the pattern may begin
    for segment in _segments(pattern):
        if segment is None:
            starts = set(range(min(starts) + 1, len(segments) + 1)) if starts else starts
        else:
            starts = {at + 1 for at in starts if at < len(segments) and segment(segments[at])}
    return bool(starts)


@lru_cache(256)
def _segments(pattern: str) -> tuple[Segment | None, ...]:
    """A test for each segment; None for `*`, one or more segments."""
    parts = pattern.replace("\\.", ".").split(".")  # a dot needs no backslash
    if not all(parts):
        raise UsageError(
            f"modules {pattern!r}: expected dotted segments, none empty", hint="for example layers.0-9 or *.mlp"
        )
    return tuple(None if part == "*" else _segment(pattern, part) for part in parts)


def _segment(pattern: str, part: str) -> Segment:
    if found := RANGE.fullmatch(part):
        first, last = map(int, found.groups())
        if first > last:
            raise UsageError(f"modules {pattern!r}: the range {part} is empty", hint=f"give it as {last}-{first}")
        return lambda segment: segment.isdecimal() and len(segment) < 20 and first <= int(segment) <= last
    characters = ("*" if star else f"[{one}]" if (one := escaped or plain) in "*?[" else one
                  for escaped, star, plain in CHARACTERS.findall(part))  # fmt: skip
    return partial(_fits, "".join(characters))


def _fits(glob: str, segment: str) -> bool:
    return fnmatchcase(segment, glob)
