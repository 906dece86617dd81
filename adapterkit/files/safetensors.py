"""safetensors files as bytes: headers checked before use, spans read without mapping the file.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes back to back
(https://huggingface.co/docs/safetensors/index#format). Sizes are checked against the file before memory is allocated.

The package `safetensors` is only used in tests, as a reference. It maps files, so that a concurrent truncation crashes
the process; it doesn't expose tensor offsets; it has no 6-bit dtypes; and it silently takes the last of two tensors of
the same name.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.errors import FormatError
from adapterkit.files import os_calls
from adapterkit.files.jsonfile import MAX_HEADER_BYTES, MAX_HEADER_ITEMS, parse_object
from adapterkit.files.opening import open_regular
from adapterkit.reprs import Displayed
from adapterkit.text import counted

if TYPE_CHECKING:
    import torch

# The dtypes of the format and their bits per element.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

# The dtypes that torch has, by their name in torch.
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

# The dtypes in which weights are merged and written.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

# What to call those that an output can be converted to, and the other names that these have, in lower case.
OUTPUT_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
DTYPE_SPELLINGS = {
    f"{prefix}{other}": name
    for name, others in {
        "bf16": ("bf16", "bfloat16"),
        "fp16": ("fp16", "f16", "float16", "half"),
        "fp32": ("fp32", "f32", "float32", "float"),
    }.items()
    for other in others
    for prefix in ("", "torch.")
}

PAGE = 4096  # bytes; fixed rather than the machine's page size, so that every machine writes the same file
MAX_NAME = 1000  # characters; real names have at most about 200
MAX_DIMS = 64  # as in numpy; the product of many more is too large a number to compute with


class Weight(Protocol):
    """The name, dtype and shape of a weight, stored plain or quantized."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The location of a tensor: `file[start:stop]` holds its elements of `dtype`, row-major, in `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read_bytes(self) -> bytearray:
        """Read the stored bytes."""
        data = bytearray(self.nbytes)
        with open_regular(self.file) as file:
            read_span(file.fileno(), memoryview(data), self.start, self.file)
        return data

    def read(self) -> torch.Tensor:
        """Read the tensor into memory, in its stored dtype."""
        import torch

        if self.dtype not in TORCH_NAMES:
            raise FormatError(f"{self.file}: {self.name} has dtype {self.dtype}, which torch does not support")
        data = self.read_bytes()
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        if not data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True, repr=False)
class Header(Displayed):
    """The checked header of one safetensors file: its tensors in file order, and its free-form metadata."""

    file: Path
    nbytes: int  # of the length prefix, the JSON and its padding: the offset of the data
    size: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def brief(self) -> str:
        return f"{self.file}, {counted(len(self.tensors), 'tensor')}"


def read_span(fd: int, into: memoryview, offset: int, file: Path) -> None:
    """Fill `into` from `offset`; raises FormatError if the file ends early or can't be read."""
    done = 0
    while done < len(into):
        try:
            got = os_calls.read_at(fd, into[done:], offset + done)
        except OSError as error:
            raise FormatError(f"{file}: reading at byte {offset + done} failed: {error.strerror}") from error
        if got == 0:
            raise FormatError(f"{file}: ended at byte {offset + done} while being read. Did something truncate it?")
        done += got


def read_tensors(infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
    """Read whole tensors; neighbours of one dtype in a single read."""
    import torch

    found: dict[int, torch.Tensor] = {}
    runs: list[list[int]] = []
    stop: object = None
    for number in sorted(range(len(infos)), key=lambda number: (str(infos[number].file), infos[number].start)):
        info = infos[number]
        if (info.file, info.dtype, info.start) != stop:
            runs.append([])
        runs[-1].append(number)
        stop = (info.file, info.dtype, info.stop)
    for run in runs:
        sizes = [prod(infos[number].shape) for number in run]
        whole = replace(infos[run[0]], shape=(sum(sizes),), stop=infos[run[-1]].stop)
        for number, part in zip(run, torch.split(whole.read(), sizes), strict=True):
            found[number] = part.view(infos[number].shape)
    return [found[number] for number in range(len(infos))]


def read_header(file: Path) -> Header:
    """Read and check the header of `file`, without its data.

    Raises FormatError if the file is truncated, the JSON is invalid or has duplicate keys, a dtype is unknown, a shape
    doesn't match its bytes, or the tensors don't cover the data section exactly.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise FormatError(f"{file}: {size} bytes is too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > size - 8:
                raise FormatError(
                    f"{file}: the header claims {length:,} bytes in a file of {size:,}. Truncated, or not safetensors?"
                )
            if length > MAX_HEADER_BYTES:
                raise FormatError(f"{file}: the header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
            raw = stream.read(length)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror or error}") from error
    return parse_header(file, raw, size)


def parse_header(file: Path, raw: bytes, size: int) -> Header:
    """Parse the header JSON `raw` of a `file` of `size` bytes, with the checks of `read_header`."""
    entries = parse_object(file, raw, MAX_HEADER_ITEMS)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{file}: __metadata__ must map strings to strings")
    base = 8 + len(raw)
    infos = [_tensor_info(file, name, entry, base) for name, entry in entries.items()]
    _check_tiling(file, infos, base, size)
    return Header(file, base, size, {info.name: info for info in infos}, metadata)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], align_to: int = 0
) -> tuple[bytes, list[tuple[int, int]]]:
    """Lay out `(name, dtype, shape)` back to back; returns the header bytes and each tensor's absolute (start, stop).

    Given the size of another header, `align_to`, the data starts at the same page offset as after that header, so that
    spans can be copied by direct I/O.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans, at = [], 0
    for name, dtype, shape in tensors:
        stop = at + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        spans.append((at, stop))
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers may map the data, so align it to 8 bytes
    text += b" " * ((align_to - 8 - len(text)) % PAGE if align_to else 0)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [(base + start, base + stop) for start, stop in spans]


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to a safetensors file and flush it to the disk; larger dtypes first, for alignment."""
    import torch

    names = {getattr(torch, name): key for key, name in TORCH_NAMES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, _ = encode_header(((n, names[tensors[n].dtype], tuple(tensors[n].shape)) for n in order), metadata)
    with open(file, "wb") as stream:
        stream.write(header)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)
        stream.flush()
        os_calls.flush(stream.fileno())


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes; sub-byte dtypes are packed without gaps."""
    return (prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def check_tensor_name(file: Path, name: str) -> None:
    """Raise FormatError for a tensor name that is too long or unprintable, which no tool writes."""
    if len(name) > MAX_NAME:
        raise FormatError(
            f"{file}: the tensor name {name[:60]!r} … has {len(name):,} characters, expected at most {MAX_NAME:,}"
        )
    if not name.isprintable():
        hidden = next(c for c in name if not c.isprintable())
        raise FormatError(f"{file}: the tensor name {name[:60]!r} has the unprintable character U+{ord(hidden):04X}")


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """Parse a header entry; raises FormatError if a field has the wrong type or the offsets don't match the shape."""
    check_tensor_name(file, name)
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_formed = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MAX_DIMS
        well_formed = well_formed and all(map(_is_index, (*shape, start, stop)))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise FormatError(f"{file}: the header entry of {name!r} is malformed: {reprlib.repr(entry)}")
    shape = tuple(shape)
    if dtype not in DTYPE_BITS:
        raise FormatError(f"{file}: {name} has unknown dtype {dtype[:20]!r}")
    if stop - start != (size := tensor_bytes(dtype, shape)):
        raise FormatError(f"{file}: {name} is {dtype} {shape}, {size:,} bytes, but its offsets span {stop - start:,}")
    return TensorInfo(name, dtype, shape, file, base + start, base + stop)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_tiling(file: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    """Raise FormatError unless every byte after the header belongs to exactly one tensor."""
    at, previous = base, "the header"
    for info in sorted(infos, key=lambda info: (info.start, info.stop)):
        if info.start != at:
            relation = "overlaps" if info.start < at else "leaves a hole after"
            raise FormatError(f"{file}: {info.name} {relation} {previous}")
        at, previous = info.stop, info.name
    if at != size:
        raise FormatError(
            f"{file}: the header describes {at:,} bytes, the file has {size:,}. "
            + ("It is truncated: download or copy it again." if size < at else "Something was appended to it.")
        )
