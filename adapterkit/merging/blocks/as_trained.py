"""Rows of a base as they were quantized for training: `dequantize(quantize(W))`, computed while they are read."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapterkit.base.quant.weight import QuantizationSpec, Read, Rows
from adapterkit.files.safetensors import TORCH_NAMES, TensorInfo, tensor_bytes
from adapterkit.merging.blocks.overflow import check_packable, check_scales

CHUNK = 1 << 20  # elements to read at a time for the scales


def trained_rows(source: TensorInfo, matrix: tuple[int, int], spec: QuantizationSpec) -> Rows:
    """Return a function to read rows of `source`, viewed as a `matrix`, quantized by `spec` and dequantized.

    It reads whole blocks of a scale. If scales depend on each other, the tensor is read once before, for its scales.
    """
    depth, columns = matrix
    quantizer, together = spec.start(columns), spec.rows_together(columns)
    dtype, row = getattr(torch, TORCH_NAMES[spec.dtype]), tensor_bytes(source.dtype, (columns,))

    def packed(first: int, last: int, read: Read) -> torch.Tensor:
        start, stop = source.start + first * row, source.start + last * row
        values = read(replace(source, start=start, stop=stop, shape=(last - first, columns))).float()
        check_packable(source.name, values, spec)
        return quantizer.pack(values, first)

    if spec.scales_together:
        step = max(1, CHUNK // max(1, columns * together)) * together
        for first in range(0, depth, step):
            packed(first, min(depth, first + step), TensorInfo.read)
        quantizer.finish()
        check_scales(source.name, quantizer.max_magnitude(), spec)

    def rows(first: int, last: int, read: Read = TensorInfo.read) -> torch.Tensor:
        low, high = first - first % together, min(depth, -(-last // together) * together)
        values = quantizer.unpack(packed(low, high, read), low, high)
        return values[first - low : last - low].to(dtype)

    return rows
