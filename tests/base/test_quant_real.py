"""SmolLM2 in NF4 by transformers and bitsandbytes: quantizing and merging it, compared with PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from test_quant import dequantized_4bit

import adapterkit
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

pytestmark = pytest.mark.base

ADAPTER = FIXTURES / "smollm2-wikisql"


@pytest.fixture(scope="module")
def nf4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized and saved by transformers, with nested scales."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
    )
    folder = tmp_path_factory.mktemp("real") / "nf4"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(nf4: Path) -> Path:
    out = nf4.parent / "merged"
    adapterkit.merge(nf4, [ADAPTER], out, receipt=False)
    return out


@pytest.mark.slow
def test_we_quantize_to_the_same_bytes(smollm2: Path, nf4: Path, tmp_path: Path) -> None:
    adapterkit.quantize(smollm2, tmp_path / "ours", to="nf4", nested=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", nf4))
    assert ours.keys() == theirs.keys()
    codes = other = 0
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        elif name.endswith(".absmax"):  # except where its CPU kernel misses the nearest code (see test_quant)
            codes, other = codes + tensor.numel(), other + int((ours[name] != tensor).sum())
        else:
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
    assert other < codes * 0.01
    assert open_checkpoint(tmp_path / "ours").config == open_checkpoint(nf4).config


def test_a_merge_equals_the_float64_sum_of_dequantized_weights(nf4: Path, merged: Path) -> None:
    checkpoint = open_checkpoint(nf4)
    stored = load_file(nf4 / "model.safetensors")
    dense = {}
    for name, weight in quant.weights(checkpoint.tensors, checkpoint.config).items():
        dense[name] = stored[name]
        if isinstance(weight, quant.QuantizedWeight):
            parts = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
            dense[name] = dequantized_4bit(
                stored[name], bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
            )
    out, wrong, total = load_file(merged / "model.safetensors"), 0, 0
    expected = oracle.merged(dense, ADAPTER)
    for name, before in dense.items():
        exact = oracle.rounded(expected[name].exact, torch.bfloat16) if name in expected else before
        wrong, total = wrong + int((out[name] != exact).sum()), total + exact.numel()
    assert wrong <= 5e-6 * total


def test_logits_equal_pefts_on_the_4bit_base(nf4: Path, merged: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nf4)
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).eval()
    base = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16, device_map="cpu").eval()
    prompts = ["The capital of France is", "table: 1-1\ncolumns: Name, Age\nQ: How old is Ann?\nA:"]
    with torch.no_grad():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        plain = [base(one).logits.float() for one in ids]
        trained = PeftModel.from_pretrained(base, ADAPTER).eval()
        for one, without in zip(ids, plain, strict=True):
            expected, got = trained(one).logits.float(), ours(one).logits.float()
            # bf16 activations differ too, but by much less than the adapter's effect.
            assert (expected - got).norm() < 0.35 * (expected - without).norm()
            assert torch.equal(expected[:, -1].argmax(-1), got[:, -1].argmax(-1))


@pytest.mark.slow
def test_requantizing_by_peft_loses_updates_that_we_retain(nf4: Path, merged: Path) -> None:
    """‖W'−W‖ along Δ of one layer: PEFT's own 4-bit merge, and ours into 16 bits."""
    name = "model.layers.20.mlp.up_proj"
    checkpoint = open_checkpoint(nf4)
    weight = quant.weights(checkpoint.tensors, checkpoint.config)[f"{name}.weight"]
    assert isinstance(weight, quant.QuantizedWeight)
    W = weight.open(weight.shape[1])(0, weight.shape[0]).double()
    adapter = adapterkit.load(ADAPTER)[name]
    delta = adapter.scaling * adapter.B.double() @ adapter.A.double()

    def retention(after: torch.Tensor) -> float:
        return float(((after.double() - W) * delta).sum() / delta.square().sum())

    base = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16, device_map="cpu")
    theirs = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().get_submodule(name).weight
    assert retention(bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)) < 0.1
    assert retention(load_file(merged / "model.safetensors")[f"{name}.weight"]) > 0.97


@pytest.mark.slow
def test_verify_recognizes_pefts_4bit_merge(nf4: Path, tmp_path: Path) -> None:
    """As PEFT's merge is saved; transformers 5 cannot write it itself."""
    base = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16, device_map="cpu")
    model = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(nf4 / "config.json", tmp_path)
    found = list(adapterkit.verify(tmp_path, nf4, [ADAPTER]))
    assert {verdict.kind for verdict in found if verdict.modified} == {"quantized"}
    assert all("nested retains" in verdict.explanation for verdict in found if verdict.modified)
    assert {verdict.kind for verdict in found if not verdict.modified} == {"exact"}
