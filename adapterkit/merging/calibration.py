"""Compensated rounding that knows the inputs: what a text makes the linear layers see (GPTQ, arXiv 2210.17323).

Rounding W to Q changes what a layer computes by `‖(W − Q)·X‖`, so by `H = Σ x·xᵀ` over its inputs. With U the upper
Cholesky factor of H⁻¹, column j's error times `U[j, k] / U[j, j]` is taken off each later column k: its share.
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

SPAN = 2048  # columns that share their errors, at most: H of more would not fit memory
TOKENS = 512  # of one forward pass
PASSES = 64  # at most
TEXT = 64 * TOKENS * PASSES  # characters of a text, of which no more tokens are looked at than the passes take
DAMPING = 0.01  # of the mean of H's diagonal, as the paper has it


@contextmanager
def calibrated(plan: MergePlan) -> Iterator[MergePlan]:
    """`plan` with the shares that its calibration text gives, which are on disk as long as this lasts.

    The base is run whole, by transformers. Raises UsageError where that is not installed or the text has too little in
    it, FormatError where the base does not load, FitError where it lacks a layer that is to be rounded, NoSpaceError
    where the directory for temporary files is full.
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
    """Run the base over the text, and write the shares of every edited weight into `folder`."""
    assert plan.calibration is not None
    with TextIOWrapper(open_regular(plan.calibration), "utf-8", "replace") as stream:
        text = stream.read(TEXT)
    check_described(plan.base)
    tokenizer, model = load_tokenizer(plan.base), load_causal(plan.base, dtype="auto", device_map="cpu")
    ids = torch.tensor(encode_text(tokenizer, text)["input_ids"])
    if len(ids) < 2:
        raise UsageError(f"{plan.calibration}: holds {len(ids)} tokens, from which there is nothing to learn")
    seen = _Seen()
    for name in edits:
        _module(model, name).register_forward_pre_hook(seen.hook(name))
    with torch.no_grad():
        for batch in torch.split(ids, TOKENS)[:PASSES]:
            seen.last = None
            model(batch[None], logits_to_keep=1)
    del model
    written: dict[int, TensorInfo] = {}
    for name in edits:
        H = seen.moments.get(name)
        if H is None:
            raise FitError(f"{name}: the text never reaches that layer; calibrate with more of it, or without")
        if id(H) not in written:
            file = folder / f"{len(written)}.safetensors"
            with map_os_errors(file):
                write_tensors(file, {"shares": shares_of(H)}, {})
            written[id(H)] = read_header(file).tensors["shares"]
    return {name: written[id(seen.moments[name])] for name in edits}


def _module(model: nn.Module, weight: str) -> nn.Module:
    """The layer that a tensor of the checkpoint is the weight of; a checkpoint may lack the model's first names."""
    wanted = weight.removesuffix(".weight")
    found = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{wanted}")]
    if len(found) != 1:
        raise FitError(f"{weight}: the model that transformers builds has {len(found)} layers of that name")
    return model.get_submodule(found[0])


class _Seen:
    """`Σ x·xᵀ` of the inputs of layers, by weight; layers that get the very same tensor share one."""

    def __init__(self) -> None:
        self.moments: dict[str, torch.Tensor] = {}
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # an input, and where it was added up

    def hook(self, name: str) -> Any:
        """What adds up the inputs of the layer of weight `name` when it is called."""

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
    """Columns in as few spans of equal width as `SPAN` allows; the last may be narrower."""
    count = -(-columns // SPAN)
    width = -(-columns // count)
    return [(start, min(columns, start + width)) for start in range(0, columns, width)]


def shares_of(moments: torch.Tensor) -> torch.Tensor:
    """`U[j, k] / U[j, j]` for k > j, float32 `(columns, width)`, from `H (spans, width, width)`."""
    found = []
    for H in moments.double():
        diagonal = H.diagonal()
        diagonal[diagonal == 0] = 1.0  # of inputs that were never there
        diagonal += DAMPING * diagonal.mean()
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        found.append((upper / upper.diagonal()[:, None]).triu(1).float())
    return torch.cat(found)
