"""What a repository on the Hub has, and of that only the headers: some kilobytes instead of the weights."""

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
from adapterkit.hub.client.ask import ask
from adapterkit.hub.client.parallel import parallel_map
from adapterkit.hub.client.session import FILE
from adapterkit.hub.names import HubId, is_inner

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BESIDE = (".json", ".model", ".txt", ".jinja", ".md", ".py", ".yaml", ".residuals")  # wanted with the weights
FIRST = 100_000  # bytes asked for first: most headers are smaller
AT_ONCE = 8  # requests
MAX_CONFIG_BYTES = 50_000_000  # the index of the largest models has some ten
MAX_BYTES = 1 << 43  # of a file; the Hub allows much less
COMMIT, DIGEST = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, and what its bytes are known by: their SHA-256, or what git calls them."""

    name: str  # from the repository's top
    size: int
    sha256: str | None
    oid: str | None = None


@dataclass(frozen=True)
class Remote:
    """What is wanted of a repository at a commit: the files of one adapter, or of a base."""

    id: HubId
    commit: str
    files: tuple[RemoteFile, ...]
    is_adapter: bool

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Outline:
    """A folder with the configs of a repository, and its weights files with nothing but their headers in them."""

    path: Path
    fetched: int  # bytes


def remote_of(id: HubId) -> Remote:
    """Ask what `id` has, and choose what belongs to its adapter or base.

    Raises FormatError where there is neither, or several adapters in folders and none was named, and UnsafeFileError
    for names, sizes and hashes that no repository has.
    """

    def question(api: HfApi) -> tuple[str, list[RemoteFile]]:
        info = api.model_info(id.repo, revision=id.revision, files_metadata=True)
        files = [
            RemoteFile(str(one.rfilename), one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)  # type: ignore[arg-type]
            for one in info.siblings or []
        ]
        return str(info.sha), files

    try:
        commit, files = ask(str(id), question)
    except OfflineError as error:
        raise OfflineError(f"{error}; nor is there such a local path") from error
    prefix = id.at("")
    here = {file.name.removeprefix(prefix): file for file in files if file.name.startswith(prefix)}
    names, is_adapter = _chosen(id, here)
    remote = Remote(id, commit, tuple(here[name] for name in names), is_adapter)
    _check(remote)
    return remote


def _chosen(id: HubId, here: dict[str, RemoteFile]) -> tuple[list[str], bool]:
    """The files of the adapter, or of the base, and whether it is an adapter."""
    if formats.has_adapter_file(here):
        there = here.keys() & formats.weights_names()
        wanted = there.difference(formats.pickled_names()) or there
        return [name for name in here if "/" not in name and (name in wanted or _wanted(name))], True
    if CONFIG in here:
        return list(_of_base(here)), False
    folders = sorted(_adapter_folders(here))
    if folders:
        named = ", ".join(str(HubId(id.repo, id.revision, id.at(folder))) for folder in folders[:6])
        more = f", and {len(folders) - 6} more" if len(folders) > 6 else ""
        raise FormatError(f"{id}: holds its adapters in folders: name one of them: {named}{more}")
    weights = [name for name in here if name.endswith(".safetensors") and "/" not in name]
    if len(weights) == 1:
        return [name for name in here if _wanted(name)], True
    what = f"the folder {id.folder} is not in it" if id.folder and not here else "holds neither an adapter nor a base"
    raise FormatError(f"{id}: {what}; expected {' or '.join((*formats.config_names(), CONFIG))}")


def _check(remote: Remote) -> None:
    """Raise UnsafeFileError for what would be written elsewhere than where it belongs, or could not be written."""
    if not COMMIT.fullmatch(remote.commit):
        raise UnsafeFileError(
            f"{remote.id}: its commit is called {remote.commit[:80]!r}, expected 40 hexadecimal digits"
        )
    for file in remote.files:
        what = f"{remote.id}: the file {file.name[:80]!r}"
        if not is_inner(file.name):
            raise UnsafeFileError(
                f"{what} has a name that cannot be used here: it leads elsewhere, is too long, or not printable"
            )
        if not isinstance(file.size, int) or not 0 <= file.size <= MAX_BYTES:
            raise UnsafeFileError(f"{what} is said to be {file.size} bytes long")
        for hash, pattern in ((file.sha256, DIGEST), (file.oid, COMMIT)):
            if hash is not None and not pattern.fullmatch(str(hash)):
                raise UnsafeFileError(f"{what} goes by a hash that is none, {str(hash)[:80]!r}")


def _wanted(name: str) -> bool:
    base = name.rpartition("/")[2]
    beside = not base.startswith(".") and base.endswith((".safetensors", *BESIDE))
    return beside or base.startswith("LICENSE")


def _adapter_folders(names: Iterable[str]) -> set[str]:
    """The folders below that hold an adapter's config."""
    paths = [PurePosixPath(name) for name in names]
    return {str(path.parent) for path in paths if path.name in formats.config_names() and len(path.parts) > 1}


def _of_base(here: dict[str, RemoteFile]) -> Iterator[str]:
    """What a merge reads or copies: not the same weights again in a format of the model's maker, nor what trained."""
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
def outlined(remote: Remote) -> Iterator[Outline]:
    """Make, for as long as it is looked at, a folder of which everything can be found out that headers tell.

    Files have their true sizes with holes for the weights; those must not be read. Raises FormatError for weights
    that have no header, and for broken ones, by their names on the Hub.
    """
    id = remote.id
    if remote.is_adapter and not any(file.name.endswith(".safetensors") for file in remote.files):
        raise FormatError(
            f"{id}: its weights are pickled, and cannot be inspected by headers", hint="`full=True` gets them"
        )
    # After ctrl-C, requests that were not waited for may still write there.
    with TemporaryDirectory(prefix="adapterkit-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / id.repo.rpartition("/")[2]  # what it is called in messages
        path.mkdir()
        try:
            fetched = sum(parallel_map(lambda file: _outline(remote, file, path), remote.files, AT_ONCE))
            yield Outline(path, fetched)
        except AdapterkitError as error:
            raise type(error)(str(error).replace(f"{path}/", f"{id}/").replace(str(path), str(id))) from error


def _outline(remote: Remote, file: RemoteFile, folder: Path) -> int:
    """Write a config, or the header of a weights file, into `folder`; returns the bytes it took."""
    name = file.name.removeprefix(remote.id.at(""))
    if name.endswith(".safetensors"):
        data = _begin(remote, file, FIRST)
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < length <= min(file.size, 8 + MAX_HEADER_BYTES):
            data += _begin(remote, file, length, len(data))
    elif name in (CONFIG, *formats.config_names()) or name.endswith(INDEX_SUFFIX):
        if file.size > MAX_CONFIG_BYTES:
            raise FormatError(f"{remote.id}/{name}: is {file.size:,} bytes long, which no config is")
        data = _begin(remote, file, file.size)
    else:
        return 0
    target = folder / name
    with map_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        os.truncate(target, file.size)
    return len(data)


def _begin(remote: Remote, file: RemoteFile, stop: int, start: int = 0) -> bytes:
    """The bytes from `start` to `stop` of a file, or to its end."""
    if not file.size:
        return b""

    def question(_: HfApi) -> bytes:
        with opened(remote, file, start, stop) as response:
            skip = start if response.status_code == 200 else 0  # a server that knows no ranges sends everything
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + stop - start:
                    break
            if len(data) < skip + min(stop, file.size) - start:
                raise OfflineError(
                    f"{remote.id}: the Hub sent {len(data):,} bytes of {file.name}, expected more; try again"
                )
            return bytes(data[skip : skip + stop - start])

    return ask(str(remote.id), question)


@contextmanager
def opened(remote: Remote, file: RemoteFile, start: int, stop: int | None = None) -> Iterator[Any]:
    """The answer to a request for the bytes of a file from `start`, to be read as they come."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(remote.id.repo, file.name, revision=remote.commit)
    span = f"bytes={start}-{'' if stop is None else stop - 1}"
    headers = build_hf_headers() | {"Range": span, "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, extensions={FILE: True}) as response:
        hf_raise_for_status(response)
        yield response
