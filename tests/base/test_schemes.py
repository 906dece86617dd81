"""A scheme is one module: a base in a test-only scheme works in every command."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import toy_scheme
from handmade import MODULES, adapterkit, contents, factors, write_adapter, write_base
from safetensors.torch import load_file

import adapterkit as package
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the scheme; modules that already made their choices from the table are reimported."""
    monkeypatch.setitem(quant.SCHEMES, "toy", toy_scheme.SCHEME)
    for name in ("cli.commands.merge", "cli.commands.quantize", "tui.actions"):
        monkeypatch.delitem(sys.modules, f"adapterkit.{name}", raising=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base")
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    return folder


@pytest.fixture
def stored(base: Path, tmp_path: Path) -> Path:
    assert adapterkit("quantize", base, "-o", tmp_path / "toy", "--to", "toy").code == 0
    return tmp_path / "toy"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dense(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Dequantize the weight by the scheme's definition, in float64."""
    code, low, step = (tensors[f"{module}.weight{part}"].double() for part in ("", ".toy_low", ".toy_step"))
    return low[:, None] + code * step[:, None]


def delta(module: str) -> torch.Tensor:
    A, B = (factors()[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return 6 / 4 * B @ A


def test_it_is_written_found_and_inspected(base: Path, stored: Path) -> None:
    before, after = tensors_of(base), tensors_of(stored)
    for module in MODULES:
        weight = before[f"{module}.weight"].double()
        step = after[f"{module}.weight.toy_step"][:, None]
        assert bool(((dense(after, module) - weight).abs() <= step * 0.5001).all())
    config = json.loads((stored / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "toy", "levels": 256}
    told = adapterkit("inspect", stored)
    assert told.code == 0 and "toy, affine by row" in told.out and "dequantized to BF16" in told.out
    checkpoint = open_checkpoint(stored)
    assert {w.kind for w in quant.weights(checkpoint.tensors, {}).values() if isinstance(w, quant.QuantizedWeight)} == {
        "toy"
    }


@pytest.mark.parametrize("quantize", [[], ["--quantize", "same"], ["--quantize", "toy"], ["--quantize", "nf4"]])
def test_it_is_merged_verified_and_undone(stored: Path, tmp_path: Path, quantize: list[str]) -> None:
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "merged"
    done = adapterkit("merge", stored, adapter, "-o", out, *quantize)
    assert done.code == 0, done.err
    before, after = tensors_of(stored), tensors_of(out)
    for module in MODULES:
        expected = dense(before, module).bfloat16().double() + delta(module)
        if not quantize:
            assert torch.equal(after[f"{module}.weight"], expected.bfloat16())
        elif quantize[1] != "nf4":
            step = after[f"{module}.weight.toy_step"][:, None]
            assert bool(((dense(after, module) - expected).abs() <= step * 0.5001).all())
    kind = {"": None, "same": "toy", "toy": "toy", "nf4": "bitsandbytes"}[quantize[1] if quantize else ""]
    declared = json.loads((out / "config.json").read_text()).get("quantization_config", {"quant_method": None})
    assert declared["quant_method"] == kind
    assert adapterkit("verify", out, "--base", stored, "--adapter", adapter).code == (0 if not quantize else 3)
    if not quantize:
        assert adapterkit("unmerge", out, "-o", tmp_path / "back", "--adapter", adapter).code == 0
        was, now = contents(stored), contents(tmp_path / "back")
        assert {name: now[name] for name in was if "safetensors" in name} == {
            name: data for name, data in was.items() if "safetensors" in name
        }


def test_help_errors_and_the_app_list_it(base: Path, stored: Path, tmp_path: Path) -> None:
    assert "toy" in adapterkit("quantize", "--help").out and "toy" in adapterkit("merge", "--help").out
    actions = importlib.import_module("adapterkit.tui.actions")
    [field] = [field for field in actions.ACTIONS["merge"].fields if field.name == "--quantize"]
    assert "toy" in field.choices
    with pytest.raises(package.errors.UsageError, match=r"to 'int3': expected one of nf4, fp4, int8, toy"):
        package.plan_quantize(base, tmp_path / "out", to="int3")
    with pytest.raises(
        package.errors.UsageError, match=r"toy has a low and a step a row; block size and nesting apply to"
    ):
        package.plan_quantize(base, tmp_path / "out", to="toy", nested=True)
    assert "already quantized (toy, affine by row)" in adapterkit("quantize", stored, "--to", "nf4").err
    assert "the toy's 8 bits" in quant.supported_schemes()
