"""bitsandbytes 4-bit, NF4 and FP4, as transformers saves it (arXiv 2305.14314; bitsandbytes `QuantState.as_dict`).

`w = dtype(code[nibble] · absmax[block])`: one product in float32, rounded once more. Blocks run over the flattened
weight; the high nibble comes first. With nesting, `absmax = nested_code[q] · nested_absmax[nested_block] + offset`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from adapterkit.errors import FormatError
from adapterkit.quant.packed import Packed, Rows
from adapterkit.tensorfile import TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>.+)")
KINDS = ("nf4", "fp4")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_STATE_BYTES = 4096  # real ones have some 150


@dataclass(frozen=True)
class Nested:
    """How the scales are quantized themselves: `absmax = code[q] · scales[i // blocksize] + offset`."""

    scales: TensorInfo
    code: TensorInfo
    blocksize: int
    offset: float


@dataclass(frozen=True)
class Packed4bit(Packed):
    """A weight in 4 bits: 16 values of `code`, times one `absmax` for each `blocksize` elements."""

    kind: str
    blocksize: int
    absmax: TensorInfo
    code: TensorInfo
    state: TensorInfo
    nested: Nested | None

    @property
    def scheme(self) -> str:
        nesting = ", nested" if self.nested else ""
        return f"bitsandbytes {self.kind.upper()}, blocks of {self.blocksize}{nesting}"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        nested = (self.nested.scales, self.nested.code) if self.nested else ()
        return (self.stored, self.absmax, self.code, self.state, *nested)

    def open(self, columns: int) -> Rows:
        import torch

        absmax, pairs = self._scales(), pair_table(self.code.read())
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        count = prod(self.shape)

        def rows(first: int, last: int) -> torch.Tensor:
            begin, end = first * columns, last * columns
            block, behind = begin // self.blocksize, -(-end // self.blocksize)  # whole blocks
            start, stop = block * self.blocksize, min(behind * self.blocksize, count)
            low, high = self.stored.start + start // 2, self.stored.start + (stop + 1) // 2
            raw = replace(self.stored, start=low, stop=high, dtype="U8", shape=(high - low,)).read()
            values = dequantize(raw, absmax[block:behind], pairs, self.blocksize)
            return values[begin - start : end - start].view(last - first, columns).to(dtype)

        return rows

    def _scales(self) -> torch.Tensor:
        """`absmax` in float32, un-nested: a product, then a sum, each rounded, as bitsandbytes does it."""
        absmax, nested = self.absmax.read(), self.nested
        if nested is None:
            return absmax.float()
        scales = nested.scales.read().repeat_interleave(nested.blocksize)[: absmax.numel()]
        return nested.code.read()[absmax.int()] * scales + nested.offset


def pair_table(code: torch.Tensor) -> torch.Tensor:
    """The two values in each of the 256 bytes, as one 8-byte element each, which torch looks up fastest."""
    import torch

    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.float64).view(-1)


def dequantize(raw: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Float32 values of whole blocks, the last of which may be short: `raw` uint8, two a byte; `absmax` one a block."""
    import torch

    values = torch.index_select(pairs, 0, raw.int()).view(torch.float32)
    full = len(values) // blocksize * blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    if full < len(values):
        values[full:].mul_(absmax[full // blocksize])
    return values


# --- finding them ----------------------------------------------------------------------------------------------------


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Packed4bit]:
    """Every 4-bit weight among `tensors`. Raises FormatError where its parts are missing or do not fit each other."""
    found = set()
    for name, state in tensors.items():
        if match := STATE.fullmatch(name):
            found.add(match["weight"])
            yield _packed(match["weight"], match["kind"], state, tensors)
    for name, info in tensors.items():
        weight = name.removesuffix(".absmax")
        if weight != name and weight not in found and weight in tensors:
            raise FormatError(f"{info.file}: {weight} has an absmax, but no quant_state that says how to read it")


def _packed(weight: str, kind: str, state: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed4bit:
    facts = _facts(state)
    if kind not in KINDS or facts.get("quant_type") != kind:
        raise FormatError(f"{state.file}: {state.name}: quant_type is {facts.get('quant_type')!r}, expected nf4 or fp4")
    shape, blocksize = facts.get("shape"), facts.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(map(_is_size, shape)) or not _is_block(blocksize):
        raise FormatError(f"{state.file}: {state.name}: shape {shape!r}, blocksize {blocksize!r}: expected whole sizes")
    if facts.get("dtype") not in DTYPES:
        raise FormatError(f"{state.file}: {state.name}: dtype {facts.get('dtype')!r}: expected {', '.join(DTYPES)}")

    def part(suffix: str, dtype: str | None, count: int) -> TensorInfo:
        name = weight + suffix
        info = tensors.get(name)
        if info is None:
            raise FormatError(f"{state.file}: {name} is missing: {weight} is {kind.upper()} and cannot be read without")
        if (dtype is not None and info.dtype != dtype) or prod(info.shape) != count:
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} {info.shape}, expected {dtype} with {count} elements"
            )
        return info

    stored = tensors.get(weight)
    count = prod(shape)
    needed = (count + 1) // 2
    if stored is None or stored.nbytes < needed or stored.nbytes - needed >= 8:  # padded to its storage dtype
        have = "missing" if stored is None else f"{stored.nbytes:,} bytes"
        raise FormatError(f"{state.file}: {weight} is {have}; {shape} in 4 bits take {needed:,}")
    blocks = -(-count // blocksize)
    nested = None
    if f"{weight}.nested_absmax" in tensors or f"{weight}.nested_quant_map" in tensors:
        size, offset = facts.get("nested_blocksize"), facts.get("nested_offset")
        if not _is_block(size) or not isinstance(offset, int | float):
            raise FormatError(f"{state.file}: {state.name}: nested_blocksize {size!r}, nested_offset {offset!r}")
        nested = Nested(
            part(".nested_absmax", "F32", -(-blocks // size)),
            part(".nested_quant_map", "F32", 256),
            size,
            float(offset),
        )
    absmax = part(".absmax", "U8" if nested else None, blocks)
    if nested is None and absmax.dtype not in ("F32", "F16", "BF16"):
        raise FormatError(f"{absmax.file}: {absmax.name} is {absmax.dtype}: nested, but its nested_absmax is missing")
    code = part(".quant_map", "F32", 16)
    return Packed4bit(
        weight, tuple(shape), DTYPES[facts["dtype"]], stored, kind, blocksize, absmax, code, state, nested
    )


def _facts(state: TensorInfo) -> dict[str, Any]:
    """The JSON object in a quant_state tensor."""
    try:
        if state.dtype != "U8" or state.nbytes > MAX_STATE_BYTES:
            raise ValueError
        facts = json.loads(bytes(state.read_bytes()))
        if not isinstance(facts, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{state.file}: {state.name} is not the JSON object of a quantized weight") from error
    return facts


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**40


def _is_block(value: Any) -> TypeGuard[int]:
    return type(value) is int and 2 <= value <= 2**20 and value % 2 == 0
