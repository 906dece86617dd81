"""Hub ids, `org/name[@revision][:folder]`, told apart from local paths."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from adapterkit.adapter.formats.table import weights_suffixes
from adapterkit.errors import MissingFileError
from adapterkit.files.staging import MAX_NAME_BYTES

PATTERN = re.compile(r"(?P<repo>[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<folder>[^:\\]+))?")


@dataclass(frozen=True)
class HubId:
    """A repository on the Hub, at a revision, and a folder in it."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.folder}" if self.folder else "")

    def at(self, name: str) -> str:
        """The path in the repository of the file `name` in the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def parse_hub_id(text: str) -> HubId | None:
    """Parse `text` as a Hub id; None if it cannot be one."""
    match = PATTERN.fullmatch(text)
    if (
        match is None
        or text.startswith(".")
        or ".." in f"{match['repo']}@{match['revision']}"
        or not text.isprintable()
    ):
        return None
    folder = (match["folder"] or "").strip("/")
    return HubId(match["repo"], match["revision"], folder) if not folder or is_safe_path(folder) else None


def is_safe_path(name: str) -> bool:
    """Whether an untrusted relative path is printable and stays below the folder that it is joined to."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES for part in parts)
    )


def as_hub_id(spec: str | os.PathLike[str]) -> HubId | None:
    """`spec` as a Hub id; None if it is a local path.

    Raises FormatError if it looks like a path in an existing folder, or like a weights file, and does not exist.
    """
    # Functions of os.path, because pathlib's raise for unknown users and for names that are too long.
    path, id = Path(os.path.expanduser(spec)), parse_hub_id(str(spec))
    if os.path.lexists(path) or id is None:
        return None
    if (os.path.isdir(path.parent) and path.parent != Path()) or path.suffix in weights_suffixes():
        raise MissingFileError(f"{spec}: no such file or directory")
    return id


def hub_cache() -> Path:
    """The Hub cache as the client would choose it: importing the client takes too long for completion."""
    if client := sys.modules.get("huggingface_hub.constants"):
        return Path(client.HF_HUB_CACHE)
    get, user = os.environ.get, os.path.expanduser
    home = get("HF_HOME", os.path.join(get("XDG_CACHE_HOME", os.path.join(user("~"), ".cache")), "huggingface"))
    legacy = get("HUGGINGFACE_HUB_CACHE", os.path.join(os.path.expandvars(user(home)), "hub"))
    return Path(os.path.expandvars(user(get("HF_HUB_CACHE", legacy))))


def cache_folder(id: HubId) -> Path:
    """The folder of the Hub cache for a repository, with all its revisions; it may not exist yet."""
    return hub_cache() / f"models--{id.repo.replace('/', '--')}"


def names_in_cache() -> list[str]:
    """The model repositories in the Hub cache, including partial ones."""
    folders = sorted(hub_cache().glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


def input_path(spec: str | os.PathLike[str]) -> Path:
    """The local path that `spec` is read from: itself, or the cache folder of its repository."""
    id = as_hub_id(spec)
    return Path(os.path.expanduser(spec)) if id is None else cache_folder(id)


def is_hub_id(name: str) -> bool:
    """Whether `name` is a valid Hub id."""
    return parse_hub_id(name) is not None


def hub_repo(spec: str | os.PathLike[str]) -> str | None:
    """The repository of the Hub id `spec`, or None if it is a local path."""
    found = parse_hub_id(str(spec))
    return found.repo if found and not os.path.exists(os.path.expanduser(spec)) else None


def public_name(name: str | None) -> str | None:
    """`name` if it is a Hub id; None for local paths, which would publish directory names."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") else None
