"""Scan file contents, whatever their names, for pickles and secrets, also inside archives."""

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
from adapterkit.hub.client.masking import MIN_TOKEN_LENGTH, known_tokens
from adapterkit.hub.upload.secrets import find_secret

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD_BYTES = 1 << 20  # bytes to detect a file's type: a bzip2 block has 900 kB
IN_MEMORY = 64 << 20  # bytes of a member; larger ones are unpacked to disk
MAX_UNPACKED = 1 << 30  # bytes of all archives in one file
MAX_DEPTH = 4  # nested archives
MAX_OPCODES = 10_000  # pickle opcodes
RUNS_CODE = ("GLOBAL", "INST", "STACK_GLOBAL")
OBJECT_ARRAY = re.compile(rb"\A\x93NUMPY.{4,6}\{[^\n]*?[:,]\s*['\"][|<>=]?O[0-9]*['\"]", re.DOTALL)
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
OPAQUE = {  # formats without a reader here
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


def skip_reason(file: Path) -> str | None:
    """Why `file` is not uploaded, or None; raises UnsafeFileError for secrets and for unreadable archives."""
    secrets = tuple(
        token.encode(errors="surrogateescape") for token in known_tokens() if len(token) >= MIN_TOKEN_LENGTH
    )
    with open_regular(file) as stream:
        return _Scan(secrets).scan(stream, str(file), 0)


class _Scan:
    """A scan of one file, including nested archives."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        self._secrets, self._unpacked = secrets, 0

    def scan(self, stream: IO[bytes], where: str, depth: int) -> str | None:
        """Why `stream` is not uploaded, or None."""
        head = stream.read(HEAD_BYTES)
        if is_pickle(head):
            return "a pickle, which could run code"
        if kind := next((name for magic, name in OPAQUE.items() if head.startswith(magic)), None):
            raise UnsafeFileError(f"{where}: {kind} files cannot be scanned for secrets; unpack or remove it")
        try:
            for name, member, seekable in _members(stream, head):
                if depth == MAX_DEPTH:
                    raise UnsafeFileError(f"{where}: archives nested deeper than {MAX_DEPTH} levels; unpack them")
                with member if seekable else self._decompress(member, where) as inner:
                    if why := self.scan(inner, f"{where}, member {name}", depth + 1):
                        return f"contains {name}, {why}"
        except BROKEN as error:
            raise UnsafeFileError(
                f"{where}: corrupt or encrypted archive, cannot be scanned for secrets ({error}); remove it"
            ) from error
        stream.seek(0)
        if found := find_secret(stream, self._secrets):
            secret, at = found
            raise UnsafeFileError(f"{where}: contains {secret} at byte {at:,}; remove it, and revoke it")
        return None

    def _decompress(self, member: IO[bytes], where: str) -> IO[bytes]:
        """Decompress a member into a seekable file: it may be an archive itself."""
        spooled = SpooledTemporaryFile(IN_MEMORY)
        while data := member.read(HEAD_BYTES):
            self._unpacked += len(data)
            if self._unpacked > MAX_UNPACKED:
                raise UnsafeFileError(f"{where}: decompresses to more than {MAX_UNPACKED:,} bytes; unpack or remove it")
            spooled.write(data)
        spooled.seek(0)
        return spooled


def is_pickle(head: bytes) -> bool:
    """Whether a file that starts with `head` is a pickle of any protocol, or a NumPy array of pickled objects."""
    if OBJECT_ARRAY.match(head):
        return True
    names, whole = [], False
    try:
        for op, arg, _ in itertools.islice(pickletools.genops(head), MAX_OPCODES):
            if op.name in ("GLOBAL", "INST") and not re.fullmatch(r"[\w.]+ [\w.<>]+", str(arg)):
                return False
            names.append(op.name)
            whole = op.name == "STOP"
    except Exception:  # the parser raises anything for arbitrary bytes, and for a truncated pickle
        pass
    if names[:1] == ["PROTO"]:
        return whole or len(names) > 3  # the length of a safetensors header can look like two opcodes
    return any(name in RUNS_CODE for name in names) and (whole or len(names) == MAX_OPCODES)


def _members(stream: IO[bytes], head: bytes) -> Iterator[tuple[str, IO[bytes], bool]]:
    """Yield the name and stream of each member of an archive, and whether the stream is seekable."""
    stream.seek(0)
    if head.startswith(ZIP_MAGIC):
        with zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as member:  # RuntimeError if encrypted
                        yield info.filename, member, info.compress_type == zipfile.ZIP_STORED
    elif _is_tar(head):
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for entry in tar:
                if entry.isfile() and (part := tar.extractfile(entry)) is not None:
                    yield entry.name, part, True
    elif (unpack := _decompressor(head)) is not None:
        with unpack(stream) as inner:
            yield "its content", inner, False


def _decompressor(head: bytes) -> Callable[[Any], Any] | None:
    """The decompressor for a stream that starts with `head`; zlib and legacy LZMA are recognized by trying them."""
    if found := next((unpack for magic, unpack in STREAMS.items() if head.startswith(magic)), None):
        return found
    for magic, unpack in ((b"x", _ZlibStream), (b"]\x00\x00", lzma.open)):
        if head.startswith(magic):
            with suppress(*BROKEN), unpack(BytesIO(head)) as stream:
                if stream.read(512):  # a few bytes can come out of any data
                    return unpack
    return None


def _is_tar(head: bytes) -> bool:
    """Whether `head` starts with a tar header, which has a checksum."""
    with suppress(tarfile.TarError):
        return bool(tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape"))
    return False


class _ZlibStream(RawIOBase):
    """A zlib stream, as joblib writes it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._decompress = stream, zlib.decompressobj()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompress into `buffer`."""
        data = b""
        while not data and not self._decompress.eof:
            packed = self._decompress.unconsumed_tail or self._stream.read(HEAD_BYTES)
            if not packed:
                raise EOFError("truncated")
            data = self._decompress.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
