"""Comparing adapters, against dense float64 arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from test_combine import delta

import adapterkit
from adapterkit.combining import compare
from adapterkit.combining.compare import Similarity
from adapterkit.errors import FitError, UsageError

MakeAdapter = Callable[..., Path]


def check(row: Similarity, a: torch.Tensor, b: torch.Tensor, ranks: tuple[int, int]) -> None:
    """Check every figure of a row against the dense Δs."""
    na, nb = float(a.norm()), float(b.norm())
    assert row.cosine == pytest.approx(float((a * b).sum()) / na / nb, abs=1e-9)
    assert row.distance == pytest.approx(float((a - b).norm()) / na, rel=1e-6)
    assert row.norm_ratio == pytest.approx(nb / na, rel=1e-9)
    (Ua, _, Va), (Ub, _, Vb) = (torch.linalg.svd(x, full_matrices=False) for x in (a, b))
    for i in range(1, ranks[0] + 1):
        for j in range(1, ranks[1] + 1):
            phi = float((Va[:i] @ Vb[:j].T).square().sum()) / min(i, j)
            assert row.phi[i - 1][j - 1] == pytest.approx(phi, abs=1e-6)
    i, j = ranks
    assert row.overlap_in == pytest.approx(row.phi[-1][-1])
    assert row.overlap_out == pytest.approx(float((Ua[:, :i].T @ Ub[:, :j]).square().sum()) / min(ranks), abs=1e-6)
    differ = (a.sign() * b.sign()) < 0
    assert row.sign_conflict == pytest.approx(float(differ.double().mean()), abs=1e-9)
    sigma = torch.linalg.svdvals(a + b)
    assert row.lost == pytest.approx(float(sigma[max(ranks) :].norm() / sigma.norm()), rel=1e-6)


@pytest.fixture
def two(make_adapter: MakeAdapter) -> tuple[Path, Path]:
    one = factors("layers.0.q", 24, 40, rank=3) | factors("layers.1.v", 16, 40, rank=3)
    other = factors("layers.0.q", 24, 40, rank=5, size=0.2) | factors("layers.1.v", 16, 40, rank=5)
    other |= factors("layers.1.k", 16, 40, rank=5)
    other["layers.0.q.lora_A.weight"][:3] += one["layers.0.q.lora_A.weight"]  # so that they have something in common
    return make_adapter(one, "one", r=3, lora_alpha=5), make_adapter(other, "other", r=5, lora_alpha=5)


def test_figures_match_the_dense_updates(two: tuple[Path, Path]) -> None:
    [pair] = adapterkit.compare([(two[0], 1.0), (two[1], -0.5)])
    assert (pair.first, pair.second, pair.alone) == ("one", "other", (0, 1))
    names = ("layers.0.q", "layers.1.v")
    dense = {name: (delta(two[0], name), -0.5 * delta(two[1], name)) for name in names}
    for row in pair.modules:
        assert row.name is not None and (row.layer, row.target) == (int(row.name[7]), row.name[-1])
        check(row, *dense[row.name], ranks=(3, 5))
    a, b = (torch.cat([dense[name][index].flatten() for name in names]) for index in (0, 1))
    assert pair.total.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-9)
    assert pair.total.distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert pair.total.norm_ratio == pytest.approx(float(b.norm() / a.norm()))
    assert pair.total.sign_conflict == pytest.approx(float(((a.sign() * b.sign()) < 0).double().mean()))


def test_adapter_compared_with_itself_and_its_negative(two: tuple[Path, Path]) -> None:
    pairs = adapterkit.compare([(two[0], 1.0), (two[0], 1.0), (two[0], -2.0)])
    assert [(pair.first, pair.second) for pair in pairs] == [
        ("one #1", "one #2"),
        ("one #1", "one #3"),
        ("one #2", "one #3"),
    ]
    same, opposite = pairs[0].total, pairs[1].total
    assert same.cosine == pytest.approx(1) and same.distance < 1e-12 and same.overlap_in == pytest.approx(1)
    assert same.sign_conflict == 0 and same.lost == 0 and same.norm_ratio == pytest.approx(1)
    assert opposite.cosine == pytest.approx(-1) and opposite.distance == pytest.approx(3)
    assert opposite.sign_conflict == 1 and opposite.overlap_out == pytest.approx(1)


def test_signs_are_compared_on_a_sample_of_rows(make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SAMPLED_ROWS", 8)
    a, b = (make_adapter(factors("q", 96, 40), name) for name in ("a", "b"))
    [pair] = adapterkit.compare([a, b])
    one, other = delta(a, "q")[::12], delta(b, "q")[::12]
    assert pair.total.sign_conflict == pytest.approx(float((one.sign() * other.sign() < 0).double().mean()))


def test_zero_update_has_no_cosine(make_adapter: MakeAdapter) -> None:
    zero = factors("q", 24, 40)
    zero["q.lora_B.weight"].zero_()
    [pair] = adapterkit.compare([make_adapter(zero, "zero"), make_adapter(factors("q", 24, 40), "some")])
    assert math.isnan(pair.total.cosine) and pair.total.sign_conflict == 0 and pair.total.lost == 0


def test_invalid_comparisons_fail(two: tuple[Path, Path], make_adapter: MakeAdapter) -> None:
    with pytest.raises(UsageError, match="at least two"):
        adapterkit.compare([two[0]])
    with pytest.raises(FitError, match=r"shape of Δ is \(24, 40\) in one and \(20, 40\)"):
        adapterkit.compare([two[0], make_adapter(factors("layers.0.q", 20, 40), "small")])
    with pytest.raises(FitError, match="shares no module"):
        adapterkit.compare([two[0], make_adapter(factors("z", 20, 40), "else")])


@pytest.mark.parametrize("name", ["tiny-conv", "tiny-embed-save", "tiny-dora"])
def test_all_kinds_of_layers_are_compared(name: str) -> None:
    [pair] = adapterkit.compare([FIXTURES / name, (FIXTURES / name, 0.5)])
    assert pair.total.cosine == pytest.approx(1) and pair.total.norm_ratio == pytest.approx(0.5)


def test_compare_command(two: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_adapterkit("compare", *two)
    assert done.code == 0 and "one and other: 2 modules in both, 0 and 1 in one only" in done.out
    assert "in all" in done.out and "cosine" in done.out
    done = run_adapterkit("compare", *two, "--json")
    [pair] = json.loads(done.out)["pairs"]
    assert len(pair["modules"]) == 2 and pair["modules"][0]["phi"] == []
    [pair] = json.loads(run_adapterkit("compare", *two, "--json", "--by", "module").out)["pairs"]
    assert len(pair["modules"][0]["phi"]) == 3
    assert "layers.0.q" not in run_adapterkit("compare", *two).out
    assert "layer" in run_adapterkit("compare", *two, "--by", "layer").out
    assert "0.q" in run_adapterkit("compare", *two, "--by", "module").out
    done = run_adapterkit("compare", *two, "--plot", tmp_path / "likeness.png")
    assert done.code == 0 and (tmp_path / "likeness.png").stat().st_size > 5000
    assert run_adapterkit("compare", *two, "--plot", tmp_path / "likeness.gif").code == 2
