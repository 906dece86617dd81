"""Models and adapters got from the Hub into its cache, and from there, where that is asked for, into a folder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.errors import FormatError, UsageError
from adapterkit.files.staging import Destination, staged
from adapterkit.files.writing import copy_file
from adapterkit.hub.download import Download, download_of, fetching
from adapterkit.hub.events import BytesDone, Fetched, Pulled
from adapterkit.hub.names import cache_folder, parsed
from adapterkit.hub.remote import remote_of
from adapterkit.text import counted, size, visible


@dataclass(frozen=True)
class PullPlan:
    """What is to be downloaded, and the folder that it is copied to besides."""

    downloads: tuple[Download, ...]
    destination: Destination | None = None
    unit: ClassVar[str] = "B"

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        """The plan for programs."""
        rows = [(one.remote, one.to_get, len(one.missing)) for one in self.downloads]
        return {
            "downloads": [
                {"id": str(remote.id), "commit": remote.commit, "bytes": bytes_, "files": files}
                for remote, bytes_, files in rows
            ]
        }

    def lines(self) -> list[str]:
        """The plan for people."""
        return [f"{one.remote.id}: {_missing(one)}, {size(one.free)} free" for one in self.downloads]

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))

    def steps(self) -> Generator[BytesDone | Fetched | Pulled, None, None]:
        """Download everything: the bytes that are here, each id once it is, the result last."""
        paths = []
        for download in self.downloads:
            for event in fetching(download):
                if isinstance(event, BytesDone):
                    yield event
                else:
                    path = event if self.destination is None else _copied(event, download, self.destination)
            yield Fetched(str(download.remote.id), path)
            paths.append(path)
        yield Pulled(tuple(paths))


def plan_pull(ids: Sequence[str], out: Path | None = None) -> PullPlan:
    """Plan to download `ids`, each org/name[@revision][:folder], and to copy the only one to the new folder `out`.

    What the cache has of them is read and compared with the Hub's hashes. Raises UsageError, FormatError for what is
    no name on the Hub, OutputExistsError, and what `hub.client.ask` does.
    """
    if not ids:
        raise UsageError("no id given")
    if out is not None and len(ids) != 1:
        raise UsageError("`out` is one folder", hint="pull one ID at a time")
    known = [id for text in ids if (id := parsed(text)) is not None]
    if len(known) < len(ids):
        wrong = next(text for text in ids if parsed(text) is None)
        raise FormatError(f"{wrong}: is no name that the Hub allows, expected org/name, with @revision or :folder")
    destination = None if out is None else Destination(out, (cache_folder(known[0]),))
    if destination is not None:
        destination.check()
    return PullPlan(tuple(download_of(remote_of(id), every_byte=True) for id in known), destination)


def _copied(path: Path, download: Download, destination: Destination) -> Path:
    """The files of a snapshot as a folder of their own."""
    prefix = download.remote.id.at("")
    with staged(destination) as folder:
        for name in (file.name.removeprefix(prefix) for file in download.remote.files):
            copy_file(path, name, folder / name)
    return destination.out


def _missing(download: Download) -> str:
    if not download.missing:
        return "all of it is here, every byte checked"
    return f"{counted(len(download.missing), 'file')}, {size(download.to_get)} to get"
