"""Adapters tell the base that they were made for from others of its shape, by a few rows of its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from handmade import adapterkit as run_adapterkit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapter.fingerprint import KEY
from adapterkit.inspection.report import AdapterReport

BASE = FIXTURES / "bases" / "tiny-llama"
Change = Callable[[dict[str, torch.Tensor]], object]


def like(out: Path, change: Change) -> Path:
    """A base of the same shape, with its tensors changed."""
    out.mkdir()
    (out / "config.json").write_bytes((BASE / "config.json").read_bytes())
    change(tensors := load_file(BASE / "model.safetensors"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def tuned(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor *= 1.02


def cast(dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that adapterkit made for the base."""
    adapterkit.extract(BASE, like(tmp_path / "tuned", tuned), tmp_path / "adapter", rank=4)
    return tmp_path / "adapter"


def rows(adapter: Path, base: Path) -> tuple[int, int] | None:
    """The numbers of rows compared and of those that differ."""
    report = adapterkit.inspect(adapter, against=base)
    assert isinstance(report, AdapterReport) and report.match is not None
    found = report.match.rows
    return None if found is None else (found.compared, len(found.differing))


def test_what_is_made_keeps_the_fingerprint_and_peft_loads_it(adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapterkit.resize(adapter, tmp_path / "resized", rank=2)
    adapterkit.convert(adapter, tmp_path / "dora", to="dora", base=BASE)
    adapterkit.convert(tmp_path / "dora", tmp_path / "back", to="lora", base=BASE, rank=4)
    adapterkit.combine([adapter, FIXTURES / "tiny-rslora"], tmp_path / "combined")
    adapterkit.convert(FIXTURES / "tiny-rslora", tmp_path / "late", to="dora", base=BASE)
    for name in ("adapter", "resized", "dora", "back", "combined", "late"):
        assert rows(tmp_path / name, BASE) == (8, 0), name
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            assert len(json.loads(file.metadata()[KEY])) == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
            PeftModel.from_pretrained(model, str(tmp_path / name))
    assert rows(FIXTURES / "tiny-rslora", BASE) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [(tuned, (8, 8)), (cast(torch.float32), (8, 0)), (cast(torch.float16), None),
     (lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].zero_(), (8, 1)),
     (lambda tensors: tensors["model.embed_tokens.weight"].zero_(), (8, 0))],
    ids=["fine-tuned", "fp32", "fp16", "one tensor", "embeddings"],
)  # fmt: skip
def test_bases_of_the_same_shape_are_told_apart(
    adapter: Path, tmp_path: Path, change: Change, expected: tuple[int, int] | None
) -> None:
    other = like(tmp_path / "other", change)
    assert rows(adapter, other) == expected
    done = run_adapterkit("inspect", adapter, "--against", other)
    differ = expected is not None and expected[1] > 0
    assert done.code == 0 and ("made for other weights" in done.out) is differ
    facts = json.loads(run_adapterkit("inspect", adapter, "--against", other, "--json").out)["against"]["rows"]
    assert facts == (None if expected is None else {"compared": expected[0], "differing": facts["differing"]})
    assert facts is None or len(facts["differing"]) == (expected or (0, 0))[1]
    notes = adapterkit.plan_merge(other, [adapter], tmp_path / "out").notes
    assert any("made for other weights than those of other" in note for note in notes) is differ


def test_a_quantized_base_is_compared_with_its_own_scheme_only(adapter: Path, tmp_path: Path) -> None:
    adapterkit.quantize(BASE, tmp_path / "nf4", to="nf4")
    adapterkit.convert(FIXTURES / "tiny-rslora", tmp_path / "on-nf4", to="dora", base=tmp_path / "nf4")
    assert rows(adapter, tmp_path / "nf4") is None and rows(tmp_path / "on-nf4", BASE) is None
    assert rows(tmp_path / "on-nf4", tmp_path / "nf4") == (8, 0)


def test_adapters_of_different_bases_are_named_when_combined(adapter: Path, tmp_path: Path) -> None:
    other = like(tmp_path / "other", tuned)
    adapterkit.convert(FIXTURES / "tiny-rslora", tmp_path / "dora", to="dora", base=other)
    adapterkit.convert(tmp_path / "dora", tmp_path / "lora", to="lora", base=other, rank=2)
    made = adapterkit.combine([adapter, tmp_path / "lora"], tmp_path / "out")
    assert any("bases with different weights" in note for note in made.notes)
    assert rows(tmp_path / "out", BASE) is None
    made = adapterkit.convert(adapter, tmp_path / "wrong", to="dora", base=other)
    assert any("made for other weights than those of other" in note for note in made.notes)


@pytest.mark.parametrize("text", ["", "7", "[1]", '{"a":["BF16"]}', '{"a":["BF16","<b>"]}', "{" * 9000, '{"a":null}'])
def test_a_broken_fingerprint_is_a_problem_that_merging_ignores(adapter: Path, text: str) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", KEY: text})
    opened = adapterkit.load(adapter)
    assert opened.base_fingerprint == {} and [problem.fatal for problem in opened.problems] == [False]
    assert KEY in opened.problems[0].where
