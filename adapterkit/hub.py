"""The Hugging Face Hub as a place where bases and adapters lie: a Hub id becomes a local path.

Facts about the client: huggingface_hub 1.31 to 2.x; it is imported only when a Hub id is given.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from adapterkit.errors import AdapterkitError, FormatError, NotAllowedError, OfflineError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<folder>[\w./-]+))?")

# Weights in other formats are not wanted: only safetensors is merged.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py", "LICENSE*", "adapter_model.bin"]


def resolve(spec: str | os.PathLike[str]) -> Path:
    """The local path of `spec`: a path as it is, `org/name[@revision][:folder]` from the cache, or downloaded.

    Raises FormatError where there is neither, OfflineError where the cache does not have it and the Hub is out of
    reach, NotAllowedError where the Hub asks for a login.
    """
    path = Path(spec).expanduser()
    match = HUB_ID.fullmatch(str(spec))
    if os.path.lexists(path) or match is None or ".." in str(spec):  # Path's own raise for names that are too long
        return path
    if (os.path.isdir(path.parent) and path.parent != Path()) or path.suffix in (".safetensors", ".bin"):
        raise FormatError(f"{spec}: there is no such file or directory")
    return _snapshot(match["repo"], match["revision"], match["folder"])


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def hub_id(spec: str | os.PathLike[str]) -> str | None:
    """The repository that `spec` names on the Hub, or None where it is a local path."""
    match = HUB_ID.fullmatch(str(spec))
    return match["repo"] if match and not os.path.exists(Path(spec).expanduser()) else None


def _snapshot(repo: str, revision: str | None, folder: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )  # fmt: skip

    patterns = [f"{folder}/{pattern}" for pattern in PATTERNS] if folder else PATTERNS

    def fetch(local: bool) -> Path:
        root = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=local)
        return Path(root) / (folder or "")

    try:
        found = fetch(local=True)
        if any(found.glob("*.safetensors")) or any(found.glob("*.bin")):
            return found
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return fetch(local=False)
    except HFValidationError as error:
        raise FormatError(f"{repo}: neither a local path nor a name that the Hub allows") from error
    except GatedRepoError as error:
        raise NotAllowedError(
            f"{repo}: is gated; ask for access on its page on the Hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FormatError(f"{repo}: neither a local path nor a repository on the Hub (or a private one)") from error
    except LocalEntryNotFoundError as error:
        raise OfflineError(f"{repo}: no such local path, not in the Hub cache, and the Hub is out of reach") from error
    except HfHubHTTPError as error:
        raise AdapterkitError(
            f"{repo}: the Hub refused: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    except OSError as error:
        raise OfflineError(f"{repo}: not in the Hub cache, and the Hub cannot be reached ({error})") from error
