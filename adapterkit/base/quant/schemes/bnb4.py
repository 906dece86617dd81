"""bitsandbytes 4-bit, NF4 and FP4, as transformers saves it (arXiv 2305.14314; bitsandbytes `QuantState.as_dict`).

`w = dtype(code[nibble] · absmax[block])`: one product in float32, rounded once more. Blocks run over the flattened
weight; the high nibble comes first. With nesting, `absmax = nested_code[q] · nested_absmax[nested_block] + offset`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import gcd, prod
from typing import TYPE_CHECKING, Any, TypeGuard

from adapterkit.base.quant.bitsandbytes import quantization_config
from adapterkit.base.quant.codebooks import CODES, dynamic_code
from adapterkit.base.quant.rounding import NEAREST, Rounding, choose_codes, search
from adapterkit.base.quant.scheme import Layer, QuantizationSettings, Scheme, Writer
from adapterkit.base.quant.weight import Codes, QuantizationSpec, QuantizedWeight, Quantizer, Read, Rows
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import DTYPE_BITS, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>.+)")
KINDS = ("nf4", "fp4")
SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
    *(f".quant_state.bitsandbytes__{kind}" for kind in KINDS),
)  # fmt: skip
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_STATE_BYTES = 4096  # real ones have some 150
MAX_OFFSET = 3e38  # what float32 holds; an offset is a mean of scales
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for
KERNEL_BLOCKSIZES = BLOCKSIZES[1:]  # that it has CUDA kernels for in every version


@dataclass(frozen=True)
class Nested:
    """How the scales are quantized themselves: `absmax = code[q] · scales[i // blocksize] + offset`."""

    scales: TensorInfo
    code: TensorInfo
    blocksize: int
    offset: float


@dataclass(frozen=True)
class Quantized4bit(QuantizedWeight):
    """A weight in 4 bits: 16 values of `code`, times one `absmax` for each `blocksize` elements."""

    blocksize: int
    absmax: TensorInfo
    code: TensorInfo
    state: TensorInfo
    nested: Nested | None

    @property
    def scheme(self) -> str:
        return _scheme(self.kind, self.blocksize, bool(self.nested))

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
        if self.nested is not None:  # by how much the scale itself is off
            nested, scales = self.nested.code.read(), self.nested.scales.read()
            off = scales * (nested[1:] - nested[:-1]).max() / 2
            steps += off.repeat_interleave(self.nested.blocksize)[: len(steps)]

        return lambda first, last: self._by_element(steps, first * columns, last * columns).view(-1, columns)

    def spec(self) -> Spec4bit:
        whole = (prod(self.shape) + 1) // 2 * 8 % DTYPE_BITS[self.stored.dtype] == 0
        storage = self.stored.dtype if whole else "U8"  # rather than pad
        return Spec4bit(self.shape, self.dtype, self.kind, self.blocksize, bool(self.nested), storage)

    def open(self, columns: int) -> Rows:
        import torch

        absmax, code = self._scales(), self.code.read()
        table, dtype = pair_table(code), getattr(torch, TORCH_NAMES[self.dtype])
        count = prod(self.shape)
        known = self.blocksize in KERNEL_BLOCKSIZES and torch.equal(code, torch.tensor(CODES[self.kind]))

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            begin, end = first * columns, last * columns
            block, behind = begin // self.blocksize, -(-end // self.blocksize)  # whole blocks
            start, stop = block * self.blocksize, min(behind * self.blocksize, count)
            low, high = self.stored.start + start // 2, self.stored.start + (stop + 1) // 2
            raw = read(replace(self.stored, start=low, stop=high, dtype="U8", shape=(high - low,)))
            scales = absmax[block:behind].to(raw.device)
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
        """What each block has, for each of elements `begin:end`."""
        block = begin // self.blocksize
        found = per_block[block : -(-end // self.blocksize)].repeat_interleave(self.blocksize)
        return found[begin - block * self.blocksize :][: end - begin]

    def _scales(self) -> torch.Tensor:
        """`absmax` in float32, un-nested: a product, then a sum, each rounded, as bitsandbytes does it."""
        absmax, nested = self.absmax.read(), self.nested
        if nested is None:
            return absmax.float()
        scales = nested.scales.read().repeat_interleave(nested.blocksize)[: absmax.numel()]
        return nested.code.read()[absmax.int()] * scales + nested.offset


def _scheme(kind: str, blocksize: int, nested: bool) -> str:
    return f"bitsandbytes {kind.upper()}, blocks of {blocksize}{', nested' if nested else ''}"


def pair_table(code: torch.Tensor) -> torch.Tensor:
    """The two values in each of the 256 bytes, as one 8-byte element each, which torch looks up fastest."""
    import torch

    byte = torch.arange(256, device=code.device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.float64).view(-1)


def pairs(nibbles: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first one high; a last one alone has a zero beside it."""
    import torch

    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    both = nibbles.view(torch.int16)  # the first of two in the low byte
    return (both << 4 | both >> 8).to(torch.uint8)


def dequantize(raw: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Float32 values of whole blocks, the last of which may be short: `raw` uint8, two a byte; `absmax` one a block."""
    import torch

    values = torch.index_select(pairs, 0, raw.int()).view(torch.float32)
    full = len(values) // blocksize * blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    if full < len(values):
        values[full:].mul_(absmax[full // blocksize])
    return values


def kernel(
    raw: torch.Tensor, absmax: torch.Tensor, blocksize: int, kind: str, count: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same by bitsandbytes' CUDA kernel, the `count` values rounded to `dtype` already."""
    import torch

    done: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(raw, absmax, blocksize, kind, (count,), dtype)
    return done.view(-1)


@cache
def has_kernels() -> bool:
    """Whether bitsandbytes is there and loads."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # it has many ways to fail beside a CUDA that it was not built for
        return False
    return True


# --- finding them ----------------------------------------------------------------------------------------------------


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str) -> Iterator[Quantized4bit]:
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
            raise FormatError(f"{state.file}: {name} is missing: {weight} is {kind.upper()} and cannot be read without")
        if (dtype is not None and info.dtype != dtype) or prod(info.shape) != count:
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} {info.shape}, expected {dtype} with {count} elements"
            )
        return replace(info, shape=(count,))

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
        raise FormatError(f"{absmax.file}: {absmax.name} is {absmax.dtype}: nested, but its nested_absmax is missing")
    code = part(".quant_map", "F32", 16)
    return Quantized4bit(weight, kind, tuple(shape), DTYPES[dtype], stored, blocksize, absmax, code, state, nested)


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


# --- quantizing ------------------------------------------------------------------------------------------------------

NESTED_BLOCK = 256
OFFSET_DIGITS = 25  # what a float32 takes in JSON, at most
TINY = 1e-38  # stands in for the scale of a block of zeros


def scale(values: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`values / absmax`, in [−1, 1], and `absmax`, one a block.

    In the arithmetic of bitsandbytes' reference: full blocks times the reciprocal, a last, short one divided.
    """
    import torch

    full = len(values) // blocksize * blocksize
    absmax = values[:full].view(-1, blocksize).abs().amax(dim=1)
    scaled = (values[:full].view(-1, blocksize) * absmax.clamp(min=TINY).reciprocal()[:, None]).view(-1)
    if full < len(values):
        last = values[full:].abs().max()
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, values[full:] / last.clamp(min=TINY)])
    return scaled.clamp_(-1, 1), absmax


@dataclass(frozen=True)
class Spec4bit(QuantizationSpec):
    """To NF4 or FP4 as bitsandbytes stores it, packed into elements of `storage`."""

    bits = 4

    shape: tuple[int, ...]
    dtype: str
    kind: str
    blocksize: int
    nested: bool
    storage: str = "U8"
    rounding: Rounding = NEAREST

    @property
    def scheme(self) -> str:
        return _scheme(self.kind, self.blocksize, self.nested)

    def layout(self, name: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        count = prod(self.shape)
        blocks = -(-count // self.blocksize)
        packed = (count + 1) // 2 * 8 // DTYPE_BITS[self.storage]
        tensors = [(name, self.storage, (packed, 1)), (f"{name}.absmax", "U8" if self.nested else "F32", (blocks,))]
        if self.nested:
            tensors += [(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),))]
            tensors += [(f"{name}.nested_quant_map", "F32", (256,))]
        room = len(self.state(0.0)) + (OFFSET_DIGITS if self.nested else 0)
        tensors += [(f"{name}.quant_map", "F32", (16,))]
        return (*tensors, (f"{name}.quant_state.bitsandbytes__{self.kind}", "U8", (room,)))

    def state(self, offset: float) -> bytes:
        """The quant_state as JSON."""
        dtype = next(name for name, stored in DTYPES.items() if stored == self.dtype)
        facts = {"quant_type": self.kind, "blocksize": self.blocksize, "dtype": dtype, "shape": list(self.shape)}
        if self.nested:
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(facts).encode()

    def rows_together(self, columns: int) -> int:
        return self.blocksize // gcd(self.blocksize, columns)

    def start(self, columns: int) -> Quantizer4bit:
        return Quantizer4bit(self, columns)


class Quantizer4bit(Quantizer):
    """One weight on its way to 4 bits."""

    def __init__(self, spec: Spec4bit, columns: int) -> None:
        import torch

        self.spec, self.columns, self.count = spec, columns, prod(spec.shape)
        self.code = torch.tensor(CODES[spec.kind])
        self.order = self.code.argsort()
        self.absmax = torch.empty(-(-self.count // spec.blocksize))
        self.restored = self.absmax  # as a reader finds it: after nesting another
        self.shares = spec.rounding.read_shares()

    def pack(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        import torch

        size, at = self.spec.blocksize, first * self.columns
        scaled, absmax = scale(rows.reshape(-1), size)
        self.absmax[at // size : at // size + len(absmax)] = absmax.cpu()
        unit = scaled if self.spec.rounding.kind == "nearest" else absmax.repeat_interleave(size)[: len(scaled)]
        code, order = self.code[self.order].to(rows.device), self.order.to(rows.device, torch.uint8)
        index = choose_codes(scaled.view_as(rows), unit.view_as(rows), code, self.spec.rounding, at, self.shares)
        nibbles = order.index_select(0, index.reshape(-1))
        if len(nibbles) % 2:
            nibbles = torch.cat([nibbles, self.zero.to(rows.device)])
        return pairs(nibbles)

    @property
    def zero(self) -> torch.Tensor:
        """What fills up the last byte."""
        import torch

        return (self.code == 0).nonzero()[:1, 0].to(torch.uint8)

    def finish(self) -> list[bytes]:
        if not self.spec.nested:
            return [_bytes(self.absmax), _bytes(self.code), self.spec.state(0.0)]
        import torch

        offset, code = self.absmax.mean(), dynamic_code()
        scaled, scales = scale(self.absmax - offset, NESTED_BLOCK)
        index = choose_codes(scaled, scaled, code, NEAREST, 0)
        self.restored = code[index] * scales.repeat_interleave(NESTED_BLOCK)[: len(index)] + offset
        state = self.spec.state(float(offset))
        room = len(self.spec.state(0.0)) + OFFSET_DIGITS
        return [_bytes(index.to(torch.uint8)), _bytes(scales), _bytes(code), _bytes(self.code), state.ljust(room)]

    def unpack(self, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
        begin, end = first * self.columns, last * self.columns
        absmax = self.restored[begin // self.spec.blocksize : -(-end // self.spec.blocksize)].to(packed.device)
        values = dequantize(packed, absmax, pair_table(self.code.to(packed.device)), self.spec.blocksize)
        return values[: end - begin].view(last - first, self.columns)

    def most(self) -> float:
        return float(self.restored.abs().max() * self.code.abs().max())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def spec(weight: TensorInfo | QuantizedWeight, settings: QuantizationSettings, rounding: Rounding) -> Spec4bit:
    """How to quantize `weight` to NF4 or FP4."""
    dtype = weight.dtype if weight.dtype in DTYPES.values() else "F32"  # no name for F64
    return Spec4bit(weight.shape, dtype, settings.kind, settings.blocksize, settings.nested, rounding=rounding)


def declaration(settings: QuantizationSettings, dtype: str) -> dict[str, Any]:
    """The `quantization_config` of a model in NF4 or FP4."""
    return quantization_config(4, settings.kind, settings.nested, TORCH_NAMES[dtype])


# --- in memory -------------------------------------------------------------------------------------------------------


def layer_weight(layer: Any) -> torch.Tensor:
    """The weight of a Linear4bit; bitsandbytes' CPU kernel is wrong where blocks straddle rows (see tests)."""
    import torch

    state, stored = layer.weight.quant_state, layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):  # rearranged for its CPU kernels
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        stored, state = _convert_weight_packed_for_cpu_inverse(stored, state)
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    raw, count = stored.reshape(-1).view(torch.uint8), prod(state.shape)
    if raw.is_cuda and has_kernels():
        values = kernel(raw, absmax.float(), state.blocksize, state.quant_type, count, state.dtype)
    else:
        values = dequantize(raw, absmax.float(), pair_table(state.code), state.blocksize)
    return values[:count].view(state.shape).to(state.dtype)


def loading(kind: str, dtype: torch.dtype) -> Any:
    """The config by which transformers quantizes a model as it loads."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )  # type: ignore[no-untyped-call]


SCHEME = Scheme(
    label="bitsandbytes NF4 and FP4",
    kinds=KINDS,
    suffixes=SUFFIXES,
    find=find,
    in_values=".quant_state.",
    writer=Writer(spec, declaration, BLOCKSIZES, nests=True),
    layer=Layer(
        "bitsandbytes",
        "Linear4bit",
        lambda layer: getattr(layer.weight, "quant_state", None) is not None,
        layer_weight,
        loading,
    ),
)
