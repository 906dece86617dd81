"""What is a name on the Hub, and what is a local path: `org/name[@revision][:folder]`."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from adapterkit.adapter.formats.table import weights_suffixes
from adapterkit.errors import FormatError
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
        """The path in the repository of a file of the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def parsed(text: str) -> HubId | None:
    """`text` as a name on the Hub, where it can be one."""
    match = PATTERN.fullmatch(text)
    if (
        match is None
        or text.startswith(".")
        or ".." in f"{match['repo']}@{match['revision']}"
        or not text.isprintable()
    ):
        return None
    folder = (match["folder"] or "").strip("/")
    return HubId(match["repo"], match["revision"], folder) if not folder or is_inner(folder) else None


def is_inner(name: str) -> bool:
    """Whether a path from a stranger stays below the folder that it is joined to, and can be shown."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES for part in parts)
    )


def on_hub(spec: str | os.PathLike[str]) -> HubId | None:
    """What `spec` names on the Hub; None where it is a local path.

    Raises FormatError for what looks like a path, beside files that are there, and is none.
    """
    path, found = Path(os.path.expanduser(spec)), parsed(str(spec))  # Path's own raises for users that there are not
    if os.path.lexists(path) or found is None:  # Path's own raise for names that are too long
        return None
    if (os.path.isdir(path.parent) and path.parent != Path()) or path.suffix in weights_suffixes():
        raise FormatError(f"{spec}: no such file or directory")
    return found


def hub_cache() -> Path:
    """The Hub cache, where the client has it, or would have it: importing the client takes longer than all else."""
    if client := sys.modules.get("huggingface_hub.constants"):
        return Path(client.HF_HUB_CACHE)
    set_, user = os.environ.get, os.path.expanduser
    home = set_("HF_HOME", os.path.join(set_("XDG_CACHE_HOME", os.path.join(user("~"), ".cache")), "huggingface"))
    old = set_("HUGGINGFACE_HUB_CACHE", os.path.join(os.path.expandvars(user(home)), "hub"))
    return Path(os.path.expandvars(user(set_("HF_HUB_CACHE", old))))


def cache_folder(id: HubId) -> Path:
    """The folder of the Hub cache that holds a repository, with all its revisions, or will hold it."""
    return hub_cache() / f"models--{id.repo.replace('/', '--')}"


def names_in_cache() -> list[str]:
    """The repositories of models and adapters that the Hub cache holds, whole or in part."""
    folders = sorted(hub_cache().glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


def place_of(spec: str | os.PathLike[str]) -> Path:
    """The local path that `spec` is read from: the path itself, or the cache folder of the repository it names."""
    id = on_hub(spec)
    return Path(os.path.expanduser(spec)) if id is None else cache_folder(id)


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub."""
    return parsed(name) is not None


def hub_id(spec: str | os.PathLike[str]) -> str | None:
    """The repository that `spec` names on the Hub, or None where it is a local path."""
    found = parsed(str(spec))
    return found.repo if found and not os.path.exists(os.path.expanduser(spec)) else None


def public_name(name: str | None) -> str | None:
    """`name` where it is a Hub id; a local path, which would leak directory names, is none."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") else None
