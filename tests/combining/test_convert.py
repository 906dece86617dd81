"""Converting and extracting adapters, against dense float64 implementations of the papers, and by merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from safetensors.torch import load_file
from test_combine import best, delta, relative

import adapterkit
from adapterkit.algebra import sketch
from adapterkit.algebra.sketch import Matrix
from adapterkit.algebra.truncation import Limit
from adapterkit.combining.plan import AdapterMade
from adapterkit.errors import FitError, UsageError

MakeAdapter = Callable[..., Path]
BASES = {"tiny-conv": "tiny-conv", "tiny-conv1d": "tiny-gpt2", "tiny-conv-dora": "tiny-conv"}


def base_in_card(name: str) -> Path:
    return FIXTURES / "bases" / BASES.get(name, "tiny-llama")


def merged(base: Path, adapter: Path, out: Path, **how: Any) -> dict[str, torch.Tensor]:
    adapterkit.merge(base, [adapter], out, **how)
    return load_file(out / "model.safetensors")


# --- to DoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-rslora", "tiny-patterns", "tiny-conv", "tiny-conv1d"])
def test_lora_and_converted_dora_merge_to_equal_weights(name: str, tmp_path: Path) -> None:
    base = base_in_card(name)
    adapterkit.convert(FIXTURES / name, tmp_path / "dora", to="dora", base=base)
    as_lora, as_dora = (
        merged(base, adapter, tmp_path / out) for adapter, out in ((FIXTURES / name, "m1"), (tmp_path / "dora", "m2"))
    )
    for key, value in as_lora.items():
        ulp = value.double().abs() * torch.finfo(value.dtype).eps
        assert bool(((as_dora[key].double() - value.double()).abs() <= ulp + 1e-12).all()), key
    short = {key: value for key, value in as_lora.items() if value.element_size() == 2}
    total = sum(value.numel() for value in short.values())
    assert sum(int((as_dora[key] != value).sum()) for key, value in short.items()) <= 1e-3 * total


def test_magnitude_is_the_norm_per_output(tmp_path: Path) -> None:
    base, name = base_in_card("tiny-patterns"), "model.layers.0.self_attn.q_proj"
    adapterkit.convert(FIXTURES / "tiny-patterns", tmp_path / "dora", to="dora", base=base)
    got = adapterkit.load(tmp_path / "dora")
    assert got.config["use_dora"] and got.modules.keys() == adapterkit.load(FIXTURES / "tiny-patterns").modules.keys()
    for name, weights in got.modules.items():
        W = load_file(base / "model.safetensors")[f"{name}.weight"].double()
        assert weights.magnitude is not None
        expected = (W + delta(FIXTURES / "tiny-patterns", name)).norm(dim=1)
        assert torch.equal(weights.magnitude.read(), expected.float())
        original = adapterkit.load(FIXTURES / "tiny-patterns").modules[name]
        assert torch.equal(weights.A.read(), original.A.read()) and torch.equal(weights.B.read(), original.B.read())
        assert weights.scaling == pytest.approx(original.scaling)


def test_peft_computes_equal_logits_with_both(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_in_card("tiny-patterns")
    adapterkit.convert(FIXTURES / "tiny-patterns", tmp_path / "dora", to="dora", base=base)
    ids = torch.arange(12)[None]
    logits = []
    for adapter in (FIXTURES / "tiny-patterns", tmp_path / "dora"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(model, adapter).eval()(ids).logits)
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_quantized_base_gives_the_norms_of_dequantized_weights(
    make_base: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_base({"layers.0.q.weight": torch.randn(24, 64).bfloat16()})
    adapter = make_adapter(factors("layers.0.q", 24, 64))
    adapterkit.quantize(base, tmp_path / "nf4", to="nf4", nested=True)
    adapterkit.merge(
        tmp_path / "nf4", [make_adapter(factors("layers.0.q", 24, 64, size=0.0), "none")], tmp_path / "dense"
    )
    adapterkit.convert(adapter, tmp_path / "dora", to="dora", base=tmp_path / "nf4")
    W = load_file(tmp_path / "dense" / "model.safetensors")["layers.0.q.weight"].double()
    magnitude = adapterkit.load(tmp_path / "dora")["layers.0.q"].magnitude
    assert magnitude is not None and torch.equal(magnitude, (W + delta(adapter, "layers.0.q")).norm(dim=1).float())


def test_chunk_size_does_not_change_the_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny-conv1d", "tiny-patterns"):
        adapterkit.convert(FIXTURES / name, tmp_path / f"{name}-a", to="dora", base=base_in_card(name))
        with monkeypatch.context() as patch:
            patch.setattr(sketch, "CHUNK_ELEMENTS", 200)
            adapterkit.convert(FIXTURES / name, tmp_path / f"{name}-b", to="dora", base=base_in_card(name))
        a, b = (load_file(tmp_path / f"{name}-{which}" / "adapter_model.safetensors") for which in "ab")
        assert all(torch.allclose(a[key], b[key], rtol=1e-7) for key in a)


# --- to LoRA ---------------------------------------------------------------------------------------------------------


def effective(base: Path, adapter: Path, name: str) -> torch.Tensor:
    """The dense `diag(m / ‖V‖)·V − W`."""
    weights = adapterkit.load(adapter)[name]
    W = load_file(base / "model.safetensors")[f"{name}.weight"].double()
    assert weights.magnitude is not None
    if weights.fan_in_fan_out:
        W = W.T
    V = W.flatten(1) + weights.scaling * weights.B.double().flatten(1) @ weights.A.double().flatten(1)
    return weights.magnitude.double()[:, None] / V.norm(dim=1, keepdim=True) * V - W.flatten(1)


@pytest.mark.parametrize("name", ["tiny-dora", "tiny-conv-dora"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_dora_to_lora_is_within_a_percent_of_the_optimum(name: str, rank: int, tmp_path: Path) -> None:
    result = adapterkit.convert(FIXTURES / name, tmp_path / "lora", to="lora", base=base_in_card(name), rank=rank)
    got = adapterkit.load(tmp_path / "lora")
    for row in result.modules:
        whole = effective(base_in_card(name), FIXTURES / name, row.name)
        weights = got[row.name]
        made = weights.scaling * weights.B.double().flatten(1) @ weights.A.double().flatten(1)
        optimum = float((best(whole, rank) - whole).norm() / whole.norm())
        assert weights.rank == min(rank, *whole.shape) and weights.magnitude is None
        assert relative(made, whole) <= 1.01 * optimum + 1e-6
        assert row.error == pytest.approx(relative(made, whole), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["tiny-dora", "tiny-conv-dora"])
def test_dora_to_lora_at_full_rank_is_exact(name: str, tmp_path: Path) -> None:
    base = base_in_card(name)
    result = adapterkit.convert(FIXTURES / name, tmp_path / "lora", to="lora", base=base, energy=1.0)
    assert result.error < 1e-6
    lora, dora = (
        merged(base, adapter, tmp_path / out, dtype="fp32")
        for adapter, out in ((tmp_path / "lora", "m1"), (FIXTURES / name, "m2"))
    )
    assert all(torch.allclose(lora[key], dora[key], rtol=1e-5, atol=1e-6) for key in lora)


def test_lora_to_dora_and_back_is_lossless(tmp_path: Path) -> None:
    base, adapter = base_in_card("tiny-rslora"), FIXTURES / "tiny-rslora"
    adapterkit.convert(adapter, tmp_path / "dora", to="dora", base=base)
    rank = max(weights.rank for weights in adapterkit.load(adapter).modules.values())
    plan = adapterkit.plan_convert(tmp_path / "dora", tmp_path / "lora", to="lora", base=base, rank=rank)
    *events, result = adapterkit.run(plan)
    assert isinstance(result, AdapterMade) and result.error < 1e-4 and result.modules == tuple(events)
    assert [(row.done, row.total) for row in result.modules] == [(done, 6) for done in range(1, 7)]
    for name in adapterkit.load(adapter).modules:
        assert relative(delta(tmp_path / "lora", name), delta(adapter, name)) < 1e-4


def test_transposed_weights_convert_to_dora_and_back(tmp_path: Path) -> None:
    base, adapter = base_in_card("tiny-conv1d"), FIXTURES / "tiny-conv1d"
    adapterkit.convert(adapter, tmp_path / "dora", to="dora", base=base)
    rank = max(weights.rank for weights in adapterkit.load(adapter).modules.values())
    adapterkit.convert(tmp_path / "dora", tmp_path / "lora", to="lora", base=base, rank=rank)
    for name in adapterkit.load(adapter).modules:
        assert relative(delta(tmp_path / "lora", name), delta(adapter, name)) < 1e-4
    assert all(weights.fan_in_fan_out for weights in adapterkit.load(tmp_path / "lora").modules.values())


# --- scalings and initial adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to"), [("tiny-rslora", "lora"), ("tiny-patterns", "rslora"), ("tiny-dora", "rslora")]
)
def test_converting_the_scaling_preserves_the_factors(name: str, to: str, tmp_path: Path) -> None:
    adapterkit.convert(FIXTURES / name, tmp_path / "out", to=to)
    before, after = adapterkit.load(FIXTURES / name), adapterkit.load(tmp_path / "out")
    assert after.config["use_rslora"] is (to == "rslora")
    for module, weights in before.modules.items():
        new = after.modules[module]
        assert torch.equal(new.A.read(), weights.A.read()) and torch.equal(new.B.read(), weights.B.read())
        assert new.scaling == pytest.approx(weights.scaling, rel=1e-12)
        assert (new.magnitude is None) is (weights.magnitude is None)


def test_initial_adapter_is_subtracted(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    trained, initial = (make_adapter(factors("q", 24, 40), name) for name in ("trained", "initial"))
    adapterkit.convert(trained, tmp_path / "lora", to="lora", initial=initial)
    assert relative(delta(tmp_path / "lora", "q"), delta(trained, "q") - delta(initial, "q")) < 1e-6
    adapterkit.convert(trained, tmp_path / "small", to="lora", initial=initial, rank=3)
    expected = best(delta(trained, "q") - delta(initial, "q"), 3)
    assert relative(delta(tmp_path / "small", "q"), expected) < 1e-6


def test_invalid_conversions_fail(make_adapter: MakeAdapter, make_base: Callable[..., Path], tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, adapter: Any = FIXTURES / "tiny-patterns", **how: Any) -> None:
        with pytest.raises(error, match=match):
            adapterkit.convert(adapter, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()

    base, dora = base_in_card("tiny-dora"), FIXTURES / "tiny-dora"
    fails(UsageError, "expected one of dora, lora, rslora", to="loha")
    fails(UsageError, "to DoRA needs the base model; give `base`", to="dora")
    fails(UsageError, "from DoRA needs the base model", adapter=dora, to="lora", rank=3)
    fails(UsageError, "converting to lora needs no base model; omit `base`", to="lora", base=base)
    fails(UsageError, "the update of DoRA has full rank; give `rank` or `energy`", adapter=dora, to="lora", base=base)
    fails(UsageError, "converting to dora is exact", to="dora", base=base, rank=3)
    fails(UsageError, "only converting from DoRA or saved modules takes a `seed`", to="rslora", seed=3)
    fails(UsageError, "weight 0.5: converting takes no weight", adapter=(dora, 0.5), to="rslora")
    fails(UsageError, "weight 2: converting takes no weight", to="lora", initial=(FIXTURES / "tiny-patterns", 2.0))
    fails(UsageError, "`initial` converts to LoRA", to="dora", base=base, initial=FIXTURES / "tiny-patterns")
    fails(FitError, "is already DoRA", adapter=dora, to="dora", base=base)
    elsewhere = make_adapter(factors("nowhere", 24, 40))
    fails(FitError, "nowhere", adapter=elsewhere, to="dora", base=base)
    base = make_base({"q.weight": torch.randn(24, 40)})
    whole = factors("q", 24, 40) | {"q.base_layer.weight": torch.randn(24, 40)}
    both = make_adapter(whole, "both", modules_to_save=["q"])
    fails(FitError, "q: the adapter also replaces the weight that it adapts", adapter=both, to="dora", base=base)


# --- extract ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(make_base: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base in two shards, and a model that differs by a rounded rank-3 update and in a norm."""
    names = ("layers.0.q", "layers.1.q", "layers.1.k")
    tensors = {f"{name}.weight": torch.randn(56, 90).bfloat16() for name in names}
    tensors |= {"norm.weight": torch.ones(90).bfloat16(), "embed_tokens.weight": torch.randn(30, 90).bfloat16()}
    base = make_base(tensors, shards=2)
    after = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in names[:2]:
        after[f"{name}.weight"] += (torch.randn(56, 3) @ torch.randn(3, 90)).bfloat16()
    after["norm.weight"] *= 2
    base.rename(tmp_path / "before")
    make_base(after).rename(tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_extraction_is_within_a_percent_of_the_optimum(tuned: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    result = adapterkit.extract(*tuned, tmp_path / "out", rank=rank)
    before, after = map(tensors_of, tuned)
    assert [row.name for row in result.modules] == ["layers.0.q", "layers.1.q"]  # k is unchanged
    for row in result.modules:
        whole = after[f"{row.name}.weight"].double() - before[f"{row.name}.weight"].double()
        got = delta(tmp_path / "out", row.name)
        assert relative(got, whole) <= 1.01 * relative(best(whole, rank), whole)
        assert row.error == pytest.approx(relative(got, whole), rel=1e-4)
    assert any("left out 1 changed tensor outside linear layers (first: norm.weight)" in note for note in result.notes)


def test_merged_adapter_is_extracted_up_to_rounding(tmp_path: Path) -> None:
    base, adapter = base_in_card("tiny-rslora"), FIXTURES / "tiny-rslora"
    adapterkit.merge(base, [adapter], tmp_path / "merged", dtype="fp32")
    adapterkit.merge(base, [(adapter, 0.0)], tmp_path / "base", dtype="fp32")
    rank = max(weights.rank for weights in adapterkit.load(adapter).modules.values())
    adapterkit.extract(tmp_path / "base", tmp_path / "merged", tmp_path / "out", rank=rank)
    for name in adapterkit.load(adapter).modules:
        assert relative(delta(tmp_path / "out", name), delta(adapter, name)) < 1e-4


def test_other_tensors_are_stored_whole(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    result = adapterkit.extract(*tuned, tmp_path / "out", energy=1.0, whole=True)
    assert not result.notes and json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    adapterkit.merge(tuned[0], [tmp_path / "out"], tmp_path / "again")
    again, after = tensors_of(tmp_path / "again"), tensors_of(tuned[1])
    for name, value in after.items():
        assert bool(((again[name].double() - value.double()).abs() <= value.double().abs() * 2**-8 + 1e-6).all()), name


def test_chunk_size_and_cache_do_not_change_an_extraction(
    tuned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapterkit.extract(*tuned, tmp_path / "a", rank=2)
    monkeypatch.setattr(sketch, "CHUNK_ELEMENTS", 700)
    monkeypatch.setattr(sketch, "CACHED_ELEMENTS", 0)
    adapterkit.extract(*tuned, tmp_path / "b", rank=2)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-5) for key in a)


def test_invalid_extractions_fail(tuned: tuple[Path, Path], make_base: Callable[..., Path], tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, base: Path, after: Path, **how: Any) -> None:
        with pytest.raises(error, match=match):
            adapterkit.extract(base, after, tmp_path / "out", **({"rank": 2} | how))
        assert not (tmp_path / "out").exists()

    fails(UsageError, "no rank given", *tuned, rank=None)
    fails(UsageError, "rank 0", *tuned, rank=0)
    fails(FitError, "nothing to extract", tuned[0], tuned[0])
    tensors = tensors_of(tuned[0])
    other = make_base({**tensors, "layers.0.q.weight": torch.randn(56, 91).bfloat16()})
    fails(FitError, r"layers.0.q.weight: is \(56, 90\)", tuned[0], other)
    del tensors["norm.weight"]
    other.rename(tmp_path / "other")
    fails(FitError, "has no norm.weight", tuned[0], make_base(tensors))


# --- sketches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.95, 0.999])
def test_sketch_is_near_optimal_for_every_spectrum(decay: float) -> None:
    U, V = torch.linalg.qr(torch.randn(120, 90).double()).Q, torch.linalg.qr(torch.randn(90, 90).double()).Q
    sigma = decay ** torch.arange(90).double()
    whole = U * sigma @ V.T
    found = sketch.sketch(Matrix((120, 90), lambda first, last: whole[first:last]), Limit(rank=12))
    error = float((found.leading.first(12).left @ found.leading.first(12).right - whole).norm())
    assert error <= 1.01 * float(sigma[12:].norm())
    assert found.energy == pytest.approx(float(sigma.square().sum()))


def test_extract_and_convert_commands(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_adapterkit("extract", *tuned, "-o", tmp_path / "out", "--rank", "3")
    assert done.code == 0 and "extracted" in done.out and "norm.weight" in done.err
    done = run_adapterkit("convert", tmp_path / "out", "-o", tmp_path / "dora", "--to", "dora", "--base", tuned[0])
    assert done.code == 0 and "converted to dora" in done.out
    done = run_adapterkit(
        "convert",
        tmp_path / "dora",
        "-o",
        tmp_path / "lora",
        "--to",
        "lora",
        "--base",
        tuned[0],
        "--rank",
        "3",
        "--json",
    )
    assert done.code == 0 and json.loads(done.out)["modules"][0]["rank"] == 3
    assert run_adapterkit("convert", tmp_path / "dora", "-o", tmp_path / "x", "--to", "lora").code == 2
