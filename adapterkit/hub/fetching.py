"""What lies on the Hub, on this disk: the size known before, the room checked, and every byte checked after."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapterkit.checkpoint import CONFIG
from adapterkit.errors import AdapterkitError, NoSpaceError, OfflineError
from adapterkit.formats.source import CONFIG as ADAPTER_CONFIG
from adapterkit.formats.source import PICKLED, WEIGHTS
from adapterkit.hub.asking import ask, asking
from adapterkit.hub.names import HubId, on_hub
from adapterkit.hub.remote import Remote, RemoteFile, look, opened, outlined
from adapterkit.staging import errors_of
from adapterkit.tensorfile import read_header

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
OnBytes = Callable[[int, int], None]  # bytes that are here, and all


@dataclass(frozen=True)
class Download:
    """What getting a repository takes: the files that are not here, their bytes, and where they go."""

    remote: Remote
    missing: tuple[RemoteFile, ...]
    cache: Path
    free: int  # bytes

    @property
    def size(self) -> int:
        """Bytes to get."""
        return sum(file.size for file in self.missing)


@contextmanager
def _unseen(what: str) -> Iterator[OnBytes]:
    yield lambda done, total: None


shown: Callable[[str], AbstractContextManager[OnBytes]] = _unseen  # the command line puts its bar here


def resolve(spec: str | os.PathLike[str]) -> Path:
    """The local path of `spec`: a path as it is; what a Hub id names, got where the cache does not have it.

    Where the Hub is out of reach, what the cache has of that name is taken. Raises FormatError where there is neither,
    OfflineError, NotAllowedError, NoSpaceError.
    """
    id = on_hub(spec)
    if id is None:
        return Path(spec).expanduser()
    try:
        download = download_of(look(id))
        with shown(f"getting {id.repo}") if download.missing else _unseen("") as on_bytes:
            return fetch(download, on_bytes)
    except OfflineError as error:
        if (found := cached(id)) is None:
            raise
        log.warning("%s; this is what the cache has", error)
        return found


@contextmanager
def outlines(specs: Sequence[str | os.PathLike[str]]) -> Iterator[Callable[[str | os.PathLike[str]], Path] | None]:
    """Yield where each of `specs` can be looked at by its headers; None where nothing is to be downloaded, or where the
    headers do not say enough: of bitsandbytes' 4 bits the shapes stand among the weights.
    """
    ids = {str(spec): id for spec in specs if (id := on_hub(spec)) is not None}
    with ExitStack() as stack:
        places: dict[str, Path] = {}
        for spec, id in ids.items():
            try:
                remote = look(id)
            except OfflineError:
                continue  # the cache may have it
            if missing_of(remote):
                places[spec] = stack.enter_context(outlined(remote)).path
                names = (name for file in places[spec].glob("*.safetensors") for name in read_header(file).tensors)
                if any(".quant_state." in name for name in names):
                    places.clear()
                    break
        yield (lambda spec: places.get(str(spec)) or resolve(spec)) if places else None


def cached(id: HubId) -> Path | None:
    """The folder of the cache that has what `id` last named, as far as the cache knows, or None."""
    from huggingface_hub import try_to_load_from_cache

    with asking(str(id)):
        for name in (ADAPTER_CONFIG, CONFIG, *WEIGHTS, *PICKLED):
            found = try_to_load_from_cache(id.repo, id.at(name), revision=id.revision)
            if isinstance(found, str):
                return Path(found).parent
    return None


def missing_of(remote: Remote) -> tuple[RemoteFile, ...]:
    """The files that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    def is_here(file: RemoteFile) -> bool:
        return isinstance(try_to_load_from_cache(remote.id.repo, file.name, revision=remote.commit), str)

    return tuple(file for file in remote.files if not is_here(file))


def download_of(remote: Remote) -> Download:
    """What getting `remote` takes."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    return Download(remote, missing_of(remote), cache, shutil.disk_usage(there).free)


def fetch(download: Download, on_bytes: OnBytes | None = None) -> Path:
    """Get what is missing, and return the folder that has everything; what was interrupted goes on where it was.

    Raises NoSpaceError before the first byte where the disk is too small, AdapterkitError where other bytes came than
    the Hub names by their SHA-256; those are not kept.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    remote, id = download.remote, download.remote.id
    if download.size > download.free:
        raise NoSpaceError(
            f"{id}: {download.size:,} bytes are to be got, and {download.cache} has room for {download.free:,}; "
            "free some space, or set HF_HOME to a larger disk"
        )
    count = _Count(download.size, on_bytes)

    def get(file: RemoteFile) -> None:
        if file.sha256 is not None:
            _get_blob(remote, file, _blob(download.cache, id, file.sha256), count)
        hf_hub_download(id.repo, file.name, revision=remote.commit)  # which finds the blob that is there
        if file.sha256 is None:
            count.add(file.size)

    with errors_of(download.cache), asking(str(id)):
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            try:
                list(threads.map(get, download.missing))
            except BaseException:
                count.stopped = True  # the others need not be waited for: what they have is kept
                raise
        first = remote.files[0].name
        known = try_to_load_from_cache(id.repo, first, revision=id.revision)
        if not isinstance(known, str) or remote.commit not in known:
            # Asked by the name that was given, the cache learns what commit that is, and can answer without the Hub.
            known = hf_hub_download(id.repo, first, revision=id.revision)
    root = Path(known).parents[first.count("/")]
    if root.name != remote.commit:
        raise AdapterkitError(f"{id}: changed on the Hub while it was got; do it again")
    return root / id.folder


class _Count:
    """The bytes that are here, of all; from any thread."""

    def __init__(self, total: int, on_bytes: OnBytes | None) -> None:
        self.total, self.done, self.stopped = total, 0, False
        self._on_bytes, self._lock = on_bytes, threading.Lock()

    def add(self, count: int) -> None:
        """Count some more, or fewer; raises InterruptedError where another thread failed."""
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self.done += count
            if self._on_bytes is not None:
                self._on_bytes(self.done, self.total)


def _blob(cache: Path, id: HubId, sha256: str) -> Path:
    """Where the cache keeps the bytes of a file, by its hash."""
    return cache / f"models--{id.repo.replace('/', '--')}" / "blobs" / sha256


def _get_blob(remote: Remote, file: RemoteFile, blob: Path, count: _Count) -> None:
    """Get a large file into the cache. The client would begin anew; this goes on from the bytes that are there."""
    partial = blob.with_name(f"{blob.name}.adapterkit")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # another process may be getting it: wait, and take what it got
        if blob.exists():
            count.add(file.size)
            return
        stream.seek(0)
        hashed = hashlib.file_digest(stream, "sha256")
        count.add(stream.tell())
        ask(str(remote.id), lambda _: _append(remote, file, stream, hashed, count))
        if hashed.hexdigest() != file.sha256:
            partial.unlink()
            raise AdapterkitError(f"{remote.id}: {file.name} came with other bytes than the Hub says; get it again")
        stream.flush()
        os.fsync(stream.fileno())
        partial.rename(blob)


def _append(remote: Remote, file: RemoteFile, stream: BinaryIO, hashed: Any, count: _Count) -> None:
    """Ask for the bytes that `stream` lacks, and write those that come."""
    have = stream.seek(0, os.SEEK_END)
    if have >= file.size:
        return
    with opened(remote, file, have) as response:
        skip = have if response.status_code == 200 else 0  # a server that knows no ranges sends everything
        for chunk in response.iter_bytes():
            part = chunk[skip:]
            skip -= min(skip, len(chunk))
            stream.write(part)
            hashed.update(part)
            count.add(len(part))
    if stream.tell() < file.size:
        raise OfflineError(f"{remote.id}: the Hub sent {stream.tell():,} of {file.size:,} bytes; get it again to go on")
