"""Calibrate compensated rounding (GPTQ, arXiv 2210.17323): error shares from the inputs of linear layers on a text.

Rounding W to Q changes a layer's output by `‖(W − Q)·X‖`, which depends on its inputs only by `H = Σ x·xᵀ`. With U the
upper Cholesky factor of H⁻¹, each later column k compensates the share `U[j, k] / U[j, j]` of column j's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from adapterkit.base.models.config_check import check_described
from adapterkit.base.models.loading import load_causal, load_tokenizer
from adapterkit.base.models.tokenizing import encode_text
from adapterkit.errors import FitError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import TensorInfo, read_header, write_tensors
from adapterkit.files.staging import map_os_errors
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import MergePlan
from adapterkit.text import counted

SPAN = 2048  # columns that share errors, at most: H of more would not fit in memory
TOKENS = 512  # per forward pass
MAX_PASSES = 64
MAX_CHARACTERS = 64 * TOKENS * MAX_PASSES  # read from the text; more than enough for all passes
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper


@contextmanager
def calibrated(plan: MergePlan) -> Iterator[MergePlan]:
    """Yield `plan` with the error shares measured on its calibration text, in temporary files until the block ends.

    transformers runs the whole base. Raises UsageError if that is not installed or the text is too short, FormatError
    if the base does not load, FitError if it lacks a layer to round, NoSpaceError if the temporary directory is full.
    """
    edits = {edit.name: edit for edit in plan.merges if edit.packing}
    with TemporaryDirectory(prefix="adapterkit-") as folder:
        shares = _measure(plan, edits, Path(folder))
        files = [replace(file, edits=tuple(_with(edit, shares) for edit in file.edits)) for file in plan.files]
        yield replace(plan, files=tuple(files))


def _with(edit: MergeEdit | RestoreEdit, shares: dict[str, TensorInfo]) -> MergeEdit | RestoreEdit:
    if isinstance(edit, RestoreEdit) or edit.name not in shares:
        return edit
    packing: Any = edit.packing
    return replace(edit, packing=replace(packing, rounding=replace(packing.rounding, shares=shares[edit.name])))


def _measure(plan: MergePlan, edits: dict[str, MergeEdit], folder: Path) -> dict[str, TensorInfo]:
    """Run the base on the text, and write the error shares of every edited weight to `folder`."""
    assert plan.calibration is not None
    with TextIOWrapper(open_regular(plan.calibration), "utf-8", "replace") as stream:
        text = stream.read(MAX_CHARACTERS)
    check_described(plan.base)
    tokenizer, model = load_tokenizer(plan.base), load_causal(plan.base, dtype="auto", device_map="cpu")
    ids = torch.tensor(encode_text(tokenizer, text)["input_ids"])
    if len(ids) < 2:
        raise UsageError(f"{plan.calibration}: the text has {counted(len(ids), 'token')}, expected at least 2")
    inputs = _InputMoments()
    for name in edits:
        _module(model, name).register_forward_pre_hook(inputs.hook(name))
    with torch.no_grad():
        for batch in torch.split(ids, TOKENS)[:MAX_PASSES]:
            inputs.last = None
            model(batch[None], logits_to_keep=1)
    del model
    written: dict[int, TensorInfo] = {}
    for name in edits:
        H = inputs.moments.get(name)
        if H is None:
            raise FitError(f"{name}: no input on the calibration text; use a longer text, or omit `calibration`")
        if id(H) not in written:
            file = folder / f"{len(written)}.safetensors"
            with map_os_errors(file):
                write_tensors(file, {"shares": shares_of(H)}, {})
            written[id(H)] = read_header(file).tensors["shares"]
    return {name: written[id(inputs.moments[name])] for name in edits}


def _module(model: nn.Module, weight: str) -> nn.Module:
    """The layer of a checkpoint's weight; the checkpoint's name may lack the model's prefix."""
    wanted = weight.removesuffix(".weight")
    found = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{wanted}")]
    if len(found) != 1:
        raise FitError(f"{weight}: expected one layer of this name in the transformers model, found {len(found)}")
    return model.get_submodule(found[0])


class _InputMoments:
    """`Σ x·xᵀ` over the inputs of each layer, by weight; layers called with the same tensor share one sum."""

    def __init__(self) -> None:
        self.moments: dict[str, torch.Tensor] = {}
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # the last input and its sum

    def hook(self, name: str) -> Any:
        """A forward pre-hook that adds the inputs of the layer to the moments of `name`."""

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            if self.last is not None and self.last[0] is x:
                self.moments[name] = self.last[1]
                return
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            spans = spans_of(rows.shape[1])
            width = spans[0][1]
            total = self.moments.get(name)
            if total is None:
                total = self.moments[name] = torch.zeros(len(spans), width, width)
            for part, (start, stop) in zip(total, spans, strict=True):
                inside = rows[:, start:stop]
                part[: stop - start, : stop - start].addmm_(inside.T, inside)
            self.last = (x, total)

        return add


def spans_of(columns: int) -> list[tuple[int, int]]:
    """Split columns into as few spans of equal width as `SPAN` allows; the last may be narrower."""
    count = -(-columns // SPAN)
    width = -(-columns // count)
    return [(start, min(columns, start + width)) for start in range(0, columns, width)]


def shares_of(moments: torch.Tensor) -> torch.Tensor:
    """`U[j, k] / U[j, j]` for k > j, float32 `(columns, width)`, from `H (spans, width, width)`."""
    found = []
    for H in moments.double():
        diagonal = H.diagonal()
        diagonal[diagonal == 0] = 1.0  # inputs that were always zero
        diagonal += DAMPING * diagonal.mean()
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        found.append((upper / upper.diagonal()[:, None]).triu(1).float())
    return torch.cat(found)
