"""Resolve a model or an adapter to a folder: local, in the Hub cache, headers only, or downloaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adapterkit.base.quant import shapes_need_values
from adapterkit.errors import OfflineError
from adapterkit.files.safetensors import read_header
from adapterkit.hub.download import OnBytes, cached_folder, fetch, plan_download
from adapterkit.hub.names import as_hub_id
from adapterkit.hub.remote import fetch_headers, find_remote

log = logging.getLogger(__name__)

Spec = str | os.PathLike[str]


@contextmanager
def _no_progress(what: str) -> Iterator[OnBytes]:
    yield lambda done, total: None


# Called with a description when a download starts; yields the callback for (bytes done, bytes in total).
on_download: ContextVar[Callable[[str], AbstractContextManager[OnBytes]]] = ContextVar(
    "on_download", default=_no_progress
)


@dataclass(frozen=True)
class Location:
    """The folder of a model or an adapter, and how it was found."""

    path: Path
    how: Literal["local", "cached", "headers", "downloaded"]
    fetched: int | None = None  # bytes of the headers and configs
    size: int = 0  # bytes of all files on the Hub
    absent: tuple[str, ...] = ()  # its other files on the Hub, with headers only

    @property
    def headers_only(self) -> bool:
        """Whether the folder lacks the weights."""
        return self.how == "headers"


def locate(spec: Spec, headers_until: ExitStack | None = None) -> Location:
    """The folder of `spec`: itself if it is a path, for a Hub id the Hub cache if it is complete.

    Otherwise the repository is downloaded, or with `headers_until` only its headers, until that stack closes. If the
    Hub cannot be reached, the latest cached revision is used. Raises FormatError if there is no such path or
    repository, OfflineError, NotAllowedError, NoSpaceError.
    """
    id = as_hub_id(spec)
    if id is None:
        return Location(Path(os.path.expanduser(spec)), "local")
    try:
        remote = find_remote(id)
        download = plan_download(remote)
        if not download.missing:
            return Location(fetch(download), "cached")
        if headers_until is not None:
            headers = headers_until.enter_context(fetch_headers(remote))
            return Location(headers.path, "headers", headers.fetched, remote.size, headers.absent)
        with on_download.get()(f"downloading {id.repo}") as on_bytes:
            return Location(fetch(download, on_bytes), "downloaded")
    except OfflineError as error:
        if (found := cached_folder(id)) is None:
            raise
        log.warning("%s; using the Hub cache", error)
        return Location(found, "cached")


def resolve(spec: Spec) -> Path:
    """The local path of `spec`, downloaded if needed; see `locate`."""
    return locate(spec).path


@dataclass(frozen=True)
class Locations:
    """The folders of several models and adapters; others are resolved on demand."""

    known: dict[str, Location] = field(default_factory=dict)

    @property
    def headers_only(self) -> bool:
        """Whether any of them lacks its weights."""
        return any(location.headers_only for location in self.known.values())

    def path_of(self, spec: Spec) -> Path:
        """The folder of `spec`."""
        location = self.known.get(str(spec))
        return location.path if location else resolve(spec)


@contextmanager
def locate_all(specs: Sequence[Spec]) -> Iterator[Locations]:
    """Yield the folders of `specs`, with headers only for those that are not on this disk.

    Yields none if headers are not enough: some quantized bases store shapes among the weights.
    """
    with ExitStack() as stack:
        locations: dict[str, Location] = {}
        for spec in specs:
            location = locations[str(spec)] = locate(spec, stack)
            if location.headers_only:
                names = (name for file in location.path.glob("*.safetensors") for name in read_header(file).tensors)
                if shapes_need_values(names):
                    locations.clear()
                    break
        yield Locations(locations)
