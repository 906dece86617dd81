"""Find NF4 and FP4 weights by their quant_state, and dequantize them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from adapterkit.base.quant.codebooks import CODES
from adapterkit.base.quant.rounding import search
from adapterkit.base.quant.schemes.bnb4.nibbles import dequantize, has_kernels, kernel, pair_table, pairs
from adapterkit.base.quant.schemes.bnb4.quantizer import DTYPES, Spec4bit, scheme_name
from adapterkit.base.quant.weight import Codes, QuantizedWeight, Read, Rows
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import DTYPE_BITS, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>.+)")
KINDS = ("nf4", "fp4")
MAX_STATE_BYTES = 4096  # real ones have about 150
MAX_OFFSET = 3e38  # the range of float32; an offset is a mean of scales
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes supports
KERNEL_BLOCKSIZES = BLOCKSIZES[1:]  # that every version of it has CUDA kernels for


@dataclass(frozen=True)
class Nested:
    """Quantized scales: `absmax = code[q] · scales[i // blocksize] + offset`."""

    scales: TensorInfo
    code: TensorInfo
    blocksize: int
    offset: float


@dataclass(frozen=True)
class Quantized4bit(QuantizedWeight):
    """A 4-bit weight: values from a `code` of 16, times one `absmax` per `blocksize` elements."""

    blocksize: int
    absmax: TensorInfo
    code: TensorInfo
    state: TensorInfo
    nested: Nested | None

    @property
    def scheme(self) -> str:
        return scheme_name(self.kind, self.blocksize, bool(self.nested))

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        nested = (self.nested.scales, self.nested.code) if self.nested else ()
        return (self.stored, self.absmax, self.code, self.state, *nested)

    @property
    def bits(self) -> int:
        return 4

    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        absmax, code = self._scales(), self.code.read().sort().values
        steps = absmax.abs() * (code[1:] - code[:-1]).max() / 2
        if self.nested is not None:  # plus the error of the scale itself
            nested, scales = self.nested.code.read(), self.nested.scales.read()
            scale_error = scales * (nested[1:] - nested[:-1]).max() / 2
            steps += scale_error.repeat_interleave(self.nested.blocksize)[: len(steps)]

        return lambda first, last: self._by_element(steps, first * columns, last * columns).view(-1, columns)

    def spec(self) -> Spec4bit:
        whole = (prod(self.shape) + 1) // 2 * 8 % DTYPE_BITS[self.stored.dtype] == 0
        storage = self.stored.dtype if whole else "U8"  # avoids padding
        return Spec4bit(self.shape, self.dtype, self.kind, self.blocksize, bool(self.nested), storage)

    def open(self, columns: int) -> Rows:
        import torch

        absmax, code = self._scales(), self.code.read()
        table, dtype = pair_table(code), getattr(torch, TORCH_NAMES[self.dtype])
        count = prod(self.shape)
        known = self.blocksize in KERNEL_BLOCKSIZES and torch.equal(code, torch.tensor(CODES[self.kind]))

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            begin, end = first * columns, last * columns
            first_block, stop_block = begin // self.blocksize, -(-end // self.blocksize)
            start, stop = first_block * self.blocksize, min(stop_block * self.blocksize, count)
            low, high = self.stored.start + start // 2, self.stored.start + (stop + 1) // 2
            raw = read(replace(self.stored, start=low, stop=high, dtype="U8", shape=(high - low,)))
            scales = absmax[first_block:stop_block].to(raw.device)
            if raw.is_cuda and known and has_kernels():
                values = kernel(raw, scales, self.blocksize, self.kind, stop - start, dtype)
            else:
                values = dequantize(raw, scales, table.to(raw.device), self.blocksize)
            return values[begin - start : end - start].view(last - first, columns).to(dtype)

        return rows

    def codes(self, columns: int) -> Codes:
        absmax, (code, order) = self._scales(), self.code.read().sort(stable=True)
        bounds = (code[1:] + code[:-1]) / 2
        negative_zero = [code for code, value in enumerate(self.code.read().tolist()) if str(value) == "-0.0"]

        def codes(rows: torch.Tensor, first: int) -> torch.Tensor:
            import torch

            begin, flat = first * columns, rows.reshape(-1).float()
            scales = self._by_element(absmax, begin, begin + len(flat)).to(rows.device)
            index = search(torch.where(scales != 0, flat / scales, 0.0).nan_to_num_(), bounds.to(rows.device))
            nibbles = order.to(rows.device, torch.uint8)[index.view(-1)]
            if negative_zero:
                nibbles[(flat == 0) & flat.signbit()] = negative_zero[0]
            return pairs(nibbles)

        return codes

    def _by_element(self, per_block: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Expand per-block values to elements `begin:end`."""
        block = begin // self.blocksize
        found = per_block[block : -(-end // self.blocksize)].repeat_interleave(self.blocksize)
        return found[begin - block * self.blocksize :][: end - begin]

    def _scales(self) -> torch.Tensor:
        """Return `absmax` in float32; nested ones by a product, then a sum, each rounded, as in bitsandbytes."""
        absmax, nested = self.absmax.read(), self.nested
        if nested is None:
            return absmax.float()
        scales = nested.scales.read().repeat_interleave(nested.blocksize)[: absmax.numel()]
        return nested.code.read()[absmax.int()] * scales + nested.offset


# --- finding them ----------------------------------------------------------------------------------------------------


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str) -> Iterator[Quantized4bit]:
    """Yield every 4-bit weight among `tensors`; raises FormatError if its parts are missing or inconsistent."""
    found = set()
    for name, state in tensors.items():
        if match := STATE.fullmatch(name):
            found.add(match["weight"])
            yield _packed(match["weight"], match["kind"], state, tensors)
    for name, info in tensors.items():
        weight = name.removesuffix(".absmax")
        if weight != name and weight not in found and weight in tensors:
            raise FormatError(f"{info.file}: {weight} has an absmax, but no quant_state")


def _packed(weight: str, kind: str, state: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Quantized4bit:
    facts = _facts(state)
    if kind not in KINDS or facts.get("quant_type") != kind:
        raise FormatError(f"{state.file}: {state.name}: quant_type is {facts.get('quant_type')!r}, expected nf4 or fp4")
    shape, blocksize = facts.get("shape"), facts.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(map(_is_size, shape)) or not _is_block(blocksize):
        raise FormatError(f"{state.file}: {state.name}: shape {shape!r}, blocksize {blocksize!r}: expected whole sizes")
    dtype = facts.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{state.file}: {state.name}: dtype {dtype!r}: expected {', '.join(DTYPES)}")

    def part(suffix: str, dtype: str | None, count: int) -> TensorInfo:
        name = weight + suffix
        info = tensors.get(name)
        if info is None:
            raise FormatError(f"{state.file}: {name} is missing; {weight} is {kind.upper()} and requires it")
        if (dtype is not None and info.dtype != dtype) or prod(info.shape) != count:
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} {info.shape}, expected {dtype} with {count} elements"
            )
        return replace(info, shape=(count,))

    stored = tensors.get(weight)
    count = prod(shape)
    needed = (count + 1) // 2
    if stored is None or stored.nbytes < needed or stored.nbytes - needed >= 8:  # padded to its storage dtype
        found = "is missing" if stored is None else f"has {stored.nbytes:,} bytes"
        raise FormatError(f"{state.file}: {weight} {found}, expected {needed:,} bytes for {shape} in 4 bits")
    blocks = -(-count // blocksize)
    nested = None
    if f"{weight}.nested_absmax" in tensors or f"{weight}.nested_quant_map" in tensors:
        size, offset = facts.get("nested_blocksize"), facts.get("nested_offset")
        if not _is_block(size) or not isinstance(offset, int | float) or not abs(offset) < MAX_OFFSET:
            raise FormatError(f"{state.file}: {state.name}: nested_blocksize {size!r}, nested_offset {offset!r}")
        nested = Nested(
            part(".nested_absmax", "F32", -(-blocks // size)),
            part(".nested_quant_map", "F32", 256),
            size,
            float(offset),
        )
    absmax = part(".absmax", "U8" if nested else None, blocks)
    if nested is None and absmax.dtype not in ("F32", "F16", "BF16"):
        raise FormatError(
            f"{absmax.file}: {absmax.name} is {absmax.dtype}, so nested, but its nested_absmax is missing"
        )
    code = part(".quant_map", "F32", 16)
    return Quantized4bit(weight, kind, tuple(shape), DTYPES[dtype], stored, blocksize, absmax, code, state, nested)


def _facts(state: TensorInfo) -> dict[str, Any]:
    """Parse the JSON object in a quant_state tensor."""
    try:
        if state.dtype != "U8" or state.nbytes > MAX_STATE_BYTES:
            raise ValueError
        facts = json.loads(bytes(state.read_bytes()))
        if not isinstance(facts, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{state.file}: {state.name} is not a valid quant_state, expected a JSON object") from error
    return facts


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**40


def _is_block(value: Any) -> TypeGuard[int]:
    return type(value) is int and 2 <= value <= 2**20 and value % 2 == 0
