"""Combining adapters, against dense float64 implementations written from the papers, and against PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from handmade import contents, write_adapter, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_method import powered

import adapterkit
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra import sketch
from adapterkit.algebra.lowrank import Product
from adapterkit.algebra.truncation import Limit
from adapterkit.combining.combine import plan_combination
from adapterkit.combining.elementwise import drop
from adapterkit.combining.method import Part
from adapterkit.combining.methods import METHODS
from adapterkit.combining.plan import AdapterMade
from adapterkit.errors import FitError, UsageError
from adapterkit.tui.actions import ACTIONS

MakeAdapter = Callable[..., Path]


def delta(adapter: Path | Adapter, module: str) -> torch.Tensor:
    """The dense Δ of a linear module, float64."""
    opened = adapterkit.load(adapter) if isinstance(adapter, Path) else adapter
    weights = opened[module]
    return weights.scaling * weights.B.double() @ weights.A.double()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.fixture
def two(make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """Adapters that differ in rank, scaling and targets: q in both, k and v in one each."""
    one = make_adapter(factors("q", 24, 40, rank=4) | factors("k", 16, 40, rank=4), "one", r=4, lora_alpha=6)
    other = make_adapter(
        factors("q", 24, 40, rank=7, size=0.3) | factors("v", 16, 40, rank=7), "other", r=7, lora_alpha=3,
        use_rslora=True,
    )  # fmt: skip
    return one, other


# --- exact sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_weighted_sum_without_truncation_is_exact(two: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    one, other = two
    more = {"rank": 11} if method == "svd" else {}
    result = adapterkit.combine([(one, 0.7), (other, -1.3)], tmp_path / "out", method=method, **more)
    got = adapterkit.load(tmp_path / "out")
    assert relative(delta(got, "q"), 0.7 * delta(one, "q") - 1.3 * delta(other, "q")) < 1e-6
    assert relative(delta(got, "k"), 0.7 * delta(one, "k")) < 1e-6
    assert relative(delta(got, "v"), -1.3 * delta(other, "v")) < 1e-6
    assert result.error == 0 and {row.name: row.rank for row in result.modules} == {"q": 11, "k": 4, "v": 7}
    [note] = [note for note in result.notes if "2 of 3 modules are missing from some adapters" in note]
    told = run_adapterkit("combine", one, other, "-o", tmp_path / "told", "--method", method)
    assert told.err.splitlines().count(f"note: {note}") == 1
    assert {name: weights.scaling for name, weights in got.modules.items()} == {"q": 1.0, "k": 1.0, "v": 1.0}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_is_optimal_and_reports_its_error(two: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    one, other = two
    result = adapterkit.combine([(one, 0.7), (other, 0.3)], tmp_path / "out", rank=rank)
    whole = {
        "q": 0.7 * delta(one, "q") + 0.3 * delta(other, "q"),
        "k": 0.7 * delta(one, "k"),
        "v": 0.3 * delta(other, "v"),
    }
    lost = 0.0
    for row in result.modules:
        got = delta(tmp_path / "out", row.name)
        assert relative(got, best(whole[row.name], rank)) < 1e-6
        error = relative(got, whole[row.name])
        assert row.error == pytest.approx(error, abs=1e-6) and math.sqrt(row.energy) == pytest.approx(
            float(whole[row.name].norm()), rel=1e-6
        )
        lost += float((got - whole[row.name]).square().sum())
    assert result.error == pytest.approx(
        math.sqrt(lost / sum(float(d.square().sum()) for d in whole.values())), abs=1e-6
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_limit_gives_the_lowest_sufficient_rank(two: tuple[Path, Path], tmp_path: Path, energy: float) -> None:
    result = adapterkit.combine([(two[0], 1.0), (two[1], 1.0)], tmp_path / "out", energy=energy)
    for row in result.modules:
        whole = sum(delta(a, row.name) for a in two if row.name in adapterkit.load(a).modules)
        assert isinstance(whole, torch.Tensor)
        squares = torch.linalg.svdvals(whole).square()
        retained = squares.cumsum(0) / squares.sum()
        least = int((retained < energy - 1e-12).sum()) + 1
        assert row.rank == (least if energy < 1 else int((squares > 1e-12 * squares[0]).sum()))


def test_single_adapter_is_truncated(two: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.combine([two[1]], tmp_path / "out", rank=2)
    assert relative(delta(tmp_path / "out", "q"), best(delta(two[1], "q"), 2)) < 1e-6


def test_adapter_minus_itself_is_zero(two: tuple[Path, Path], tmp_path: Path) -> None:
    result = adapterkit.combine([(two[0], 1.0), (two[0], -1.0)], tmp_path / "out", method="svd")
    assert float(delta(tmp_path / "out", "q").norm()) < 1e-12 * float(delta(two[0], "q").norm())
    assert all(row.energy < 1e-25 for row in result.modules)


@pytest.mark.parametrize("name", ["tiny-conv", "tiny-conv1d", "tiny-embed-save", "tiny-rslora", "tiny-patterns"])
def test_merging_a_sum_equals_merging_its_terms(name: str, tmp_path: Path) -> None:
    """Every kind of layer: conv, Conv1D, embeddings, patterns."""
    base = {"tiny-conv": "tiny-conv", "tiny-conv1d": "tiny-gpt2"}.get(name, "tiny-llama")
    adapter, folder = FIXTURES / name, FIXTURES / "bases" / base
    adapterkit.combine([(adapter, 0.6), (adapter, 0.4)], tmp_path / "sum", method="svd", saved="average")
    adapterkit.merge(folder, [tmp_path / "sum"], tmp_path / "one", dtype="fp32")
    adapterkit.merge(folder, [adapter], tmp_path / "two", dtype="fp32")
    for key, expected in load_file(tmp_path / "two" / "model.safetensors").items():
        got = load_file(tmp_path / "one" / "model.safetensors")[key]
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), key


def test_stacked_experts_are_combined_separately(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    def experts(rank: int) -> dict[str, torch.Tensor]:
        return {
            "mlp.experts.lora_A.weight": torch.randn(3 * rank, 20),
            "mlp.experts.lora_B.weight": torch.randn(12, rank * 3),
        }

    how = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "lora_alpha": 5}
    one, other = make_adapter(experts(2), "one", r=2, **how), make_adapter(experts(3), "other", r=3, **how)
    adapterkit.combine([(one, 0.5), (other, 2.0)], tmp_path / "out")
    [got, a, b] = [adapterkit.load(path)["mlp.experts.down_proj"] for path in (tmp_path / "out", one, other)]
    assert got.experts == 3 and got.rank == 5
    for expert in range(3):
        dense = [
            w.scaling * w.B.double().view(12, -1, 3)[:, :, expert] @ w.A.double().view(3, -1, 20)[expert]
            for w in (got, a, b)
        ]
        assert relative(dense[0], 0.5 * dense[1] + 2.0 * dense[2]) < 1e-6


@pytest.mark.parametrize("told_by", ["shape", "another parameter", "versions", "nothing"])
def test_stacked_experts_of_different_versions_of_peft(told_by: str, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """PEFT 0.18 stores Δ of experts transposed; which versions differ depends on the model, unless shapes tell."""

    def experts(out: int, inner: int, module: str) -> dict[str, torch.Tensor]:
        return {
            f"{module}.lora_A.weight": torch.randn(3 * 2, inner),
            f"{module}.lora_B.weight": torch.randn(out, 2 * 3),
        }

    def delta(adapter: Path, name: str) -> torch.Tensor:
        w = adapterkit.load(adapter)[name]
        A, B = w.A.double().view(3, w.rank, -1), w.B.double().view(len(w.B), w.rank, 3)
        return w.scaling * torch.stack([B[:, :, expert] @ A[expert] for expert in range(3)])

    size = (12, 8) if told_by == "shape" else (8, 8)
    old, new = experts(*size[::-1], "mlp.experts"), experts(*size, "mlp.experts")
    if told_by == "another parameter":
        old |= experts(8, 16, "mlp.experts.base_layer")
        new |= experts(16, 8, "mlp.experts.base_layer")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"][told_by != "another parameter" :]
    versions = ("0.19.0" if told_by == "versions" else "0.18.1", "0.21.2")
    given = [
        make_adapter(parts, version, r=2, target_parameters=targets, target_modules=[], peft_version=version)
        for parts, version in zip((old, new), versions, strict=True)
    ]
    if told_by == "nothing":
        for call in (lambda: adapterkit.combine(given, tmp_path / "out"), lambda: adapterkit.compare(given)):
            with pytest.raises(
                FitError, match=r"PEFT 0\.18\.1 .* PEFT 0\.21\.2, which may store .* shapes do not tell"
            ):
                call()
        return
    adapterkit.combine(given, tmp_path / "out")
    for name in targets:
        exact = delta(given[0], name) + delta(given[1], name).mT
        torch.testing.assert_close(delta(tmp_path / "out", name), exact, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_version"] == versions[0]
    [pair] = adapterkit.compare(given)
    flat = [torch.cat([(delta(one, name).mT if turn else delta(one, name)).flatten() for name in targets])
            for one, turn in zip(given, (False, True), strict=True)]  # fmt: skip
    assert abs(pair.total.cosine - torch.cosine_similarity(*flat, dim=0).item()) < 1e-6


def test_biases_are_summed_with_their_scalings(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, other = torch.randn(24), torch.randn(24)
    a = make_adapter(factors("q", 24, 40) | {"q.lora_B.bias": one}, "a", lora_bias=True)
    b = make_adapter(factors("q", 24, 40) | {"q.lora_B.bias": other}, "b", lora_bias=True, lora_alpha=8)
    adapterkit.combine([(a, 0.5), (b, 2.0)], tmp_path / "out")
    got = adapterkit.load(tmp_path / "out")["q"]
    assert got.bias is not None and torch.allclose(got.bias * got.scaling, 0.5 * 1.5 * one + 2.0 * 2.0 * other)
    adapterkit.resize(a, tmp_path / "wide", rank=9)
    wide = adapterkit.load(tmp_path / "wide")["q"]
    assert wide.rank == 9 and wide.bias is not None and torch.allclose(wide.bias * wide.scaling, 1.5 * one)
    with pytest.raises(FitError, match="ties does not support trained biases"):
        adapterkit.combine([a, b], tmp_path / "ties", method="ties")


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_sums_are_linear_and_commutative(seed: int, x: float, y: float) -> None:
    rng = torch.Generator().manual_seed(seed)

    def one(rank: int) -> Adapter:
        a, b = torch.randn(rank, 9, generator=rng), torch.randn(7, rank, generator=rng)
        return Adapter("memory", {"m": LoraWeights(LazyTensor.of(a), LazyTensor.of(b), 0.5)})

    pair = [WeightedAdapter(one(2), x, "a"), WeightedAdapter(one(3), y, "b")]
    expected = x * delta(pair[0].adapter, "m") + y * delta(pair[1].adapter, "m")
    for order in (pair, pair[::-1]):
        for limit in (None, Limit(rank=5)):
            *_, result = plan_combination(order, "linear", limit=limit).steps()
            assert isinstance(result, AdapterMade)
            assert float((delta(result.adapter, "m") - expected).norm()) < 1e-5


# --- methods from papers ---------------------------------------------------------------------------------------------


def trimmed(x: torch.Tensor, density: float) -> torch.Tensor:
    """The largest elements by magnitude, zeros elsewhere."""
    count = round(density * x.numel())
    keep = x.abs().flatten().argsort(descending=True)[:count]
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[keep] = True
    return torch.where(mask.view_as(x), x, 0.0)


def elected(tensors: list[torch.Tensor]) -> torch.Tensor:
    """TIES's sign election and disjoint mean, element by element in plain Python."""
    out = torch.zeros_like(tensors[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            values = [float(t[i, j]) for t in tensors]
            sign = math.copysign(1, sum(values)) if sum(values) else 0
            agree = [value for value in values if value * sign > 0]
            out[i, j] = sum(agree) / len(agree) if agree else 0.0
    return out


def dense_method(method: str, deltas: list[torch.Tensor], w: list[float], density: float) -> torch.Tensor:
    if method == "magnitude_prune":
        return sum((x * trimmed(d, density) for x, d in zip(w, deltas, strict=True)), torch.zeros(()))
    if method == "ties":
        return elected([x * trimmed(d, density) for x, d in zip(w, deltas, strict=True)])
    if method == "tsv":
        found = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
        ranks = [int((s > 1e-6 * s[0]).sum()) for _, s, _ in found]
        U = torch.cat([u[:, :r] for (u, _, _), r in zip(found, ranks, strict=True)], 1)
        V = torch.cat([vh[:r].T for (_, _, vh), r in zip(found, ranks, strict=True)], 1)
        S = torch.cat([x * s[:r] for x, (_, s, _), r in zip(w, found, ranks, strict=True)])
        (P, _, Qh), (R, _, Th) = torch.linalg.svd(U, full_matrices=False), torch.linalg.svd(V, full_matrices=False)
        return (P @ Qh) @ torch.diag(S) @ (R @ Th).T
    total = sum((x * d for x, d in zip(w, deltas, strict=True)), torch.zeros(()))
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    if method == "iso":
        rank = int((1e-6 * S[0] < S).sum())
        return S[:rank].mean() * U[:, :rank] @ Vh[:rank]
    if method == "knots":
        U, S, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        rank = int((1e-6 * S[0] < S).sum())
        tasks = Vh[:rank].split(deltas[0].shape[1], 1)
        merged = elected([trimmed(x * t, density) for x, t in zip(w, tasks, strict=True)])
        return U[:, :rank] * S[:rank] @ merged
    raise AssertionError(method)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "tsv", "iso", "knots"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
def test_methods_match_their_papers(two: tuple[Path, Path], tmp_path: Path, method: str, weights: list[float]) -> None:
    density = 0.3
    takes = {"options": {"density": density}} if "density" in METHODS[method].options else {}
    limit = {"rank": 24} if METHODS[method].truncate == "always" else {}
    if limit:  # nothing is truncated at full rank
        limit = {"energy": 1.0}
    adapterkit.combine(list(zip(two, weights, strict=True)), tmp_path / "out", method=method, **takes, **limit)
    expected = dense_method(method, [delta(one, "q") for one in two], weights, density)
    assert relative(delta(tmp_path / "out", "q"), expected) < 2e-6


def test_core_space_matches_its_paper(two: tuple[Path, Path], tmp_path: Path) -> None:
    weights, density = [0.8, 0.5], 0.4
    opened = [adapterkit.load(path)["q"] for path in two]
    B = torch.cat([w.scaling * w.B.double() for w in opened], 1)
    A = torch.cat([w.A.double() for w in opened])
    U, Vh = torch.linalg.svd(B, full_matrices=False).U, torch.linalg.svd(A, full_matrices=False).Vh
    cores = [U.T @ delta(path, "q") @ Vh.T for path in two]
    for inner in ("ties", "linear"):
        options = {"density": density, "inner": inner}
        adapterkit.combine(list(zip(two, weights, strict=True)), tmp_path / inner, method="core", options=options)
        merged = [x * core for x, core in zip(weights, cores, strict=True)]
        M = elected([trimmed(core, density) for core in merged]) if inner == "ties" else sum(merged, torch.zeros(()))
        assert relative(delta(tmp_path / inner, "q"), U @ M @ Vh) < 2e-6
    # Core Space is lossless: with inner=linear it is the sum.
    assert (
        relative(delta(tmp_path / "linear", "q"), sum(x * delta(p, "q") for x, p in zip(weights, two, strict=True)))
        < 1e-6
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_random_elements_and_rescales(two: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    how: dict[str, Any] = {"method": method, "options": {"density": 0.4}, "energy": 1.0}
    adapterkit.combine(list(two), tmp_path / "a", seed=3, **how)
    adapterkit.combine(list(two), tmp_path / "b", seed=3, **how)
    adapterkit.combine(list(two), tmp_path / "c", seed=4, **how)
    assert torch.equal(delta(tmp_path / "a", "q"), delta(tmp_path / "b", "q"))
    assert relative(delta(tmp_path / "a", "q"), delta(tmp_path / "c", "q")) > 0.1
    dropped = []
    for number, path in enumerate(two):
        dense = delta(path, "q")
        from adapterkit.algebra.counter_rng import seed_for

        dropped.append(drop(dense, 0.4, seed_for(3, f"{number}:q.0"), 0))
        here = dropped[-1] != 0
        assert 0.3 < float(here.double().mean()) < 0.5 and torch.equal(dropped[-1][here], (dense / 0.4)[here])
    expected = elected(dropped) if method == "dare_ties" else dropped[0] + dropped[1]
    assert relative(delta(tmp_path / "a", "q"), expected) < 2e-6


@pytest.mark.parametrize("method", ["ties", "dare_ties", "magnitude_prune"])
def test_chunk_size_does_not_change_the_result(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    threads = torch.get_num_threads()
    adapterkit.combine(list(two), tmp_path / "whole", method=method, rank=5)
    monkeypatch.setattr(sketch, "CHUNK_ELEMENTS", 40 * 5)
    torch.set_num_threads(1)
    try:
        adapterkit.combine(list(two), tmp_path / "parts", method=method, rank=5)
    finally:
        torch.set_num_threads(threads)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-7) for name in whole)


def test_same_elements_survive_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [Product(torch.randn(33, 5).double(), torch.randn(5, 21).double()) for _ in "ab"]
    parts = [Part(one, torch.tensor(1.5).double(), 1.0, name) for one, name in zip(factors, "ab", strict=True)]
    for method in ("ties", "dare_ties", "magnitude_prune", "dare_linear"):
        monkeypatch.setattr(sketch, "CHUNK_ELEMENTS", 1 << 20)
        how = METHODS[method].settings({"density": 0.3}, 7 if METHODS[method].seeded else None)
        whole = METHODS[method](parts, **how).rows(0, 33)
        monkeypatch.setattr(sketch, "CHUNK_ELEMENTS", 50)
        matrix = METHODS[method](parts, **how)
        assert torch.equal(torch.cat([rows for _, _, rows in matrix.chunks()]), whole)


def test_truncating_full_rank_updates_is_near_optimal(two: tuple[Path, Path], tmp_path: Path) -> None:
    result = adapterkit.combine(list(two), tmp_path / "out", method="ties", rank=6)
    whole = dense_method("ties", [delta(one, "q") for one in two], [1.0, 1.0], 0.5)
    error = float((delta(tmp_path / "out", "q") - whole).norm())
    assert error < 1.0001 * float((best(whole, 6) - whole).norm())
    [row] = [row for row in result.modules if row.name == "q"]
    assert math.sqrt(row.discarded) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.seeded and name != "cat"])
def test_order_of_adapters_does_not_matter(make_adapter: MakeAdapter, tmp_path: Path, method: str) -> None:
    given = [(make_adapter(factors("q", 24, 40, size=0.1 * n), f"a{n}"), 0.5 + 0.3 * n) for n in (1, 2, 3)]
    for name, order in (("x", (0, 1, 2)), ("y", (2, 0, 1))):
        adapterkit.combine([given[at] for at in order], tmp_path / name, method=method)
    assert relative(delta(tmp_path / "x", "q"), delta(tmp_path / "y", "q")) < 1e-5


# --- a method of one file --------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "powered", powered)


@pytest.mark.usefixtures("toy")
def test_one_file_adds_a_method(two: tuple[Path, Path], tmp_path: Path) -> None:
    weighted = [f"{two[0]}:0.5", f"{two[1]}:3"]
    adapterkit.combine([(two[0], 0.5), (two[1], 3)], tmp_path / "out", method="powered", options={"power": 3})
    assert relative(delta(tmp_path / "out", "q"), 0.125 * delta(two[0], "q") + 27 * delta(two[1], "q")) < 1e-6
    how = ["combine", *weighted, "-o", tmp_path / "cli", "--method", "powered"]
    assert run_adapterkit(*how, "--set", "repeat=2", "--set", "sign=negative").code == 0
    assert relative(delta(tmp_path / "cli", "q"), -0.5 * delta(two[0], "q") - 18 * delta(two[1], "q")) < 1e-6
    for setting, said in {
        "power=0": "power 0.0: expected a number above 0 and at most 9",
        "power=inf": "power inf: expected a number above 0 and at most 9",
        "repeat=1.5": "repeat 1.5: expected a whole number above 0 and at most 4",
        "sign=lost": "sign 'lost': expected one of positive, negative",
        "powre=1": "powered has no option 'powre': it takes power, repeat, sign",
    }.items():
        assert run_adapterkit(*how, "--set", setting, "--overwrite").message(2) == said
    help = " ".join(run_adapterkit("combine", "--help").out.split())
    for line in (
        "powered Sum with powers of the weights",
        "power=2.0 Exponent of the weights: a number above 0 and at most 9 (powered)",
        "sign=positive Sign of the sum: one of positive, negative (powered)",
    ):
        assert line in help
    assert "did you mean powered?" in run_adapterkit(*how[:-1], "poweerd", "--overwrite").message(2)
    fields = {field.name: field for field in ACTIONS["combine"].fields}
    assert [*fields["--method"].choices][-1] == "powered" and "power=2.0 repeat=1" in fields["--set"].hint()


# --- PEFT ------------------------------------------------------------------------------------------------------------


def peft_model(paths: dict[str, Path]) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (first, path), *rest = paths.items()
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / "bases" / "tiny-llama", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, other in rest:
        model.load_adapter(other, adapter_name=name)
    return model


def peft_delta(model: Any, adapter: str, module: str) -> torch.Tensor:
    delta: torch.Tensor = model.base_model.model.get_submodule(module).get_delta_weight(adapter).double()
    return delta


MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def llama_pair(make_adapter: MakeAdapter) -> dict[str, Path]:
    """Two adapters of tiny-llama with equal ranks and scalings other than 1."""
    made = {}
    for name, alpha in (("a", 16), ("b", 12)):
        tensors = {k: t for i in range(2) for k, t in factors(f"model.layers.{i}.self_attn.q_proj", 48, 48).items()}
        made[name] = make_adapter(
            tensors, name, r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
    return made


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_result(llama_pair: dict[str, Path], tmp_path: Path, method: str) -> None:
    adapterkit.combine([(llama_pair["a"], 0.7), (llama_pair["b"], 0.3)], tmp_path / "out", method=method)
    model = peft_model({"ours": tmp_path / "out"})
    assert relative(peft_delta(model, "ours", MODULE), delta(tmp_path / "out", MODULE)) < 1e-5


def test_svd_is_correct_where_peft_was_wrong(
    llama_pair: dict[str, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """PEFT 0.20 applied the scaling twice, by √r too much with rsLoRA, and ignored the rank of a single source."""
    how = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    tensors = {k: t for i in range(2) for k, t in factors(f"model.layers.{i}.self_attn.q_proj", 48, 48).items()}
    paths = llama_pair | {"rs": make_adapter(tensors, "rs", **how)}
    exact = sum(w * delta(paths[name], MODULE) for name, w in (("a", 0.7), ("b", 0.3), ("rs", -0.5)))
    assert isinstance(exact, torch.Tensor)
    weighted = [(paths["a"], 0.7), (paths["b"], 0.3), (paths["rs"], -0.5)]
    adapterkit.combine(weighted, tmp_path / "out", method="svd", rank=12)
    assert relative(delta(tmp_path / "out", MODULE), exact) < 1e-6
    adapterkit.combine([(paths["a"], 1.0)], tmp_path / "one", method="svd", rank=2)
    assert adapterkit.load(tmp_path / "one")[MODULE].rank == 2


def test_convolutions_combine_where_pefts_svd_crashes(tmp_path: Path) -> None:
    adapter = FIXTURES / "tiny-conv"
    adapterkit.combine([(adapter, 0.5), (adapter, 0.25)], tmp_path / "out", method="svd")
    for name in adapterkit.load(adapter).modules:
        one, other = adapterkit.load(tmp_path / "out")[name], adapterkit.load(adapter)[name]
        made = one.scaling * one.B.double().flatten(1) @ one.A.double().flatten(1)
        assert relative(made, 0.75 * other.scaling * other.B.double().flatten(1) @ other.A.double().flatten(1)) < 1e-6


def test_whole_tensor_of_one_adapter_is_copied(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """PEFT uses the copy of the base instead."""
    score = torch.randn(3, 8)
    a = make_adapter(factors("q", 24, 40) | {"score.weight": score}, "a", modules_to_save=["score"])
    result = adapterkit.combine([a, make_adapter(factors("q", 24, 40), "b")], tmp_path / "out")
    assert torch.equal(adapterkit.load(tmp_path / "out").replaced["score.weight"].read(), score)
    assert any("stored whole, not as factors (first: score.weight)" in note for note in result.notes)


def test_peft_linear_matches_peft(llama_pair: dict[str, Path], tmp_path: Path) -> None:
    model = peft_model(llama_pair)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type="linear")
    adapterkit.combine([(llama_pair["a"], 0.7), (llama_pair["b"], -0.3)], tmp_path / "out", method="peft_linear")
    assert relative(delta(tmp_path / "out", MODULE), peft_delta(model, "both", MODULE)) < 1e-5
    exact = 0.7 * delta(llama_pair["a"], MODULE) - 0.3 * delta(llama_pair["b"], MODULE)
    assert relative(delta(tmp_path / "out", MODULE), exact) > 0.3


# --- resize ----------------------------------------------------------------------------------------------------------


def test_resizing_down_is_optimal_and_up_is_exact(two: tuple[Path, Path], tmp_path: Path) -> None:
    result = adapterkit.resize(two[0], tmp_path / "two", rank=2)
    assert relative(delta(tmp_path / "two", "q"), best(delta(two[0], "q"), 2)) < 1e-6 and result.error > 0
    result = adapterkit.resize(two[0], tmp_path / "nine", rank=9)
    assert result.error == 0 and {row.rank for row in result.modules} == {9}
    assert adapterkit.load(tmp_path / "nine")["q"].rank == 9
    assert relative(delta(tmp_path / "nine", "q"), delta(two[0], "q")) < 1e-6
    with pytest.raises(FitError, match=r"k: rank 17 exceeds 16, the maximum for Δ of 16 × 40"):
        adapterkit.resize(two[0], tmp_path / "far", rank=17)


def test_ranks_per_module_are_written_as_patterns(two: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.combine([(two[0], 1.0), (two[1], 1.0)], tmp_path / "both")
    result = adapterkit.resize(tmp_path / "both", tmp_path / "out", error=0.3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(row.error <= 0.3 for row in result.modules) and len({row.rank for row in result.modules}) > 1
    assert config["rank_pattern"] and not adapterkit.load(tmp_path / "out").problems
    uniform = adapterkit.resize(tmp_path / "both", tmp_path / "uniform", error=0.3, uniform=True)
    assert {row.rank for row in uniform.modules} == {max(row.rank for row in result.modules)}
    assert (
        uniform.error <= result.error
        and not json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())["rank_pattern"]
    )


# --- bad input -------------------------------------------------------------------------------------------------------


def test_invalid_calls_fail_before_writing(two: tuple[Path, Path], make_adapter: MakeAdapter, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, *adapters: Any, **how: Any) -> None:
        with pytest.raises(error, match=match):
            adapterkit.combine(list(adapters or two), tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()

    fails(UsageError, "did you mean ties", method="tie")
    fails(UsageError, "expected one of linear, svd", method="xyz")
    fails(UsageError, "ties has no option 'k': it takes density", method="ties", options={"k": 1.0})
    fails(UsageError, "linear has no option 'density': it takes none", options={"density": 0.5})
    fails(UsageError, "density 1.5", method="ties", options={"density": 1.5})
    fails(UsageError, "density 'much'", method="ties", options={"density": "much"})
    fails(UsageError, "inner 'mean'", method="core", options={"inner": "mean"})
    fails(UsageError, "takes no seed", method="ties", seed=1)
    fails(UsageError, "cat never truncates; use linear", method="cat", rank=3)
    fails(UsageError, "rank 0", rank=0)
    fails(UsageError, "rank 12: exceeds 11, the total rank", rank=12)
    for energy in (0.0, -0.1, 1.1, math.nan):
        fails(UsageError, "energy", energy=energy)
    fails(UsageError, "give one of them", rank=3, energy=0.5)
    fails(UsageError, "saved 'both'", saved="both")
    fails(FitError, "peft_linear needs adapters of equal rank", method="peft_linear")
    fails(FitError, "is DoRA", FIXTURES / "tiny-dora")
    broken = factors("q", 24, 40)
    broken["q.lora_B.weight"][3, 1] = math.nan
    fails(FitError, "q: B contains NaN or Inf", two[0], make_adapter(broken, "broken"))
    fails(
        FitError,
        r"q: the shape of Δ is \(24, 40\) in one and \(20, 40\)",
        two[0],
        make_adapter(factors("q", 20, 40), "small"),
    )
    fails(FitError, "shares no module", two[0], make_adapter(factors("z", 24, 40), "elsewhere"))
    linear = adapterkit.load(two[0]).modules["q"]
    kinds = [Adapter("", {"m": weights}) for weights in (linear, replace(linear, kind="conv"))]
    fails(FitError, "m: the kind of Δ is linear in .* and conv in", *kinds)
    for how, match in (
        ({}, "no new rank given; give `rank`, `energy` or `error`"),
        ({"rank": 2, "uniform": True}, "`uniform` has no effect with `rank`"),
        ({"error": 1.0}, "error 1.0"),
    ):
        with pytest.raises(UsageError, match=match):
            adapterkit.resize(two[0], tmp_path / "out", **how)


def test_whole_tensors_of_several_adapters_need_a_rule(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    how = {"modules_to_save": ["score"]}
    values = [torch.randn(3, 8), torch.randn(3, 8)]
    a, b = (
        make_adapter(factors("q", 24, 40) | {"score.weight": value}, name, **how)
        for name, value in zip("ab", values, strict=True)
    )
    with pytest.raises(FitError, match=r"score.weight: stored whole in a, b; choose `saved='first'`"):
        adapterkit.combine([a, b], tmp_path / "out")
    adapterkit.combine([a, b], tmp_path / "first", saved="first")
    adapterkit.combine([(a, 3.0), (b, 1.0)], tmp_path / "average", saved="average")
    assert torch.equal(adapterkit.load(tmp_path / "first").replaced["score.weight"].read(), values[0])
    mean = adapterkit.load(tmp_path / "average").replaced["score.weight"].read()
    assert torch.allclose(mean, 0.75 * values[0] + 0.25 * values[1])
    with pytest.raises(FitError, match="add up to zero"):
        adapterkit.combine([(a, 1.0), (b, -1.0)], tmp_path / "none", saved="average")


def test_output_is_complete_and_records_its_sources(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapterkit.combine([(two[0], 0.25), two[1]], out)
    record = json.loads((out / "adapterkit_adapter.json").read_text())
    assert [one["weight"] for one in record["from"]] == [0.25, 1.0] and record["made"] == "combined by linear"
    assert record["from"][0]["files"]["adapter_model.safetensors"] in (out / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(record) + (out / "README.md").read_text()
    with pytest.raises(adapterkit.AdapterkitError, match="already exists"):
        adapterkit.combine([two[0]], out)
    adapterkit.combine([two[0]], out, overwrite=True)
    with pytest.raises(UsageError, match="is the input"):
        adapterkit.combine([out], out, overwrite=True)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "adapterkit_adapter.json",
    }  # fmt: skip


def test_combine_and_resize_commands(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_adapterkit("combine", f"{two[0]}:0.7", f"{two[1]}:0.3", "-o", tmp_path / "out", "--rank", "3")
    assert done.code == 0 and "3 modules, rank 3" in done.out and "relative error" in done.out and "note:" in done.err
    settings = ["--set", "inner=linear", "--set", "density=0.2"]
    args = ["combine", *two, "-o", tmp_path / "core", "--method", "core", *settings]
    done = run_adapterkit(*args, "--json")
    assert done.code == 0 and max(row["rank"] for row in json.loads(done.out)["modules"]) == 11
    assert "expected NAME=VALUE" in run_adapterkit(*args[:-1], "density", "--overwrite").err
    done = run_adapterkit("resize", tmp_path / "core", "-o", tmp_path / "small", "--energy", "0.9")
    assert done.code == 0 and "resized" in done.out and "retained" in done.out
    assert run_adapterkit("resize", tmp_path / "core", "-o", tmp_path / "none").code == 2


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["combine", "one", "two", "--method", "ties"],
        ["resize", "one", "--rank", "2"],
        ["convert", "one", "--to", "dora", "--base", "base"],
        ["convert", "one", "--to", "rslora"],
        ["extract", "base", "tuned", "--rank", "2"],
    ],
)
def test_dry_run_checks_and_writes_nothing(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_adapter(tmp_path / name)
    for name in ("base", "tuned"):
        write_base(tmp_path / name)
    monkeypatch.setattr("adapterkit.api.run.make_adapter", None)  # which would raise
    before = contents(tmp_path)
    result = run_adapterkit(*args, "-o", "out", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("plan      4 modules, checked")
    assert json.loads(run_adapterkit(*args, "-o", "out", "--dry-run", "--json").out)["modules"] == 4
    assert contents(tmp_path) == before
    (tmp_path / "taken").write_text("")
    assert "already exists" in run_adapterkit(*args, "-o", "taken", "--dry-run").message(7)
    missing = [arg.replace("one", "none").replace("tuned", "none") for arg in args]
    assert run_adapterkit(*missing, "-o", "out", "--dry-run").code == 1


@pytest.mark.parametrize("method", ["linear", "svd", "dare_linear"])
def test_zero_results_are_noted(make_adapter: Callable[..., Path], tmp_path: Path, method: str) -> None:
    """The rounding of float64 is not a result."""
    tensors = factors("q", 24, 40) | factors("k", 24, 40)
    one = make_adapter(tensors, "one")
    other = make_adapter({name: tensor for name, tensor in tensors.items() if name.startswith("q.")}, "other")
    options = {"density": 1} if method == "dare_linear" else None
    result = adapterkit.combine([(one, 1), (one, -1)], tmp_path / "all", method=method, options=options)
    assert result.error == 0 and all(row.energy == 0 for row in result.modules)
    assert result.notes[-1] == "the result is zero in every module: the adapters cancel out or are zero"
    result = adapterkit.combine([(one, 0.3), (other, -0.3)], tmp_path / "some", method=method, options=options)
    assert result.notes[-1].startswith("the result is zero in 1 of 2 modules (first: q)")
    result = adapterkit.combine([(one, 1), (one, -0.999999)], tmp_path / "none", method=method, options=options)
    assert not result.notes and result.error < 1e-5
