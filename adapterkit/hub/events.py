"""What a download or an upload tells while it runs, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BytesDone:
    """`done` of `total` bytes are where they go; `what` says of what."""

    done: int
    total: int
    what: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `id` names is in the folder `path`, every byte checked."""

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
    """The end of an upload: where it is now; `commit` is None where nothing had changed."""

    url: str
    commit: str | None
