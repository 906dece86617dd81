"""Blocks of rows: the size of chunks, and the same result wherever a block is cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from oracle import check, merged
from safetensors.torch import load_file, save_file
from test_merge import TINY

import adapterkit
from adapterkit.adapter.weights import LazyTensor
from adapterkit.algebra.updates import Retention
from adapterkit.files.safetensors import read_header
from adapterkit.merging.blocks.block import _same, merge_rows
from adapterkit.merging.blocks.device import Buffers, ComputeDevice
from adapterkit.merging.blocks.loading import FactorReader, load
from adapterkit.merging.blocks.reading import GROUP_ROWS, chunk_rows, rows_at_a_time
from adapterkit.merging.plan.edits import Addition, MergeEdit, Replacement


@pytest.mark.parametrize("chunk", [1, 31, 32, 96, 1000, 2**17])
@pytest.mark.parametrize("columns", [0, 1, 3, 31, 32, 33, 4096, 2**20])
def test_chunks_are_as_large_as_they_may_be(columns: int, chunk: int) -> None:
    """Whole groups of rows, or a power of two if fewer, so that a midpoint group is never split."""
    rows = chunk_rows(columns, chunk)
    allowed = [2**k for k in range(6)] + list(range(2 * GROUP_ROWS, chunk + GROUP_ROWS, GROUP_ROWS))
    assert rows == max(one for one in allowed if one == 1 or one * max(1, columns) <= chunk)


@pytest.mark.parametrize("together", [1, 3, 8, 64])
@pytest.mark.parametrize("chunk", [1, 31, 96, 1000, 2**17])
def test_no_block_of_a_quantized_output_is_cut(together: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as fit, in multiples of `together`, and at least that many."""
    monkeypatch.setattr(MergeEdit, "rows_together", together)
    for columns in (1, 3, 33, 4096):
        rows = chunk_rows(columns, chunk)
        step = rows_at_a_time(MergeEdit("m.weight", None, "F32", (20, columns), 0, 80 * columns, ()), chunk)
        assert step == max([together, *range(together, rows + 1, together)])


@pytest.mark.parametrize("rows", [13, 1000])
@pytest.mark.parametrize(
    ("name", "weight"), [*[(name, 0.5) for name in TINY], ("tiny-dora", 1.0), ("tiny-embed-save", 1.0)]
)
def test_blocks_are_rows_of_the_whole(name: str, weight: float, rows: int, tmp_path: Path) -> None:
    """Rows are rounded as the oracle says, with the oracle's retention, and flagged if they differ from the base."""
    adapter, folder = FIXTURES / name, FIXTURES / "bases" / TINY[name]
    base = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    expected = merged(base, adapter, weight, conv1d=name == "tiny-conv1d")
    buffers, seen = Buffers(), set()
    buffers.place = ComputeDevice(torch.device("cpu"), 500)
    for file in adapterkit.plan_merge(folder, [(adapter, weight)], tmp_path / "out").files:
        for edit in (one for one in file.edits if one.name in expected and one.source is not None):
            fd = os.open(file.source, os.O_RDONLY)
            (depth, columns), before = edit.matrix, base[edit.name]
            loaded, measured, found = load(edit, fd, FactorReader()), Retention(), []
            for first in range(0, depth, rows):
                last = min(depth, first + rows)
                into = bytearray((last - first) * columns * before.itemsize)
                made = merge_rows(
                    loaded, first, last, buffers, memoryview(into), measured=last - first, undoable=first % 2 == 0
                )
                found.append(torch.frombuffer(into, dtype=before.dtype).view(-1, columns))
                source = before.view(depth, columns)[first:last]
                assert made.changed is not torch.equal(found[-1], source) and (made.undo is None) is (first % 2 == 1)
                assert made.retention is not None
                measured += made.retention
            os.close(fd)
            after, want = torch.cat(found).view(before.shape), expected[edit.name]
            assert check(after, want) == 0
            if not edit.replaced:
                delta, applied = want.exact - before.double(), after.double() - before.double()
                assert measured.retained == pytest.approx(
                    float((applied * delta).sum() / delta.square().sum()), rel=1e-3
                )
            seen.add(edit.name)
    assert seen


def test_rows_are_the_same_or_not() -> None:
    rows = torch.randn(5, 3).bfloat16()
    for other in (rows, rows.float()):
        assert _same(rows, other)
    for row in (0, 4):
        changed = rows.clone()
        changed[row, 2] += 1
        assert not _same(rows, changed)
    assert not _same(None, rows)


@pytest.mark.parametrize("kept", [20, 13, 0], ids=["in the base", "longer", "new"])
@pytest.mark.parametrize("weight", [1.0, 0.25, -1.0])
def test_values_replace_the_base_wherever_it_is_cut(weight: float, kept: int, tmp_path: Path) -> None:
    """All rows, then single rows: first, last and adjacent, interpolated by a weight; new rows take the values whole."""
    W, whole, tokens = torch.randn(20, 3), torch.randn(20, 3), torch.randn(4, 3).half()
    rows, vector = (19, 0, 12, 13), torch.randn(20)
    save_file({"m.weight": W[: kept or 20]}, tmp_path / "m.safetensors")
    source = read_header(tmp_path / "m.safetensors").tensors["m.weight"] if kept else None
    replaced = (
        Replacement(LazyTensor.of(whole), weight),
        Replacement(LazyTensor.of(tokens), weight, rows),
    )
    edit = MergeEdit("m.weight", source, "F32", (20, 3), 0, 240, (), replaced, (Addition(LazyTensor.of(vector), 0.5),))
    exact = whole.double()
    exact[:kept] = (W.double() + weight * (whole.double() - W.double()))[:kept]
    exact[list(rows)] += weight * (tokens.double() - exact[list(rows)])
    exact += 0.5 * vector[:, None].double()
    fd = os.open(tmp_path / "m.safetensors", os.O_RDONLY)
    loaded, buffers = load(edit, fd, FactorReader()), Buffers()
    for chunk in (1, 6, 12, 1000):
        buffers.place = ComputeDevice(torch.device("cpu"), chunk)
        for size in (1, 7, 20):
            spans = list(edit.spans(size))
            assert [row for span in spans for row in range(*span)] == list(range(20))
            for first, last in spans:
                into = bytearray((last - first) * 12)
                merge_rows(loaded, first, last, buffers, memoryview(into))
                assert torch.equal(torch.frombuffer(into, dtype=torch.float32).view(-1, 3), exact[first:last].float())
    os.close(fd)
