"""The files of a repository on the Hub, and their headers alone: a few kilobytes instead of the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.formats import table as formats
from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, OTHER_WEIGHTS
from adapterkit.errors import AdapterkitError, FormatError, OfflineError, UnsafeFileError
from adapterkit.files.jsonfile import MAX_HEADER_BYTES
from adapterkit.files.staging import map_os_errors
from adapterkit.hub.client.call import call_hub
from adapterkit.hub.client.limits import STREAMED
from adapterkit.hub.client.parallel import parallel_map
from adapterkit.hub.names import HubId, is_safe_path

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMPANIONS = (".json", ".model", ".txt", ".jinja", ".md", ".py", ".yaml", ".residuals")  # wanted with the weights
FIRST_REQUEST = 100_000  # bytes of the first request: most headers are smaller
PARALLEL_REQUESTS = 8
MAX_CONFIG_BYTES = 50_000_000  # the largest models have an index of about 10 MB
MAX_BYTES = 1 << 43  # of a file; the Hub's own limit is much lower
COMMIT, DIGEST = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, with the SHA-256 of its bytes or its git object id."""

    name: str  # its path in the repository
    size: int
    sha256: str | None
    oid: str | None = None


@dataclass(frozen=True)
class Remote:
    """The files of one adapter, or of a base, in a repository at a commit."""

    id: HubId
    commit: str
    files: tuple[RemoteFile, ...]
    is_adapter: bool

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class HeaderFolder:
    """A folder with the configs of a repository, and its weights files with only their headers filled in."""

    path: Path
    fetched: int  # bytes
    absent: tuple[str, ...]  # the files that were not fetched


def find_remote(id: HubId) -> Remote:
    """Look up a repository, and choose the files of its adapter or base.

    Raises FormatError if it has neither, or several adapters in folders and `id` names none of them, and
    UnsafeFileError for invalid names, sizes and hashes.
    """

    def list_files(api: HfApi) -> tuple[str, list[RemoteFile]]:
        info = api.model_info(id.repo, revision=id.revision, files_metadata=True)
        files = [
            RemoteFile(str(file.rfilename), file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)  # type: ignore[arg-type]
            for file in info.siblings or []
        ]
        return str(info.sha), files

    try:
        commit, files = call_hub(str(id), list_files)
    except OfflineError as error:
        raise OfflineError(f"{id}: no such path, and {str(error).removeprefix(f'{id}: ')}") from error
    prefix = id.at("")
    here = {file.name.removeprefix(prefix): file for file in files if file.name.startswith(prefix)}
    names, is_adapter = _select_files(id, here)
    remote = Remote(id, commit, tuple(here[name] for name in names), is_adapter)
    _check(remote)
    return remote


def _select_files(id: HubId, here: dict[str, RemoteFile]) -> tuple[list[str], bool]:
    """The files of the adapter or base, and whether it is an adapter."""
    if formats.has_adapter_file(here):
        weights = here.keys() & formats.weights_names()
        wanted = weights.difference(formats.pickled_names()) or weights
        return [name for name in here if "/" not in name and (name in wanted or _wanted(name))], True
    if CONFIG in here:
        return list(_base_files(here)), False
    folders = sorted(_adapter_folders(here))
    if folders:
        named = ", ".join(str(HubId(id.repo, id.revision, id.at(folder))) for folder in folders[:6])
        more = f", and {len(folders) - 6} more" if len(folders) > 6 else ""
        raise FormatError(f"{id}: several adapters in folders; name one of them: {named}{more}")
    if len([name for name in here if name.endswith(".safetensors") and "/" not in name]) == 1:
        return [name for name in here if _wanted(name)], True
    found = f"no folder {id.folder} in the repository" if id.folder and not here else "neither an adapter nor a base"
    raise FormatError(f"{id}: {found}; expected {' or '.join((*formats.config_names(), CONFIG))}")


def _check(remote: Remote) -> None:
    """Raise UnsafeFileError for names that leave the folder, and for sizes and hashes that cannot be."""
    if not COMMIT.fullmatch(remote.commit):
        raise UnsafeFileError(f"{remote.id}: invalid commit {remote.commit[:80]!r}, expected 40 hexadecimal digits")
    for file in remote.files:
        where = f"{remote.id}: file {file.name[:80]!r}"
        if not is_safe_path(file.name):
            raise UnsafeFileError(f"{where}: unsafe name: leaves the folder, is too long, or not printable")
        if not isinstance(file.size, int) or not 0 <= file.size <= MAX_BYTES:
            raise UnsafeFileError(f"{where}: invalid size, {file.size} bytes")
        for hash, pattern in ((file.sha256, DIGEST), (file.oid, COMMIT)):
            if hash is not None and not pattern.fullmatch(str(hash)):
                raise UnsafeFileError(f"{where}: invalid hash {str(hash)[:80]!r}")


def _wanted(name: str) -> bool:
    base = name.rpartition("/")[2]
    beside = not base.startswith(".") and base.endswith((".safetensors", *COMPANIONS))
    return beside or base.startswith("LICENSE")


def _adapter_folders(names: Iterable[str]) -> set[str]:
    """The folders that contain an adapter's config."""
    paths = [PurePosixPath(name) for name in names]
    return {str(path.parent) for path in paths if path.name in formats.config_names() and len(path.parts) > 1}


def _base_files(here: dict[str, RemoteFile]) -> Iterator[str]:
    """Yield the files that a merge reads or copies, without duplicate weights in the vendor's own format."""
    inner = _adapter_folders(here)
    standard = any(name.startswith("model") and name.endswith((".safetensors", INDEX_SUFFIX)) for name in here)
    for name in here:
        nested = "/" in name
        if not _wanted(name) or any(name.startswith(f"{folder}/") for folder in inner):
            continue
        if name.endswith(OTHER_WEIGHTS) and (nested or (standard and not name.startswith("model"))):
            continue
        yield name


@contextmanager
def fetch_headers(remote: Remote) -> Iterator[HeaderFolder]:
    """Fetch configs and headers into a temporary folder, for everything that doesn't read weights.

    Files have their true sizes, with holes for the weights. Raises FormatError for pickled weights and broken headers.
    """
    id = remote.id
    if remote.is_adapter and not any(file.name.endswith(".safetensors") for file in remote.files):
        raise FormatError(f"{id}: pickled weights, which have no header to inspect", hint="`full=True` downloads them")
    # After ctrl-C, abandoned requests may still write there.
    with TemporaryDirectory(prefix="adapterkit-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / id.repo.rpartition("/")[2]  # the name in messages
        path.mkdir()
        try:
            fetched = sum(parallel_map(lambda file: _fetch_header(remote, file, path), remote.files, PARALLEL_REQUESTS))
            names = (file.name.removeprefix(id.at("")) for file in remote.files)
            yield HeaderFolder(path, fetched, tuple(name for name in names if not (path / name).exists()))
        except AdapterkitError as error:
            raise type(error)(str(error).replace(f"{path}/", f"{id}/").replace(str(path), str(id))) from error


def _fetch_header(remote: Remote, file: RemoteFile, folder: Path) -> int:
    """Write a config, or the header of a weights file, into `folder`; returns the bytes fetched."""
    name = file.name.removeprefix(remote.id.at(""))
    if name.endswith(".safetensors"):
        data = _read_range(remote, file, FIRST_REQUEST)
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < length <= min(file.size, 8 + MAX_HEADER_BYTES):
            data += _read_range(remote, file, length, len(data))
    elif name in (CONFIG, *formats.config_names()) or name.endswith(INDEX_SUFFIX):
        if file.size > MAX_CONFIG_BYTES:
            raise FormatError(f"{remote.id}/{name}: {file.size:,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
        data = _read_range(remote, file, file.size)
    else:
        return 0
    target = folder / name
    with map_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        os.truncate(target, file.size)
    return len(data)


def _read_range(remote: Remote, file: RemoteFile, stop: int, start: int = 0) -> bytes:
    """The bytes of a file from `start` to `stop`, or to its end."""
    if not file.size:
        return b""

    def read_range(_: HfApi) -> bytes:
        with open_range(remote, file, start, stop) as response:
            skip = start if response.status_code == 200 else 0  # a server without ranges sends the whole file
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + stop - start:
                    break
            expected = min(stop, file.size) - start
            if len(data) < skip + expected:
                sent = f"{len(data):,} of {skip + expected:,} bytes"
                raise OfflineError(f"{remote.id}: the Hub sent {sent} of {file.name}; try again")
            return bytes(data[skip : skip + stop - start])

    return call_hub(str(remote.id), read_range)


@contextmanager
def open_range(remote: Remote, file: RemoteFile, start: int, stop: int | None = None) -> Iterator[Any]:
    """Request the bytes of a file from `start` to `stop`; yields the response, to be streamed."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(remote.id.repo, file.name, revision=remote.commit)
    span = f"bytes={start}-{'' if stop is None else stop - 1}"
    headers = build_hf_headers() | {"Range": span, "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, extensions={STREAMED: True}) as response:
        hf_raise_for_status(response)
        yield response
