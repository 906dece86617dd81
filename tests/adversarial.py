"""Weights and low-rank updates chosen to make undoing a merge as hard as possible.

Half of the weights are powers of two, whose rounding boundary on one side is half as far as on the other. Every sum
W + Δ is a midpoint of the output dtype, or about a unit of the computing dtype beside it, so that its last bit decides
the rounding. `A` is a rotation, so that every product has rounding errors.

"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.algebra import residual
from adapterkit.algebra.updates import Update
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.merging.blocks import undo

COMPUTED_IN = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
COLUMNS = RANK = 4
UNITS = 0.75  # how far beside a midpoint
Factors = tuple[torch.Tensor, torch.Tensor]  # B (rows, rank), A (rank, columns)
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return weights over about eleven binades of either sign: half powers of two, and a few zeros and subnormals."""
    rng = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-9, 2, (rows, columns), generator=rng)
    mantissa = 1 + torch.rand(rows, columns, dtype=torch.float64, generator=rng)
    mantissa[torch.rand(rows, columns, generator=rng) < 0.5] = 1.0
    sign = torch.randint(0, 2, (rows, columns), generator=rng) * 2 - 1
    values = sign * torch.ldexp(mantissa, exponent)
    odd = torch.rand(rows, columns, generator=rng)
    values[odd < 0.002] *= 0.0
    values[(odd > 0.002) & (odd < 0.004)] *= torch.finfo(dtype).tiny
    return values.to(dtype)


def midpoints(
    near: torch.Tensor, dtype: torch.dtype, seed: int, units: float = UNITS, kind: torch.dtype | None = None
) -> torch.Tensor:
    """Return for each of `near` a nearby midpoint between two values of `dtype`, in float64, plus or minus `units`.

    Half of them are a few values away, the others up to a factor of three. The units are those of `kind`.

    """
    rng = torch.Generator().manual_seed(seed)
    shape, integer, limits = near.shape, INTEGERS[dtype], torch.finfo(kind or COMPUTED_IN[dtype])
    close = torch.rand(shape, generator=rng) < 0.5
    factor = torch.exp2(3 * torch.rand(shape, dtype=torch.float64, generator=rng) - 1.5)
    bits = (near.double() * torch.where(close, 1.0, factor)).to(dtype).view(integer)
    bits += torch.where(close & (bits & 0x7FFF > 4), torch.randint(-4, 5, shape, generator=rng), 0).to(integer)
    low, high = bits.view(dtype).double(), (bits + 1).view(dtype).double()
    unit = torch.exp2(torch.frexp(low.abs().clamp(min=limits.tiny))[1] - 1.0) * limits.eps
    return (low + high) / 2 + unit * units * (2 * torch.rand(shape, dtype=torch.float64, generator=rng) - 1)


def factors(delta: torch.Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Return `B · A = delta (rows, columns)` as closely as `dtype` allows, with A a random rotation."""
    rng = torch.Generator().manual_seed(seed)
    columns = delta.shape[1]
    A = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=rng))[0].to(dtype)
    return torch.linalg.solve(A.double(), delta.double(), left=False).to(dtype), A


def split(delta: torch.Tensor, parts: int, seed: int) -> list[torch.Tensor]:
    """Return several updates that add up to `delta`, with different signs."""
    rng = torch.Generator().manual_seed(seed)
    shares = [delta * (3 * torch.rand(delta.shape, dtype=delta.dtype, generator=rng) - 1) for _ in range(parts - 1)]
    return [*shares, delta - sum(shares, torch.zeros_like(delta))]


def plain(
    rows: int, dtype: torch.dtype, seed: int, parts: int = 1, units: float = UNITS, W: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Factors]]:
    """Return weights `(rows, 4)`, or `W`, and updates whose sums with them are midpoints of `dtype`."""
    W = weights(rows, COLUMNS, dtype, seed) if W is None else W
    delta = midpoints(W, dtype, seed + 1, units) - W.double()
    kind = COMPUTED_IN[dtype]
    return W, [factors(one, seed + 3 + i, kind) for i, one in enumerate(split(delta, parts, seed + 2))]


def dora(
    rows: int, dtype: torch.dtype, seed: int, units: float = UNITS, by_column: bool = False
) -> tuple[torch.Tensor, Factors, torch.Tensor]:
    """Return weights, an update and magnitudes for which `W' / g − B·A` is at a rounding boundary of `dtype`, in float64.

    Here `W' = round(g·(W + B·A))`, `g = m / n`. The boundary is between W and the next value, or half a float32 beside it,
    as torch rounds to 16 bits through float32. `W (4, rows)` if it is `by_column`, as GPT-2 stores it; `B (rows, 4)` and
    `A` are those of the module either way.

    """
    W = weights(rows, COLUMNS, dtype, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    gain = torch.exp2(2 * torch.rand(rows, 1, dtype=torch.float64, generator=rng) - 1)
    bits, values = W.view(INTEGERS[dtype]), W.double()
    steps = torch.randint(0, 2, W.shape, generator=rng).to(bits.dtype) * 2 - 1
    left = (values + (bits + steps).view(dtype).double().nan_to_num(0.0)) / 2
    if dtype is not torch.float32:
        beside = torch.nextafter(left.float(), torch.randint(0, 2, W.shape, generator=rng) * 8.0 - 4).double()
        left = (left + beside) / 2
    left *= 1 + units * torch.finfo(torch.float64).eps * (2 * torch.rand(W.shape, dtype=left.dtype, generator=rng) - 1)
    after = (values * gain * torch.exp2(torch.randint(1, 3, W.shape, generator=rng) * 1.0)).to(dtype).double()
    delta = after / gain - left
    magnitude = gain[:, 0] * (values + delta).norm(dim=1)
    return (W.T.contiguous() if by_column else W), factors(delta, seed + 3, torch.float64), magnitude


def sums(W: torch.Tensor, reach: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 sums whose rounding error takes 16-bit weights near a boundary, and a bound on the Δ in them.

    The bound is `reach` times the distance to the boundary, or the size of Δ.

    """
    rng = torch.Generator().manual_seed(seed)
    bits, values = W.view(torch.int16), W.double()
    steps = torch.where(torch.rand(W.shape, generator=rng) < 0.5, 1, -1).short()
    boundary = (((bits + steps).view(W.dtype).double() - values) / 2).nan_to_num(0.0)
    share = 1 - 10 ** (-4 * torch.rand(W.shape, dtype=torch.float64, generator=rng))
    error = boundary * torch.where(torch.rand(W.shape, generator=rng) < 0.1, 0.0, share)
    times = torch.exp2(torch.randint(-1, 6, W.shape, generator=rng) * 1.0) * (1 + torch.rand(W.shape, generator=rng))
    total = ((values * times).to(W.dtype).double() - error).float()
    return total, torch.maximum(boundary.abs() * reach, (total.double() - values).abs() * 1.001)


# --- undone by other arithmetic ---------------------------------------------------------------------------------------


def rank_one_at_a_time(order: str) -> Product:
    """Add `B[:, k]·A[k]` term by term, rounding after each: forwards, backwards, or shuffled."""

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        count = len(right)
        terms = {"forwards": torch.arange(count), "backwards": torch.arange(count).flip(0)}
        total = left.new_zeros(len(left), right.shape[1])
        for k in terms.get(order, torch.randperm(count)).tolist():
            total += left[:, k, None] * right[k]
        return total

    return product


def in_pairs(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add up the terms as a tree."""
    terms = [left[:, k, None] * right[k] for k in range(len(right))]
    while len(terms) > 1:
        terms = [sum(terms[at : at + 2][1:], terms[at]) for at in range(0, len(terms), 2)]
    return terms[0]


def in_float64(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.double() @ right.double()).to(left.dtype)


def in_halves(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    half = len(right) // 2
    return left[:, half:] @ right[half:] + left[:, :half] @ right[:half]


ARITHMETIC: dict[str, Product] = {
    "the same": residual.product, "in pairs": in_pairs, "in float64": in_float64, "in halves": in_halves,
    **{order: rank_one_at_a_time(order) for order in ("forwards", "backwards", "shuffled")},
}  # fmt: skip


def undo_by(product: Product, patch: pytest.MonkeyPatch) -> None:
    """Undo merges with this product, also in place of the compiled loop."""

    def subtract(after: torch.Tensor, first: int, updates: list[Update], out: torch.Tensor, *_: torch.Tensor) -> None:
        out.copy_(residual.subtracted(after, first, updates))

    patch.setattr(residual, "product", product)
    patch.setattr(undo, "subtract_rounded", subtract)


# --- as files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A base, the adapters to merge into it together, and the options."""

    base: Path
    adapters: list[Path]
    how: dict[str, Any]


MODULE = "layers.0.q"
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
PLAIN = {
    f"{name} × {parts}": (dtype, parts)
    for name, dtype in (("bf16", LOW), ("fp16", HALF), ("fp32", FULL))
    for parts in (1, 2, 3)
}
WIDER = {"bf16 to fp32": LOW, "fp16 to fp32": HALF}
DORA = {
    f"{name} dora{' by column' if by_column else ''}": (dtype, by_column)
    for name, dtype in (("bf16", LOW), ("fp16", HALF), ("fp32", FULL))
    for by_column in (False, True)
}
BOTH = {"bf16 dora and plain": LOW, "fp16 dora and plain": HALF}
STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "nf4": (LOW, {"to": "nf4"}), "nested nf4": (HALF, {"to": "nf4", "nested": True}), "fp4": (HALF, {"to": "fp4"}),
    "int8": (LOW, {"to": "int8"}), "fp8": (LOW, {}), "fp8 in fp16": (HALF, {}),
}  # fmt: skip
CASES = [*PLAIN, *WIDER, *DORA, *BOTH, *STORED]


def write(name: str, folder: Path, rows: int, seed: int) -> Case:
    """Write one of `CASES`: a module with weights `(rows, 4)`."""
    how: dict[str, Any] = {}
    if name in PLAIN:
        dtype, parts = PLAIN[name]
        W, updates = plain(rows, dtype, seed, parts)
    elif name in WIDER:
        W = weights(rows, COLUMNS, WIDER[name], seed)
        W, updates = plain(rows, FULL, seed, 2, W=W)
        how = {"dtype": "fp32"}
    elif name in DORA:
        W, update, magnitude = dora(rows, *DORA[name][:1], seed, by_column=DORA[name][1])
        base = write_base(folder, W, {"model_type": "gpt2"} if DORA[name][1] else {})
        return Case(base, [write_adapter(folder / "dora", update, magnitude)], how)
    elif name in BOTH:
        W, (B, A), magnitude = dora(rows, BOTH[name], seed)
        V = W.double() + B @ A
        renormalized = magnitude[:, None] / V.norm(dim=1, keepdim=True) * V
        delta = midpoints(W, W.dtype, seed + 9, kind=torch.float64) - renormalized
        adapters = [write_adapter(folder / "dora", (B, A), magnitude)]
        adapters.append(write_adapter(folder / "plain", factors(delta, seed + 8, torch.float64)))
        return Case(write_base(folder, W), adapters, how)
    else:
        base, W = write_quantized(folder, rows, seed, *STORED[name])
        W, updates = plain(rows, W.dtype, seed, 2, W=W)
        return Case(base, [write_adapter(folder / f"part-{i}", one) for i, one in enumerate(updates)], how)
    return Case(write_base(folder, W), [write_adapter(folder / f"part-{i}", one) for i, one in enumerate(updates)], how)


def write_base(folder: Path, W: torch.Tensor, config: dict[str, Any] | None = None, **others: torch.Tensor) -> Path:
    """Write a checkpoint of one module, and other tensors."""
    base = folder / "base"
    base.mkdir(parents=True)
    save_file({f"{MODULE}.weight": W} | others, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config or {}))
    return base


def write_quantized(
    folder: Path, rows: int, seed: int, dtype: torch.dtype, how: dict[str, Any]
) -> tuple[Path, torch.Tensor]:
    """Write the weight quantized, with scales that are powers of two; returns the dequantized weight."""
    W, config = weights(rows, COLUMNS, dtype, seed), {"dtype": str(dtype).removeprefix("torch.")}
    if how:
        adapterkit.quantize(write_base(folder / "dense", W, config), folder / "base", **how)
    else:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, COLUMNS]}  # type: ignore
        scale = torch.exp2(
            torch.randint(-4, 5, (-(-rows // 8), 1), generator=torch.Generator().manual_seed(seed)) * 1.0
        )
        others = {f"{MODULE}.weight_scale_inv": scale}
        write_base(folder, W.to(torch.float8_e4m3fn), config, **others)
    checkpoint = open_checkpoint(folder / "base")
    packed = quant.weights(checkpoint.tensors, checkpoint.config)[f"{MODULE}.weight"]
    assert isinstance(packed, quant.QuantizedWeight)
    return folder / "base", packed.open(COLUMNS)(0, rows)


def write_adapter(folder: Path, update: Factors, magnitude: torch.Tensor | None = None) -> Path:
    """Write a PEFT adapter with scaling 1."""
    folder.mkdir(parents=True)
    (B, A), prefix = update, f"base_model.model.{MODULE}"
    tensors = {f"{prefix}.lora_A.weight": A.contiguous(), f"{prefix}.lora_B.weight": B.contiguous()}
    if magnitude is not None:
        tensors[f"{prefix}.lora_magnitude_vector"] = magnitude
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": magnitude is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
