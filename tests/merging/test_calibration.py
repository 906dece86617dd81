"""Calibrated rounding against a dense GPTQ written from the paper, and on a real model."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from handmade import adapterkit as run_adapterkit

import adapterkit
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.quant.codebooks import CODES
from adapterkit.base.quant.compensated import compensated_codes
from adapterkit.errors import FitError, FormatError, MissingPackageError, NoSpaceError, UsageError
from adapterkit.merging import calibration
from adapterkit.merging.calibration import DAMPING, shares_of, spans_of

CODE = torch.tensor(CODES["nf4"]).double()
BOUNDS = (CODE[:-1] + CODE[1:]) / 2


def inputs(columns: int, count: int = 400) -> torch.Tensor:
    """Correlated inputs (count, columns) of different magnitudes."""
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    return (torch.randn(count, columns) * torch.logspace(-1, 1, columns)) @ mix


def moments(x: torch.Tensor) -> torch.Tensor:
    """`Σ x·xᵀ` by span, as the hooks sum it."""
    spans = spans_of(x.shape[1])
    total = torch.zeros(len(spans), spans[0][1], spans[0][1])
    for part, (start, stop) in zip(total, spans, strict=True):
        part[: stop - start, : stop - start] = x[:, start:stop].T @ x[:, start:stop]
    return total


def gptq(weight: torch.Tensor, unit: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Equations 2 and 3 of arXiv 2210.17323: quantize a column, spread its error by H⁻¹, remove the column from H⁻¹."""
    H = (x.T @ x).double()
    H += DAMPING * H.diagonal().mean() * torch.eye(len(H))
    inverse, weight = torch.linalg.inv(H), weight.double().clone()
    index = torch.empty(weight.shape, dtype=torch.int32)
    for j in range(weight.shape[1]):
        index[:, j] = torch.bucketize(weight[:, j] / unit[:, j], BOUNDS)
        error = (weight[:, j] - CODE[index[:, j]] * unit[:, j]) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return index


def ours(weight: torch.Tensor, unit: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    shares = shares_of(moments(x)).double()
    return compensated_codes(weight.double() / unit, unit, CODE, BOUNDS, shares)


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_codes_match_the_paper(columns: int) -> None:
    x, weight = inputs(columns), torch.randn(24, columns)
    unit = weight.abs().amax(dim=1, keepdim=True).double().expand_as(weight)
    assert torch.equal(ours(weight, unit, x), gptq(weight, unit, x))


def test_wide_weights_share_errors_within_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SPAN", 40)
    assert spans_of(100) == [(0, 34), (34, 68), (68, 100)] and spans_of(40) == [(0, 40)]
    x, weight = inputs(100), torch.randn(24, 100)
    unit = weight.abs().amax(dim=1, keepdim=True).double().expand_as(weight)
    got = ours(weight, unit, x)
    # Damping goes by the mean of a span; the narrow last one is padded with inputs of size 1.
    for start, stop in spans_of(100)[:-1]:
        expected = gptq(weight[:, start:stop], unit[:, start:stop], x[:, start:stop])
        assert torch.equal(got[:, start:stop], expected)


def test_calibration_reduces_the_error_of_a_layers_output() -> None:
    x, weight = inputs(96), torch.randn(48, 96)
    unit = weight.abs().amax(dim=1, keepdim=True).double().expand_as(weight)

    def off(index: torch.Tensor) -> float:
        return float(((CODE[index] * unit - weight) @ x.double().T).norm())

    nearest = torch.bucketize(weight / unit, BOUNDS)
    assert off(ours(weight, unit, x)) < 0.8 * off(nearest)
    assert torch.equal(
        compensated_codes(CODE[nearest], unit, CODE, BOUNDS, torch.rand(96, 96).triu(1).double()), nearest
    )


def test_inputs_that_are_always_zero_are_harmless() -> None:
    x = inputs(20)
    x[:, [3, 19]] = 0
    shares = shares_of(moments(x))
    assert bool(shares.isfinite().all()) and not bool(shares[[3, 19]].any()) and not bool(shares[:, [3, 19]].any())
    assert not bool(shares_of(torch.zeros(1, 4, 4)).any())


# --- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """tiny-llama with a tokenizer of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "bases" / "tiny-llama", folder)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0} | {f"w{i}": i for i in range(1, 60)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 59 + 1}" for i in range(1500)))
    return folder


def layer_inputs(folder: Path, text: Path, name: str) -> torch.Tensor:
    """The inputs of a layer, collected by a hook of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt")["input_ids"][0]
    network, seen = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), []
    network.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0][0].float()))
    with torch.no_grad():
        for part in ids.split(512):
            network(part[None])
    return torch.cat(seen)


def test_a_model_is_quantized_with_the_inputs_of_its_layers(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    how: dict[str, Any] = {"to": "nf4", "blocksize": 32, "rounding": "compensated", "calibration": text}
    adapterkit.quantize(model, tmp_path / "out", **how)
    adapterkit.quantize(model, tmp_path / "plain", to="nf4", blocksize=32)
    before = open_checkpoint(model)
    after, plain = (open_checkpoint(tmp_path / name) for name in ("out", "plain"))
    found, other = (quant.weights(c.tensors, c.config) for c in (after, plain))
    better = 0
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        packed, nearest, x = found[f"{name}.weight"], other[f"{name}.weight"], layer_inputs(model, text, name)
        assert isinstance(packed, quant.QuantizedWeight) and isinstance(nearest, quant.QuantizedWeight)
        W, columns = before.tensors[f"{name}.weight"].read().float(), packed.shape[1]
        Q, N = packed.open(columns)(0, len(W)).float(), nearest.open(columns)(0, len(W)).float()
        better += float(((Q - W) @ x.T).norm()) < 0.9 * float(((N - W) @ x.T).norm())
    assert better == 2


def test_every_input_is_counted_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v share their inputs: one sum serves all three, and each input is added once."""
    given: list[torch.Tensor] = []
    whole = calibration.shares_of
    monkeypatch.setattr(calibration, "shares_of", lambda H: given.append(H) or whole(H))
    text = tmp_path / "text.txt"
    plan = adapterkit.plan_quantize(model, tmp_path / "out", to="nf4", rounding="compensated", calibration=text)
    list(adapterkit.run(plan))
    assert len(given) == 2 * 4  # attention's inputs, those of o_proj, of gate and up, of down
    x = layer_inputs(model, text, "model.layers.0.self_attn.q_proj")
    assert sum(len(x.T) == H.shape[1] and torch.allclose(H[0], x.T @ x, rtol=1e-4, atol=1e-4) for H in given) == 1


def test_failures_of_calibration_are_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out, whole = tmp_path / "text.txt", tmp_path / "out", calibration._module

    def fails(error: type[Exception], match: str, base: Path = model, file: Path = text, **how: Any) -> None:
        with pytest.raises(error, match=match):
            adapterkit.quantize(base, out, **({"to": "nf4", "rounding": "compensated", "calibration": file} | how))
        assert not out.exists()

    fails(UsageError, "needs compensated rounding", rounding="nearest")
    fails(UsageError, "expected a calibration text file", file=tmp_path)
    (tmp_path / "empty.txt").write_text("")
    fails(UsageError, "the text has 0 tokens", file=tmp_path / "empty.txt")
    fails(FormatError, "transformers cannot load a tokenizer", base=FIXTURES / "bases" / "tiny-llama")
    with monkeypatch.context() as patch:
        patch.setattr(calibration._InputMoments, "hook", lambda self, name: lambda *_: None)
        fails(FitError, "no input on the calibration text")
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_module", lambda model, name: whole(model, f"other.{name}"))
        fails(FitError, "expected one layer of this name in the transformers model, found 0")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "write_tensors", full)
        fails(NoSpaceError, "the disk is full")

    monkeypatch.setitem(sys.modules, "transformers.utils.logging", None)
    fails(MissingPackageError, r"adapterkit\[train\]")


def test_the_option_of_the_command_line(model: Path, tmp_path: Path) -> None:
    args = ["quantize", model, "-o", tmp_path / "out", "--to", "nf4", "--rounding", "compensated"]
    assert run_adapterkit(*args, "--calibration", tmp_path / "none").code == 2
    done = run_adapterkit(*args, "--calibration", tmp_path / "text.txt")
    assert done.code == 0 and "quantized" in done.out and not done.err
