"""Block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437; transformers' `fp8`): `W = q · scale` per square block.

`q` is e4m3 `(out, in)`; `weight_scale_inv (⌈out/b⌉, ⌈in/b⌉)` multiplies it, despite its name, and can be in another
shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.base.quant.scheme import Scheme
from adapterkit.base.quant.weight import Codes, QuantizedWeight, Read, Rows
from adapterkit.errors import FormatError
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

SCALE = "_scale_inv"


@dataclass(frozen=True)
class QuantizedFP8(QuantizedWeight):
    """A weight in e4m3 with one scale per `block` (rows, columns)."""

    scale: TensorInfo
    block: tuple[int, int]

    @property
    def scheme(self) -> str:
        return f"FP8, blocks of {self.block[0]}×{self.block[1]}"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.stored, self.scale)

    def slack(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        values = self.open(columns)
        smallest = float(self.scale.read().abs().max()) * 2**-10  # half of e4m3's smallest step
        return lambda first, last: values(first, last).float().abs() * 2**-4 + smallest

    def spec(self) -> None:
        return None

    def open(self, columns: int) -> Rows:
        import torch

        scales, dtype = self._scales(columns), getattr(torch, TORCH_NAMES[self.dtype])

        def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
            start, stop = self.stored.start + first * columns, self.stored.start + last * columns
            q = read(replace(self.stored, start=start, stop=stop, shape=(last - first, columns)))
            return q.float().mul_(scales(first, last).to(q.device)).to(dtype)

        return rows

    def codes(self, columns: int) -> Codes:
        import torch

        scales = self._scales(columns)

        def codes(rows: torch.Tensor, first: int) -> torch.Tensor:
            q = rows.float() / scales(first, first + len(rows)).to(rows.device)
            return q.nan_to_num_().to(torch.float8_e4m3fn).view(-1).view(torch.uint8)

        return codes

    def _scales(self, columns: int) -> Callable[[int, int], torch.Tensor]:
        """Return a function for the float32 scales of all elements of rows `first:last`."""
        import torch

        height, width = (min(size, each) for size, each in zip(self.shape, self.block, strict=True))
        # Expanded to columns here, to rows on demand.
        scale = self.scale.read().float().repeat_interleave(width, dim=1)[:, :columns]
        return lambda first, last: scale[torch.arange(first, last) // height]


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str) -> Iterator[QuantizedFP8]:
    """Yield every block-scaled FP8 weight among `tensors`; raises FormatError if its scales don't match its blocks."""
    declared = config.get("quantization_config")
    block = declared.get("weight_block_size") if isinstance(declared, dict) else None
    for name, scale in tensors.items():
        weight = name.removesuffix(SCALE)
        if weight == name or not weight.endswith("weight"):
            continue
        stored = tensors.get(weight)
        if stored is None:
            raise FormatError(f"{scale.file}: {name} scales {weight}, which is missing")
        if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
            raise FormatError(
                f"{scale.file}: {name}: the config's quantization_config has weight_block_size {block!r}, expected two "
                "sizes, which are needed where blocks do not divide the weight evenly"
            )
        shape = tuple(-(-size // each) for size, each in zip(stored.shape, block, strict=False))
        if (
            stored.dtype != "F8_E4M3"
            or len(stored.shape) != 2
            or 0 in stored.shape
            or scale.shape != shape
            or scale.dtype not in FLOAT_DTYPES
        ):
            raise FormatError(
                f"{scale.file}: {weight} is {stored.dtype} {stored.shape} and its scale {scale.dtype} {scale.shape}; "
                f"expected F8_E4M3 (out, in), neither 0, and {shape} for blocks of {block[0]}×{block[1]}"
            )
        yield QuantizedFP8(weight, "fp8", stored.shape, dtype, stored, scale, (block[0], block[1]))


SCHEME = Scheme(label="block-scaled FP8", kinds=("fp8",), suffixes=(SCALE,), find=find)
