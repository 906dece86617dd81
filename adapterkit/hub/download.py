"""Downloads into the Hub cache: planned with their size, resumed, and verified byte by byte."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from adapterkit.adapter.formats import table as formats
from adapterkit.base.checkpoint import CONFIG
from adapterkit.errors import AdapterkitError, NoSpaceError, OfflineError, UnsafeFileError
from adapterkit.files import os_calls
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import map_os_errors
from adapterkit.hub.client.call import call_hub, hub_errors
from adapterkit.hub.client.limits import MAX_RESPONSE_BYTES
from adapterkit.hub.client.parallel import run_parallel
from adapterkit.hub.events import BytesDone
from adapterkit.hub.names import HubId, cache_folder, hub_cache
from adapterkit.hub.remote import Remote, RemoteFile, open_range

log = logging.getLogger(__name__)

PARALLEL_FILES = 4
PROGRESS_INTERVAL = 0.1  # seconds
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OnBytes = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True)
class Download:
    """The files of a repository that the cache lacks, and the disk space for them."""

    remote: Remote
    missing: tuple[RemoteFile, ...]
    cache: Path
    free: int  # bytes
    partial_bytes: int = 0  # bytes that an interrupted download left

    @property
    def size(self) -> int:
        """Bytes of the missing files."""
        return sum(file.size for file in self.missing)

    @property
    def remaining(self) -> int:
        """Bytes still to download."""
        return self.size - self.partial_bytes


def cached_folder(id: HubId) -> Path | None:
    """The cached folder of the latest known revision of `id`, or None."""
    with hub_errors(str(id)):
        for name in (*formats.config_names(), CONFIG, *formats.weights_names()):
            if (found := _cached_file(id.repo, id.at(name), id.revision)) is not None:
                return found.parent
    return None


def _cached_file(repo: str, name: str, revision: str | None) -> Path | None:
    """The path of a file in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, name, revision=revision)
    except UnicodeDecodeError:  # a corrupt refs file
        return None
    return Path(found) if isinstance(found, str) else None


def missing_files(remote: Remote, every_byte: bool = False) -> tuple[RemoteFile, ...]:
    """The files that the cache lacks or holds with a wrong size, or with `every_byte` a wrong hash."""

    def is_cached(file: RemoteFile) -> bool:
        found = _cached_file(remote.id.repo, file.name, remote.commit)
        if found is None or found.stat().st_size != file.size:
            return False
        if not every_byte or _is_intact(found, file):
            return True
        log.warning("%s: %s in the cache differs from the Hub; replacing it", remote.id, file.name)
        return False

    return tuple(file for file in remote.files if not is_cached(file))


def plan_download(remote: Remote, every_byte: bool = False) -> Download:
    """Plan the download of `remote`; with `every_byte` cached files are read and compared with their hashes."""
    cache = hub_cache()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    missing = missing_files(remote, every_byte)
    partials = zip((_partial(remote, file) for file in missing), missing, strict=True)
    partial_bytes = sum(min(path.stat().st_size, file.size) for path, file in partials if path.is_file())
    return Download(remote, missing, cache, shutil.disk_usage(existing).free, partial_bytes)


def fetch(download: Download, on_bytes: OnBytes | None = None) -> Path:
    """Download the missing files, and return the folder of the complete snapshot; see `fetch_steps`."""
    for event in fetch_steps(download):
        if isinstance(event, Path):
            return event
        if on_bytes is not None:
            on_bytes(event.done, event.total)
    raise AssertionError("a download ends with its folder")


def fetch_steps(download: Download) -> Iterator[BytesDone | Path]:
    """Download the missing files, resuming interrupted ones; yields progress, then the folder of the snapshot.

    Raises NoSpaceError before the first byte if the disk is too small, and AdapterkitError if a file does not match its
    hash on the Hub; such a file is deleted.
    """
    remote, id = download.remote, download.remote.id
    if download.remaining > download.free:
        raise NoSpaceError(
            f"{id}: the download needs {download.remaining:,} bytes, and {download.cache} has {download.free:,} free; "
            "free some space, or set HF_HOME to a larger disk"
        )
    progress = _Progress()

    def get(file: RemoteFile) -> None:
        try:
            _download_blob(remote, file, progress)
            _link_into_cache(remote, file)
        except BaseException:
            progress.stopped = True  # partial files of the other threads stay for the next download
            raise

    try:
        with map_os_errors(download.cache):
            for _ in run_parallel(get, download.missing, PARALLEL_FILES, PROGRESS_INTERVAL):
                yield BytesDone(progress.done, download.size, f"downloading {id.repo}")
    except GeneratorExit:
        progress.stopped = True
        raise
    except KeyboardInterrupt as error:
        progress.stopped = True
        error.add_note(f"the next download of {id} resumes from here")
        raise
    first = remote.files[0].name
    cached = _cached_file(id.repo, first, id.revision)
    if cached is None or remote.commit not in cached.parts:
        # With the revision's name, the client records its commit in the cache, which works offline then.
        with map_os_errors(download.cache):
            cached = call_hub(str(id), lambda _: _client_download(id, first, id.revision))
    root = cached.parents[first.count("/")]
    if root.name != remote.commit:
        raise AdapterkitError(f"{id}: changed on the Hub during the download; try again")
    yield root / id.folder


def _link_into_cache(remote: Remote, file: RemoteFile) -> None:
    """Let the client link a downloaded blob into the snapshot, and check that the link leads to it."""
    id, blob = remote.id, _partial(remote, file).with_suffix("")
    old = _cached_file(id.repo, file.name, remote.commit)
    if old is not None and _digest(file) and not old.samefile(blob):
        old.unlink()  # damaged: otherwise it would be this blob
    linked = call_hub(
        str(id),
        lambda _: _client_download(id, file.name, remote.commit),
        max_bytes=file.size + MAX_RESPONSE_BYTES,
        files=not _digest(file),
    )
    if not _digest(file):
        log.warning("%s: %s could not be verified: the Hub gives no hash for it", id, file.name)
    elif not linked.samefile(blob):
        raise AdapterkitError(f"{id}: the Hub gives two different hashes for {file.name}; it was not verified")


def _client_download(id: HubId, name: str, revision: str | None) -> Path:
    """Let the client put a file into the cache; returns its path there."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(id.repo, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise (error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error) from error


class _Progress:
    """Bytes downloaded so far; thread-safe."""

    def __init__(self) -> None:
        self.done, self.stopped = 0, False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Add to the count; raises InterruptedError if another thread has failed."""
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self.done += count


def _download_blob(remote: Remote, file: RemoteFile, progress: _Progress) -> None:
    """Download a file into the cache's blobs. Unlike the client, this resumes an interrupted download."""
    if not (name := _digest(file)):  # nothing to verify it by: left to the client
        progress.add(file.size)
        return
    partial = _partial(remote, file)
    blob = partial.with_suffix("")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial) as stream:
        if blob.exists() and _is_intact(blob, file):  # from another revision, or downloaded by another process
            partial.unlink()
            progress.add(file.size)
            return
        hashed = hashlib.file_digest(stream, lambda: _hasher(file))
        progress.add(stream.tell())
        call_hub(str(remote.id), lambda _: _download_rest(remote, file, stream, hashed, progress))
        if hashed.hexdigest() != name:
            partial.unlink()
            raise AdapterkitError(f"{remote.id}: {file.name} does not match its hash on the Hub; download it again")
        os_calls.flush(stream.fileno())
        partial.rename(blob)


def _partial(remote: Remote, file: RemoteFile) -> Path:
    """The file that a download is written to; complete, it is renamed to the cache's blob, without the suffix."""
    return cache_folder(remote.id) / "blobs" / f"{_digest(file)}.adapterkit"


@contextmanager
def _locked(partial: Path) -> Iterator[BufferedRandom]:
    """Open a partial file at its start, with an exclusive lock: waits for another process that is downloading it."""
    while True:
        with open(partial, "a+b", opener=_open_partial) as stream:
            try:
                os_calls.lock(stream.fileno())
            except OSError as error:
                if error.errno not in os_calls.NO_LOCKS:
                    raise  # on a file system without locks, the hash reveals concurrent writes
            # While this one waited, the other process may have renamed or removed it.
            if not partial.exists() or not os.path.samestat(os.fstat(stream.fileno()), partial.stat()):
                continue
            stream.seek(0)
            yield stream
            return


def _open_partial(path: str, flags: int) -> int:
    """Open or create the file at `path`; raises UnsafeFileError for links and for anything but a regular file."""
    fd = os.open(path, flags | os_calls.NO_FOLLOW | os_calls.READ_FLAGS, 0o666)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise UnsafeFileError(f"{path}: not a partial download; remove it")
    return fd


def _digest(file: RemoteFile) -> str | None:
    return file.sha256 or file.oid


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether a file matches its hash on the Hub; without a hash, only its size is compared."""
    if path.stat().st_size != file.size:
        return False
    with open_regular(path) as stream:
        return _digest(file) in (None, hashlib.file_digest(stream, lambda: _hasher(file)).hexdigest())


def _hasher(file: RemoteFile) -> Any:
    """A new hash object: SHA-256, or SHA-1 as git computes it, over a header with the size."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _download_rest(remote: Remote, file: RemoteFile, stream: BufferedRandom, hashed: Any, progress: _Progress) -> None:
    """Download the bytes that `stream` lacks, and append them."""
    have = stream.seek(0, os.SEEK_END)
    if have >= file.size:
        return
    with open_range(remote, file, have) as response:
        skip = have if response.status_code == 200 else 0  # a server without ranges sends the whole file
        for chunk in response.iter_bytes():
            if not have and file.sha256 and chunk.startswith(LFS_POINTER) and file.size > len(chunk):
                raise AdapterkitError(
                    f"{remote.id}: the Hub sent a Git LFS pointer instead of {file.name}; try again later"
                )
            part = chunk[skip:][: file.size - have]  # never more than the announced size
            skip -= min(skip, len(chunk))
            stream.write(part)
            stream.flush()  # so that an interrupted download can resume from here
            hashed.update(part)
            progress.add(len(part))
            have += len(part)
            if have == file.size:
                return
    raise OfflineError(f"{remote.id}: the Hub sent {have:,} of {file.size:,} bytes; download it again to resume")
