"""Merges onto the base as quantized for training: the bits of two commands, in one pass that can be undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run
from handmade import contents
from test_merge import weights

import adapterkit
from adapterkit.base.quant import training_kinds
from adapterkit.errors import FitError, UsageError
from adapterkit.merging.blocks import as_trained
from adapterkit.merging.run import pieces

Make = Callable[..., Path]
LLAMA = FIXTURES / "bases" / "tiny-llama"


def test_kinds_are_those_that_can_be_written() -> None:
    assert training_kinds() == ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")


@pytest.fixture(params=["BF16", "F16", "F32"])
def odd(request: pytest.FixtureRequest, make_base: Make, make_adapter: Make) -> tuple[Path, list[Any]]:
    """A base whose rows don't end with blocks, with a layer that no adapter changes, and LoRA and DoRA adapters."""
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[request.param]
    shapes = {"layers.0.q": (70, 48), "layers.0.v": (33, 37), "layers.1.q": (70, 48), "layers.1.v": (5, 200)}
    tensors = {f"{name}.weight": (torch.randn(*shape) * 0.05).to(dtype) for name, shape in shapes.items()}
    tensors["layers.0.q.weight"][3] = 0
    tensors |= {
        "model.embed_tokens.weight": torch.randn(9, 48).to(dtype),
        "lm_head.weight": torch.randn(9, 48).to(dtype),
    }
    config = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
    base = make_base(tensors, config, shards=2)
    lora = make_adapter(factors("layers.0.q", 70, 48) | factors("layers.1.v", 5, 200), "lora")
    dora = make_adapter(
        factors("layers.0.q", 70, 48) | {"layers.0.q.lora_magnitude_vector": torch.rand(70) + 0.5}
        | factors("layers.0.v", 33, 37) | {"layers.0.v.lora_magnitude_vector": torch.rand(33) + 0.5},
        "dora", use_dora=True,
    )  # fmt: skip
    return base, [lora, (dora, 0.5)]


@pytest.mark.parametrize("kind", training_kinds())
def test_the_bits_are_those_of_two_commands_and_the_base_comes_back(
    kind: str, odd: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of few rows, in any order, on two threads."""
    base, adapters = odd
    adapterkit.quantize(base, tmp_path / "quantized", to=kind.removesuffix("-dq"), nested=kind.endswith("-dq"))
    adapterkit.merge(tmp_path / "quantized", adapters, tmp_path / "two")
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(as_trained, "CHUNK", 1 << 10)
    made = adapterkit.merge(base, adapters, tmp_path / "one", as_trained=kind, threads=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() == weights(base).keys() and made.tensors == 4
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    assert torch.equal(one["lm_head.weight"], weights(base)["lm_head.weight"])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    adapterkit.unmerge(tmp_path / "one", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)

    found = list(adapterkit.verify(tmp_path / "one", base, adapters, as_trained=kind))
    assert {verdict.kind for verdict in found} == {"exact"} and len(found) == 6
    assert {v.name for v in found if v.modified} == {f"layers.{n}.weight" for n in ("0.q", "0.v", "1.v")}
    assert all(v.fits for v in adapterkit.verify(tmp_path / "one", base, adapters, as_trained=kind, sample=0.3))
    other = {"int8": "nf4"}.get(kind, "int8")
    assert not any(
        v.fits for v in adapterkit.verify(tmp_path / "one", base, adapters, as_trained=other) if "layers" in v.name
    )


@pytest.mark.parametrize(("kind", "output"), [("nf4", "same"), ("nf4-dq", "nf4"), ("fp4", "int8"), ("int8", "same")])
def test_a_quantized_output_is_that_of_two_commands(kind: str, output: str, make_base: Make, tmp_path: Path) -> None:
    """Layers that no adapter changes are quantized once."""
    adapter = FIXTURES / "tiny-rslora"
    adapterkit.quantize(LLAMA, tmp_path / "quantized", to=kind.removesuffix("-dq"), nested=kind.endswith("-dq"))
    adapterkit.merge(tmp_path / "quantized", adapter, tmp_path / "two", quantize=output, accept_loss=True)
    adapterkit.merge(LLAMA, adapter, tmp_path / "one", as_trained=kind, quantize=output, accept_loss=True)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        assert torch.equal(one[name], tensor), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]


def test_the_plan_and_the_records_tell(tmp_path: Path) -> None:
    given = ["merge", LLAMA, FIXTURES / "tiny-rslora", "-o", tmp_path / "out", "--as-trained", "nf4-dq"]
    planned = run(*given, "--dry-run")
    scheme = "bitsandbytes NF4, blocks of 64, nested"
    assert planned.out.startswith(f"base      tiny-llama: 21 tensors in 1 file, as quantized to {scheme}\n")
    assert f"note: all linear layers are first quantized to {scheme} and dequantized, as in training\n" in planned.err
    assert "changes   14 of 21 tensors" in planned.out
    assert json.loads(run(*given, "--dry-run", "--json").out)["as_trained"] == [scheme]
    assert run(*given).code == 0
    assert json.loads((tmp_path / "out" / "adapterkit_merge.json").read_text())["as_trained"] == [scheme]
    receipt = json.loads((tmp_path / "out" / "adapterkit_receipt.json").read_text())
    assert receipt["method"].startswith(f"W' = dequantize(quantize(W, {scheme})) + ")
    subtracted = run("unmerge", tmp_path / "out", "-o", tmp_path / "near", "--approximate").message(3)
    assert f"merged onto a base quantized to {scheme}, which subtraction cannot undo; omit --approximate" in subtracted
    checked = ["verify", tmp_path / "out", "--base", LLAMA, "--adapter", FIXTURES / "tiny-rslora"]
    assert run(*checked).code == 3 and run(*checked, "--as-trained", "nf4-dq").code == 0


def test_a_single_file_in_shares_of_a_plan(tmp_path: Path) -> None:
    """By `run_file`, and back to the same file."""
    file, adapter = tmp_path / "base.safetensors", FIXTURES / "tiny-rslora"
    file.write_bytes((LLAMA / "model.safetensors").read_bytes())
    out, where = tmp_path / "out.safetensors", tmp_path / "made" / "out.safetensors"
    where.parent.mkdir()
    plan = adapterkit.plan_merge(file, adapter, out, as_trained="fp4-dq")
    [part] = plan.files
    adapterkit.run_file(plan, part, where)
    adapterkit.merge(file, adapter, out, as_trained="fp4-dq")
    assert where.read_bytes() == out.read_bytes()
    adapterkit.unmerge(out, tmp_path / "again.safetensors", adapters=adapter)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_what_cannot_be_quantized_for_training_is_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    adapter = FIXTURES / "tiny-rslora"
    adapterkit.quantize(LLAMA, tmp_path / "quantized", to="nf4")
    before = contents(tmp_path)
    with pytest.raises(FitError, match="already quantized .*; omit `as_trained`"):
        adapterkit.merge(tmp_path / "quantized", adapter, tmp_path / "out", as_trained="nf4")
    with pytest.raises(UsageError, match="exclude each other"):
        adapterkit.merge(tmp_path / "quantized", adapter, tmp_path / "out", as_trained="nf4", original=LLAMA)
    with pytest.raises(UsageError, match=r"as trained 'nf5': expected one of nf4, nf4-dq, fp4, fp4-dq, int8"):
        adapterkit.merge(LLAMA, adapter, tmp_path / "out", as_trained="nf5")
    with pytest.raises(FitError, match="Conv1D"):
        adapterkit.merge(FIXTURES / "bases" / "tiny-gpt2", FIXTURES / "tiny-conv1d", tmp_path / "out", as_trained="nf4")
    assert contents(tmp_path) == before
    W = torch.randn(8, 64)
    W[2, 3] = torch.inf
    base = make_base({"q.weight": W.bfloat16()}, {"model_type": "llama"})
    broken = make_adapter(factors("q", 8, 64))
    for kind in ("nf4", "nf4-dq"):
        with pytest.raises(FitError, match=r"q\.weight: contains NaN or Inf, which cannot be quantized"):
            adapterkit.merge(base, broken, tmp_path / "out", as_trained=kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_transformers_computes_pefts_logits_on_what_bitsandbytes_dequantizes(kind: str, tmp_path: Path) -> None:
    """In float32: PEFT's adapter over the weights that bitsandbytes itself quantized and dequantized."""
    functional = pytest.importorskip("bitsandbytes").functional
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, ids = FIXTURES / "tiny-dora", torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            if kind == "int8":
                codes, scales, _ = functional.int8_vectorwise_quant(layer.weight.data.half())
                layer.weight.data = codes * scales[:, None] * (1 / 127)
            else:
                packed, state = functional.quantize_4bit(
                    layer.weight.data, blocksize=64, quant_type=kind[:3], compress_statistics=kind.endswith("-dq")
                )
                absmax = (
                    functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                    if state.nested
                    else state.absmax
                )
                codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().int()
                values = state.code[codes].view(-1, 64) * absmax[:, None]
                layer.weight.data = values.view_as(layer.weight)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, adapter)(input_ids=ids).logits
        adapterkit.merge(tmp_path / "base", adapter, tmp_path / "out", as_trained=kind)
        found, plain = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits
            for path in (tmp_path / "out", LLAMA)
        )
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() >= 1e-3 * expected.abs().max()
