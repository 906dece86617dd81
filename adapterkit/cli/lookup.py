"""Where a command finds what it looks at, and how it says that only headers were fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from adapterkit.hub.locate import Location, locate
from adapterkit.text import size


@contextmanager
def looked_at(spec: str, full: bool) -> Iterator[Location]:
    """Where `spec` can be looked at; with `full` it is downloaded where that is needed."""
    with ExitStack() as outlines:
        yield locate(spec, None if full else outlines)


def fetched_of(place: Location) -> str:
    """What was fetched of an outline, for people."""
    if place.fetched is None:
        return ""
    return f"{size(place.fetched)} of {size(place.size)} on the Hub: headers and configs; --full gets the weights"
