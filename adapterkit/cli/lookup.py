"""Where that lies which a command looks at: on this disk, in the Hub cache, or on the Hub, then its headers only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterkit.cli.output import note
from adapterkit.errors import OfflineError
from adapterkit.hub.download import cached, missing_of, resolve
from adapterkit.hub.names import on_hub
from adapterkit.hub.remote import outlined, remote_of
from adapterkit.text import size


@dataclass(frozen=True)
class Lookup:
    """A path, and of what was not downloaded how many bytes of it were fetched, and how many it has."""

    path: Path
    fetched: int | None = None
    whole: int = 0

    @property
    def headers_only(self) -> bool:
        """Whether the weights are not there."""
        return self.fetched is not None

    @property
    def told(self) -> str:
        """What was fetched, for people."""
        if self.fetched is None:
            return ""
        return f"{size(self.fetched)} of {size(self.whole)} on the Hub: headers and configs; --full gets the weights"


@contextmanager
def looked_at(spec: str, full: bool) -> Iterator[Lookup]:
    """Where `spec` can be looked at; with `full` it is downloaded where that is needed."""
    id = on_hub(spec)
    if id is None:
        yield Lookup(Path(os.path.expanduser(spec)))
        return
    if full:
        yield Lookup(resolve(spec))
        return
    try:
        remote = remote_of(id)
    except OfflineError as error:
        if (kept := cached(id)) is None:
            raise
        note(f"{error}; this is what the cache has")
        yield Lookup(kept)
        return
    if not missing_of(remote) and (kept := cached(id)) is not None:
        yield Lookup(kept)
        return
    with outlined(remote) as outline:
        yield Lookup(outline.path, outline.fetched, remote.size)
