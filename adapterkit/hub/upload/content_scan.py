"""What files hold, whatever they are called: pickles, which could run code, secrets, and both of them in archives."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import pickletools
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO, RawIOBase
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from adapterkit.errors import UnsafeFileError
from adapterkit.files.opening import open_regular
from adapterkit.hub.client.masking import SHORTEST, known
from adapterkit.hub.upload.secrets import find_secret

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD = 1 << 20  # bytes that decide what a file is: a block of bzip2 has 900 kB
IN_MEMORY = 64 << 20  # bytes of a member; larger ones are unpacked to the disk
MOST_UNPACKED = 1 << 30  # bytes, of all archives in one file
DEEPEST = 4  # archives in archives
OPS = 10_000  # of a pickle
RUNS_CODE = ("GLOBAL", "INST", "STACK_GLOBAL")
OBJECTS = re.compile(rb"\A\x93NUMPY.{4,6}\{[^\n]*?[:,]\s*['\"][|<>=]?O[0-9]*['\"]", re.DOTALL)
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
CLOSED = {  # kinds that nothing here opens
    b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!\x1a\x07": "RAR", b"\x04\x22\x4d\x18": "LZ4", b"\x1f\x9d": "compress",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"Obj\x01": "Avro", b"MSCF": "cabinet",
}  # fmt: skip
STREAMS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open, b"\x28\xb5\x2f\xfd": zstd.open,
}  # fmt: skip
BROKEN = (
    OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstd.ZstdError, zipfile.BadZipFile, tarfile.TarError,
    NotImplementedError, RuntimeError,
)  # fmt: skip


def why_not(file: Path) -> str | None:
    """Why `file` is not to be sent, or None; raises UnsafeFileError for a secret, and for what hides what it holds."""
    secrets = tuple(token.encode(errors="surrogateescape") for token in known() if len(token) >= SHORTEST)
    with open_regular(file) as stream:
        return _Look(secrets).into(stream, str(file), 0)


class _Look:
    """One look into a file and all archives in it."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        self._secrets, self._unpacked = secrets, 0

    def into(self, stream: IO[bytes], where: str, depth: int) -> str | None:
        """Why `stream` is not to be sent, or None."""
        head = stream.read(HEAD)
        if is_pickle(head):
            return "a pickle, which could run code"
        if kind := next((name for magic, name in CLOSED.items() if head.startswith(magic)), None):
            raise UnsafeFileError(f"{where}: is a {kind} file, which cannot be looked into; unpack it, or take it out")
        try:
            for name, member, seekable in _members(stream, head):
                if depth == DEEPEST:
                    raise UnsafeFileError(f"{where}: holds archives in archives in archives; unpack them")
                with member if seekable else self._unpack(member, where) as inner:
                    if why := self.into(inner, f"{where}, in it {name}", depth + 1):
                        return f"holds {name}, {why}"
        except BROKEN as error:
            raise UnsafeFileError(
                f"{where}: is a broken or encrypted archive ({error}), which cannot be looked into; take it out"
            ) from error
        stream.seek(0)
        if found := find_secret(stream, self._secrets):
            what, at = found
            raise UnsafeFileError(f"{where}: holds what looks like {what}, at byte {at:,}; take it out, and revoke it")
        return None

    def _unpack(self, member: IO[bytes], where: str) -> IO[bytes]:
        """A packed member as it is: it may be an archive again, in which one goes back and forth."""
        spooled = SpooledTemporaryFile(IN_MEMORY)
        while data := member.read(HEAD):
            self._unpacked += len(data)
            if self._unpacked > MOST_UNPACKED:
                raise UnsafeFileError(
                    f"{where}: has more than {MOST_UNPACKED:,} bytes when it is unpacked; unpack it, or take it out"
                )
            spooled.write(data)
        spooled.seek(0)
        return spooled


def is_pickle(head: bytes) -> bool:
    """Whether what begins with `head` is a pickle of any protocol, or an array of pickled objects."""
    if OBJECTS.match(head):
        return True
    names, whole = [], False
    try:
        for op, arg, _ in itertools.islice(pickletools.genops(head), OPS):
            if op.name in ("GLOBAL", "INST") and not re.fullmatch(r"[\w.]+ [\w.<>]+", str(arg)):
                return False
            names.append(op.name)
            whole = op.name == "STOP"
    except Exception:  # whatever bytes do to the parser; what was cut off among them
        pass
    if names[:1] == ["PROTO"]:
        return whole or len(names) > 3  # the length of a safetensors header may be taken for two
    return any(name in RUNS_CODE for name in names) and (whole or len(names) == OPS)


def _members(stream: IO[bytes], head: bytes) -> Iterator[tuple[str, IO[bytes], bool]]:
    """Yield the members of an archive, each with its name and whether it is stored uncompressed."""
    stream.seek(0)
    if head.startswith(ZIP):
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as member:  # RuntimeError where it is encrypted
                        yield info.filename, member, info.compress_type == zipfile.ZIP_STORED
    elif _is_tar(head):
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for entry in tar:
                if entry.isfile() and (part := tar.extractfile(entry)) is not None:
                    yield entry.name, part, True
    elif (unpack := _unpacker(head)) is not None:
        with unpack(stream) as inner:
            yield "its content", inner, False


def _unpacker(head: bytes) -> Callable[[Any], Any] | None:
    """What unpacks a stream that begins so; of zlib and the old LZMA only where that can be done."""
    if found := next((unpack for magic, unpack in STREAMS.items() if head.startswith(magic)), None):
        return found
    for magic, unpack in ((b"x", _Inflated), (b"]\x00\x00", lzma.open)):
        if head.startswith(magic):
            with suppress(*BROKEN), unpack(BytesIO(head)) as stream:
                if stream.read(512):  # of other bytes one or two may be taken for something
                    return unpack
    return None


def _is_tar(head: bytes) -> bool:
    """Whether it begins with the header of a member, which has a checksum."""
    with suppress(tarfile.TarError):
        return bool(tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape"))
    return False


class _Inflated(RawIOBase):
    """What zlib packed without a header of its own, as joblib does it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._unpack = stream, zlib.decompressobj()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack as much as `buffer` takes."""
        data = b""
        while not data and not self._unpack.eof:
            packed = self._unpack.unconsumed_tail or self._stream.read(HEAD)
            if not packed:
                raise EOFError("it is cut off")
            data = self._unpack.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
