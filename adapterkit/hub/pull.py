"""Download models and adapters into the Hub cache, and copy them to a folder if wanted."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.errors import FormatError, UsageError
from adapterkit.files.staging import Destination, staged
from adapterkit.files.writing import copy_file
from adapterkit.hub.download import Download, fetch_steps, plan_download
from adapterkit.hub.events import BytesDone, Fetched, Pulled
from adapterkit.hub.names import cache_folder, parse_hub_id
from adapterkit.hub.remote import find_remote
from adapterkit.reprs import Displayed
from adapterkit.text import counted, size


@dataclass(frozen=True, repr=False)
class PullPlan(Displayed):
    """The downloads, and the folder to copy a single one to."""

    downloads: tuple[Download, ...]
    destination: Destination | None = None
    unit: ClassVar[str] = "B"

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "downloads": [
                {
                    "id": str(one.remote.id),
                    "commit": one.remote.commit,
                    "bytes": one.remaining,
                    "files": len(one.missing),
                }
                for one in self.downloads
            ]
        }

    def brief(self) -> str:
        ids = ", ".join(str(download.remote.id) for download in self.downloads)
        return f"{ids}, {size(sum(download.remaining for download in self.downloads))} to download"

    def lines(self) -> list[str]:
        """The plan as text, a line for each repository."""
        return [f"{one.remote.id}: {_missing(one)}, {size(one.free)} free" for one in self.downloads]

    def steps(self) -> Generator[BytesDone | Fetched | Pulled, None, None]:
        """Download everything; yields progress, each finished repository, then the result."""
        paths = []
        for download in self.downloads:
            for event in fetch_steps(download):
                if isinstance(event, BytesDone):
                    yield event
                else:
                    path = event if self.destination is None else _copied(event, download, self.destination)
            yield Fetched(str(download.remote.id), path)
            paths.append(path)
        yield Pulled(tuple(paths))


def plan_pull(ids: Sequence[str], out: Path | None = None) -> PullPlan:
    """Plan to download `ids`, each org/name[@revision][:folder], and to copy a single one to the new folder `out`.

    Cached files are compared with the hashes on the Hub. Raises UsageError, FormatError for an invalid id,
    OutputExistsError, and the errors of `call_hub`.
    """
    if not ids:
        raise UsageError("no id given")
    if out is not None and len(ids) != 1:
        raise UsageError("`out` is one folder", hint="pull one ID at a time")
    parsed = []
    for text in ids:
        if (id := parse_hub_id(text)) is None:
            raise FormatError(f"{text}: not a valid Hub id; expected org/name[@revision][:folder]")
        parsed.append(id)
    destination = None if out is None else Destination(out, (cache_folder(parsed[0]),))
    if destination is not None:
        destination.check()
    return PullPlan(tuple(plan_download(find_remote(id), every_byte=True) for id in parsed), destination)


def _copied(path: Path, download: Download, destination: Destination) -> Path:
    """Copy the files of a snapshot to a new folder."""
    prefix = download.remote.id.at("")
    with staged(destination) as folder:
        for name in (file.name.removeprefix(prefix) for file in download.remote.files):
            copy_file(path, name, folder / name)
    return destination.out


def _missing(download: Download) -> str:
    if not download.missing:
        return "up to date, every byte verified"
    return f"{counted(len(download.missing), 'file')}, {size(download.remaining)} to download"
