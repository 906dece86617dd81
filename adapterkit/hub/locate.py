"""Where a model or an adapter lies: on this disk, in the Hub cache, or on the Hub, whose headers may be enough."""

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
from adapterkit.hub.download import OnBytes, cached, download_of, fetch
from adapterkit.hub.names import on_hub
from adapterkit.hub.remote import outlined, remote_of

log = logging.getLogger(__name__)

Spec = str | os.PathLike[str]


@contextmanager
def _unseen(what: str) -> Iterator[OnBytes]:
    yield lambda done, total: None


# Called as a download begins, with what is downloaded; yields what is called with the bytes that are here, and all.
on_download: ContextVar[Callable[[str], AbstractContextManager[OnBytes]]] = ContextVar("on_download", default=_unseen)


@dataclass(frozen=True)
class Place:
    """Where something lies, and how it came there; of an outline, how many of all its bytes were fetched."""

    path: Path
    how: Literal["local", "cached", "outlined", "downloaded"]
    fetched: int | None = None
    size: int = 0

    @property
    def headers_only(self) -> bool:
        """Whether the weights are not there."""
        return self.how == "outlined"


def locate(spec: Spec, outlines: ExitStack | None = None) -> Place:
    """Where `spec` lies: a path as it is; what a Hub id names, in the cache if all of it is there.

    What is only on the Hub is downloaded, or, with `outlines`, outlined for as long as that stack is open. If the Hub
    is out of reach, what the cache has of that name is taken. Raises FormatError where there is neither, OfflineError,
    NotAllowedError, NoSpaceError.
    """
    id = on_hub(spec)
    if id is None:
        return Place(Path(os.path.expanduser(spec)), "local")
    try:
        remote = remote_of(id)
        download = download_of(remote)
        if not download.missing:
            return Place(fetch(download), "cached")
        if outlines is not None:
            outline = outlines.enter_context(outlined(remote))
            return Place(outline.path, "outlined", outline.fetched, remote.size)
        with on_download.get()(f"getting {id.repo}") as on_bytes:
            return Place(fetch(download, on_bytes), "downloaded")
    except OfflineError as error:
        if (found := cached(id)) is None:
            raise
        log.warning("%s; this is what the cache has", error)
        return Place(found, "cached")


def resolve(spec: Spec) -> Path:
    """The local path of `spec`, downloaded where that is needed; see `locate`."""
    return locate(spec).path


@dataclass(frozen=True)
class Places:
    """Where several things lie; what is not among them is resolved when it is asked for."""

    known: dict[str, Place] = field(default_factory=dict)

    @property
    def outlined(self) -> bool:
        """Whether one of them is there by its headers only."""
        return any(place.headers_only for place in self.known.values())

    def path_of(self, spec: Spec) -> Path:
        """Where `spec` lies."""
        place = self.known.get(str(spec))
        return place.path if place else resolve(spec)


@contextmanager
def located(specs: Sequence[Spec]) -> Iterator[Places]:
    """Yield where each of `specs` lies, outlined where it is only on the Hub.

    None of them is known where outlines do not say enough: in some quantized bases the shapes stand among the weights.
    """
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        for spec in specs:
            place = places[str(spec)] = locate(spec, stack)
            if place.headers_only:
                names = (name for file in place.path.glob("*.safetensors") for name in read_header(file).tensors)
                if shapes_need_values(names):
                    places.clear()
                    break
        yield Places(places)
