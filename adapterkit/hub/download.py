"""What lies on the Hub, on this disk: the size known before, the room checked, and every byte checked after."""

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
from adapterkit.files import system
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import map_os_errors
from adapterkit.hub.client.ask import ask, asking
from adapterkit.hub.client.parallel import in_parallel
from adapterkit.hub.client.session import MOST_BYTES
from adapterkit.hub.events import BytesDone
from adapterkit.hub.names import HubId, cache_folder, hub_cache
from adapterkit.hub.remote import Remote, RemoteFile, opened

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
POINTER = b"version https://git-lfs.github.com/spec/"
SHOWN_EVERY = 0.1  # seconds
OnBytes = Callable[[int, int], None]  # bytes that are here, and all


@dataclass(frozen=True)
class Download:
    """What getting a repository takes: the files that are not here, their bytes, and where they go."""

    remote: Remote
    missing: tuple[RemoteFile, ...]
    cache: Path
    free: int  # bytes
    begun: int = 0  # bytes that an earlier try left

    @property
    def size(self) -> int:
        """Bytes of the missing files."""
        return sum(file.size for file in self.missing)

    @property
    def to_get(self) -> int:
        """Bytes that are yet to come."""
        return self.size - self.begun


def cached(id: HubId) -> Path | None:
    """The folder of the cache that has what `id` last named, as far as the cache knows, or None."""
    with asking(str(id)):
        for name in (*formats.config_names(), CONFIG, *formats.weights_names()):
            if (found := _kept(id.repo, id.at(name), id.revision)) is not None:
                return found.parent
    return None


def _kept(repo: str, name: str, revision: str | None) -> Path | None:
    """Where the cache has a file, if it has it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, name, revision=revision)
    except UnicodeDecodeError:  # what it notes of the revision is broken
        return None
    return Path(found) if isinstance(found, str) else None


def missing_of(remote: Remote, every_byte: bool = False) -> tuple[RemoteFile, ...]:
    """The files that are not in the cache, not as long as they should be, or, with `every_byte`, of other bytes."""

    def is_here(file: RemoteFile) -> bool:
        found = _kept(remote.id.repo, file.name, remote.commit)
        if found is None or found.stat().st_size != file.size:
            return False
        if not every_byte or _is_whole(found, file):
            return True
        log.warning("%s: %s in the cache has other bytes than on the Hub; it is replaced", remote.id, file.name)
        return False

    return tuple(file for file in remote.files if not is_here(file))


def download_of(remote: Remote, every_byte: bool = False) -> Download:
    """What getting `remote` takes; with `every_byte` what is in the cache is read and compared with its hashes."""
    cache = hub_cache()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    missing = missing_of(remote, every_byte)
    left = (_partial(remote, file) for file in missing)
    begun = sum(min(path.stat().st_size, file.size) for path, file in zip(left, missing, strict=True) if path.is_file())
    return Download(remote, missing, cache, shutil.disk_usage(there).free, begun)


def fetch(download: Download, on_bytes: OnBytes | None = None) -> Path:
    """Get what is missing, and return the folder that has everything; see `fetching`."""
    for event in fetching(download):
        if isinstance(event, Path):
            return event
        if on_bytes is not None:
            on_bytes(event.done, event.total)
    raise AssertionError("a download ends with its folder")


def fetching(download: Download) -> Iterator[BytesDone | Path]:
    """Get what is missing, and yield the bytes that are here, last the folder that has everything.

    What was interrupted goes on where it was. Raises NoSpaceError before the first byte where the disk is too small,
    AdapterkitError where other bytes came than the Hub names by their SHA-256; those are not kept.
    """
    remote, id = download.remote, download.remote.id
    if download.to_get > download.free:
        raise NoSpaceError(
            f"{id}: {download.to_get:,} bytes are to be got, and {download.cache} has room for {download.free:,}; "
            "free some space, or set HF_HOME to a larger disk"
        )
    count = _Count()

    def get(file: RemoteFile) -> None:
        try:
            _get_blob(remote, file, count)
            _place(remote, file)
        except BaseException:
            count.stopped = True  # what the others have is kept
            raise

    try:
        with map_os_errors(download.cache):
            for _ in in_parallel(get, download.missing, FILES_AT_ONCE, SHOWN_EVERY):
                yield BytesDone(count.done, download.size, f"getting {id.repo}")
    except GeneratorExit:
        count.stopped = True
        raise
    except KeyboardInterrupt as error:
        count.stopped = True
        raise KeyboardInterrupt(f"what came of {id} is kept, and getting it again goes on from there") from error
    first = remote.files[0].name
    known = _kept(id.repo, first, id.revision)
    if known is None or remote.commit not in known.parts:
        # Asked by the name that was given, the cache learns what commit that is, and can answer without the Hub.
        with map_os_errors(download.cache):
            known = ask(str(id), lambda _: _known(id, first, id.revision))
    root = known.parents[first.count("/")]
    if root.name != remote.commit:
        raise AdapterkitError(f"{id}: changed on the Hub while it was got; do it again")
    yield root / id.folder


def _place(remote: Remote, file: RemoteFile) -> None:
    """Let the client put a file's bytes in their place in the cache, and check that they are what is there then."""
    id, blob = remote.id, _partial(remote, file).with_suffix("")
    old = _kept(id.repo, file.name, remote.commit)
    if old is not None and _hash_of(file) and not old.samefile(blob):
        old.unlink()  # it is damaged, or the client would not have it
    where = ask(
        str(id), lambda _: _known(id, file.name, remote.commit), most=file.size + MOST_BYTES, files=not _hash_of(file)
    )
    if not _hash_of(file):
        log.warning("%s: %s could not be verified: the Hub gives no hash for it", id, file.name)
    elif not where.samefile(blob):
        raise AdapterkitError(
            f"{id}: the Hub says two things of {file.name}: it has two hashes; nothing is known of it"
        )


def _known(id: HubId, name: str, revision: str | None) -> Path:
    """Let the client put a file in its place in the cache; the bytes it finds there."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(id.repo, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise (error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error) from error


class _Count:
    """The bytes that are here; from any thread."""

    def __init__(self) -> None:
        self.done, self.stopped = 0, False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count some more, or fewer; raises InterruptedError where another thread failed."""
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self.done += count


def _get_blob(remote: Remote, file: RemoteFile, count: _Count) -> None:
    """Get a file into the cache, under its hash. The client would begin anew; this goes on from what is there."""
    if not (name := _hash_of(file)):  # no hash to check it by: the client gets it as it sees fit
        count.add(file.size)
        return
    partial = _partial(remote, file)
    blob = partial.with_suffix("")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _held(partial) as stream:
        if blob.exists() and _is_whole(blob, file):  # it was there, or another process got it meanwhile
            partial.unlink()
            count.add(file.size)
            return
        hashed = hashlib.file_digest(stream, lambda: _hash(file))
        count.add(stream.tell())
        ask(str(remote.id), lambda _: _append(remote, file, stream, hashed, count))
        if hashed.hexdigest() != name:
            partial.unlink()
            raise AdapterkitError(f"{remote.id}: {file.name} came with other bytes than the Hub says; get it again")
        system.flush(stream.fileno())
        partial.rename(blob)


def _partial(remote: Remote, file: RemoteFile) -> Path:
    """Where the bytes of a file are kept until it is whole; the cache has it without the suffix."""
    return cache_folder(remote.id) / "blobs" / f"{_hash_of(file)}.adapterkit"


@contextmanager
def _held(partial: Path) -> Iterator[BufferedRandom]:
    """Open what is there of a file, at its beginning, for this process alone: another that is getting it is awaited."""
    while True:
        with open(partial, "a+b", opener=_open_here) as stream:
            try:
                system.lock(stream.fileno())
            except OSError as error:
                if error.errno not in system.NO_LOCKS:
                    raise  # without locks the hash shows what two that write at once have made
            # Meanwhile the other may have moved it to its place, or removed it.
            if not partial.exists() or not os.path.samestat(os.fstat(stream.fileno()), partial.stat()):
                continue
            stream.seek(0)
            yield stream
            return


def _open_here(path: str, flags: int) -> int:
    """Open or make the file at `path`; raises UnsafeFileError where that is also another's, or no regular file."""
    fd = os.open(path, flags | system.NO_FOLLOW | system.READ_FLAGS, 0o666)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise UnsafeFileError(f"{path}: is not a file that an earlier download left; remove it")
    return fd


def _hash_of(file: RemoteFile) -> str | None:
    return file.sha256 or file.oid


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the bytes that the Hub names by their hash; one without a hash is taken as it is."""
    if path.stat().st_size != file.size:
        return False
    with open_regular(path) as stream:
        return _hash_of(file) in (None, hashlib.file_digest(stream, lambda: _hash(file)).hexdigest())


def _hash(file: RemoteFile) -> Any:
    """What its hash is made with: git's names begin with the size."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _append(remote: Remote, file: RemoteFile, stream: BufferedRandom, hashed: Any, count: _Count) -> None:
    """Ask for the bytes that `stream` lacks, and write those that come."""
    have = stream.seek(0, os.SEEK_END)
    if have >= file.size:
        return
    with opened(remote, file, have) as response:
        skip = have if response.status_code == 200 else 0  # a server that knows no ranges sends everything
        for chunk in response.iter_bytes():
            if not have and file.sha256 and chunk.startswith(POINTER) and file.size > len(chunk):
                raise AdapterkitError(f"{remote.id}: the Hub sent a Git LFS pointer instead of {file.name}; try later")
            part = chunk[skip:][: file.size - have]  # and never more than was announced
            skip -= min(skip, len(chunk))
            stream.write(part)
            stream.flush()  # so that it is kept whatever ends this
            hashed.update(part)
            count.add(len(part))
            have += len(part)
            if have == file.size:
                return
    raise OfflineError(f"{remote.id}: the Hub sent {have:,} of {file.size:,} bytes; get it again to go on")
