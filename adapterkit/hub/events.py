"""Events of downloads and uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BytesDone:
    """`done` of `total` bytes are transferred; `what` describes the transfer."""

    done: int
    total: int
    what: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """The repository `id` is in the folder `path`, verified."""

    id: str
    path: Path


@dataclass(frozen=True, slots=True)
class Pulled:
    """The end of a download: the folder of each id."""

    paths: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The folder of the first id."""
        return self.paths[0]


@dataclass(frozen=True, slots=True)
class Pushed:
    """The end of an upload: the URL of the repository or pull request; `commit` is None if nothing had changed."""

    url: str
    commit: str | None
