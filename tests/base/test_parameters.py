"""Factors of parameters over bases on the boundary: square shapes, wrong numbers of experts, every version of PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import factors
from handmade import adapterkit as command
from safetensors.torch import load_file

import adapterkit
from adapterkit.adapter.weights import load_weights
from adapterkit.base.targets import fit
from adapterkit.errors import FitError, UsageError
from adapterkit.merging.blocks import loading
from adapterkit.merging.live.modules import Parameter

Make = Callable[..., Path]
E, RANK, SCALING = 4, 2, 3.0  # alpha 6
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def stack(module: str, out: int, inner: int, experts: int = E, rank: int = RANK) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.randn(experts * rank, inner),
        f"{module}.lora_B.weight": torch.randn(out, rank * experts),
    }


def delta(parts: dict[str, torch.Tensor], module: str = "mlp.experts", experts: int = E) -> torch.Tensor:
    """Return Δ (experts, out, in) in float64, each expert's from its own factors."""
    A, B = (parts[f"{module}.lora_{name}.weight"].double() for name in "AB")
    each = [B[:, expert::experts] @ A.view(experts, -1, A.shape[1])[expert] for expert in range(experts)]
    return SCALING * torch.stack(each)


def apart(W: torch.Tensor) -> dict[str, torch.Tensor]:
    """Store the gate_up_proj `W (experts, out, in)` with a tensor per expert and part."""
    halves = {"gate_proj": W.chunk(2, dim=1)[0], "up_proj": W.chunk(2, dim=1)[1]}
    return {f"mlp.experts.{e}.{part}.weight": half[e].clone() for part, half in halves.items() for e in range(len(W))}


def together(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stack what `apart` made."""
    if GATE_UP in tensors:
        return tensors[GATE_UP]
    experts = sum("gate_proj" in name for name in tensors)
    return torch.stack([
        torch.cat([tensors[f"mlp.experts.{e}.{part}.weight"] for part in ("gate_proj", "up_proj")])
        for e in range(experts)
    ])  # fmt: skip


@pytest.fixture
def merged(make_base: Make, make_adapter: Make, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Merge an adapter of these factors into a base of these tensors, and undo that."""

    def merge(
        tensors: dict[str, torch.Tensor],
        parts: dict[str, torch.Tensor],
        targets: list[str],
        model: str | None = None,
        orientation: str | None = None,
        **config: Any,
    ) -> dict[str, torch.Tensor]:
        base = make_base(tensors, {"model_type": model} if model else {})
        adapter = make_adapter(parts, **{"r": RANK, "target_parameters": targets} | config)
        before = {file.name: file.read_bytes() for file in (*base.iterdir(), *adapter.iterdir())}
        adapterkit.merge(base, adapter, tmp_path / "out", orientation=orientation)
        adapterkit.unmerge(tmp_path / "out", tmp_path / "back")
        assert before == {file.name: file.read_bytes() for file in (*base.iterdir(), *adapter.iterdir())}
        assert (tmp_path / "back/model.safetensors").read_bytes() == before["model.safetensors"]
        verdicts = adapterkit.verify(tmp_path / "out", base, adapter, orientation=orientation)
        assert all(verdict.fits for verdict in verdicts)
        return load_file(tmp_path / "out/model.safetensors")

    return merge


# --- orientation


@pytest.mark.parametrize("layout", [apart, lambda W: {GATE_UP: W}], ids=["apart", "stacked"])
@pytest.mark.parametrize("size", [(6, 10), (8, 10)], ids=["", "rows of A = out"])
@pytest.mark.parametrize("flipped", [False, True])
def test_shapes_decide_whatever_the_config_says(
    layout: Callable[[torch.Tensor], dict[str, torch.Tensor]], size: tuple[int, int], flipped: bool,
    merged: Callable[..., dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    W = torch.randn(E, *size)
    parts = stack("mlp.experts", *(size[::-1] if flipped else size))
    version, orientation = ("0.21.2", "plain") if flipped else ("0.18.1", "transposed")
    out = merged(layout(W), parts, [GATE_UP], "qwen3_moe", orientation, peft_version=version)
    exact = W.double() + (delta(parts).mT if flipped else delta(parts))
    assert torch.equal(together(out), oracle.rounded(exact, torch.float32))


# PEFT's versions by how they add B·A to the stack, which `is_transposed` of the model's experts changes from 0.19.0 on.
WRITERS: list[tuple[str | None, str | None, bool | None]] = [
    ("0.17.1", "qwen3_moe", True), ("0.18.1", "gpt_oss", True), ("0.18.1", None, True), ("0.18.1.dev0@1f", None, True),
    ("0.19.0", "qwen3_moe", True), ("0.19.0", "gpt_oss", False), ("0.19.0", None, None),
    ("0.19.1", "qwen3_moe", False), ("0.19.1", "gpt_oss", True), ("0.21.2", "aria_text", True),
    ("0.21.2", "mixtral", False), ("0.21.2", "llama4_text", False), ("0.21.2", None, None), ("0.21.2", "mine", None),
    (None, "qwen3_moe", None), ("0.19.0.dev0@1f", "qwen3_moe", None), ("new", "qwen3_moe", None),
    ("0.20.0.dev0", "qwen3_moe", False), ("1.0.0", "gpt_oss", True),
]  # fmt: skip


@pytest.mark.parametrize("layout", [apart, lambda W: {GATE_UP: W}], ids=["apart", "stacked"])
@pytest.mark.parametrize(("version", "model", "transposed"), WRITERS)
def test_the_version_and_the_model_orient_square_experts(
    layout: Callable[[torch.Tensor], dict[str, torch.Tensor]], version: str | None, model: str | None,
    transposed: bool | None, merged: Callable[..., dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    """All sizes are equal: in, out, and the rows of A, which are experts · rank."""
    W, parts = torch.randn(E, E * RANK, E * RANK), stack("mlp.experts", E * RANK, E * RANK)
    config = {"peft_version": version} if version else {}
    if transposed is None:
        with pytest.raises(FitError, match=r"gate_up_proj: Δ is square \(8 × 8\)") as refused:
            merged(layout(W), parts, [GATE_UP], model, **config)
        assert "`orientation='plain'`" in refused.value.hint
        return
    out = merged(layout(W), parts, [GATE_UP], model, **config)
    exact = W.double() + (delta(parts).mT if transposed else delta(parts))
    assert torch.equal(together(out), oracle.rounded(exact, torch.float32))


@pytest.mark.parametrize("orientation", ["plain", "transposed"])
def test_the_orientation_can_be_given(orientation: str, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    W, parts = torch.randn(E, 6, 6), stack("mlp.experts", 6, 6)
    base, adapter = make_base({DOWN: W}), make_adapter(parts, r=RANK, target_parameters=[DOWN])
    refused = command("merge", base, adapter, "-o", tmp_path / "out")
    assert refused.code == 3 and "--orientation plain" in refused.err
    with pytest.raises(UsageError, match="orientation 'flat': expected one of plain, transposed"):
        adapterkit.load(adapter, orientation="flat")
    out = tmp_path / "out"
    assert command("merge", base, adapter, "-o", out, "--orientation", orientation).code == 0
    given = ["--base", base, "--adapter", adapter]
    assert command("verify", out, *given, "--orientation", orientation).code == 0
    other = next(one for one in ("plain", "transposed") if one != orientation)
    assert command("verify", out, *given, "--orientation", other).code != 0
    exact = W.double() + (delta(parts).mT if orientation == "transposed" else delta(parts))
    assert torch.equal(load_file(out / "model.safetensors")[DOWN], oracle.rounded(exact, torch.float32))
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Module()
    model.mlp.experts.down_proj = torch.nn.Parameter(W.clone())
    adapterkit.apply(model, adapterkit.load(adapter, orientation=orientation))
    assert torch.equal(model.mlp.experts.down_proj.data, load_file(out / "model.safetensors")[DOWN])
    assert command("unmerge", out, "-o", tmp_path / "back", "--orientation", orientation).code == 2


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_the_other_parameters_orient_square_experts(
    flipped: bool, version: str, merged: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """As for gpt-oss, whose down_proj is square: an older transformers did not mark its experts."""
    base = {GATE_UP: torch.randn(E, 12, 6), DOWN: torch.randn(E, 6, 6)}
    parts = stack("mlp.experts", 6, 6) | stack("mlp.experts.base_layer", *((6, 12) if flipped else (12, 6)))
    out = merged(base, parts, [DOWN, GATE_UP], "gpt_oss", peft_version=version)
    for name, module in ((GATE_UP, "mlp.experts.base_layer"), (DOWN, "mlp.experts")):
        exact = base[name].double() + (delta(parts, module).mT if flipped else delta(parts, module))
        assert torch.equal(out[name], oracle.rounded(exact, torch.float32))


def test_parameters_that_disagree(merged: Callable[..., dict[str, torch.Tensor]]) -> None:
    base = {"a.one": torch.randn(E, 12, 6), "b.one": torch.randn(E, 12, 6), "c.one": torch.randn(E, 6, 6)}
    parts = stack("a", 12, 6) | stack("b", 6, 12) | stack("c", 6, 6)
    with pytest.raises(FitError, match=r"^c\.one: .* the adapter's other parameters disagree"):
        merged(base, parts, ["one"], "qwen3_moe", peft_version="0.21.2")


def test_adapters_of_different_versions_are_merged_together(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    W, parts = torch.randn(E, 6, 6), [stack("mlp.experts", 6, 6) for _ in range(2)]
    adapters = [
        make_adapter(part, version, r=RANK, target_parameters=[DOWN], peft_version=version)
        for part, version in zip(parts, ("0.18.1", "0.21.2"), strict=True)
    ]
    adapterkit.merge(make_base({DOWN: W}, {"model_type": "qwen3_moe"}), adapters, tmp_path / "out")
    exact = W.double() + delta(parts[0]).mT + delta(parts[1])
    out = load_file(tmp_path / "out/model.safetensors")[DOWN]
    assert torch.allclose(out.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("shape", [(1, 6, 6), (6, 6)], ids=["one expert", "a matrix"])
def test_a_single_square_matrix_is_not_transposed(
    shape: tuple[int, ...], version: str, model: str, merged: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """PEFT adds B·A as it is then, in every version."""
    W, parts = torch.randn(shape), stack("mlp.experts", 6, 6, experts=1)
    out = merged({DOWN: W}, parts, [DOWN], model, peft_version=version)[DOWN]
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, experts=1).view(shape), torch.float32))


# --- experts

BASES: dict[str, dict[str, torch.Tensor]] = {
    "stacked": {GATE_UP: torch.randn(E, 6, 10)},
    "apart": apart(torch.randn(E, 6, 10)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("experts", "rank", "r"),
    [(2, 2, 2), (3, 2, 2), (5, 2, 2), (8, 2, 2), (1, 2, 2), (E, 2, 1), (E, 2, 4), (E, 2, 8), (E, 2, None)],
    ids=["half", "one fewer", "one more", "twice", "one", "r is half", "r is twice", "r is all", "no r"],
)
def test_every_expert_has_its_update(
    base: str, experts: int, rank: int, r: int | None, merged: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    parts = stack("mlp.experts", 6, 10, experts, rank)
    found = experts * rank // (r or experts * rank)
    with pytest.raises(
        FitError, match=rf"factors of {found} experts? \(A is .* the base has 4 experts .* every expert"
    ):
        merged(BASES[base], parts, [GATE_UP], r=r)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"2.up_proj": None}, r"has mlp\.experts\.2\.gate_proj\.weight, but no mlp\.experts\.2\.up_proj\.weight"),
        ({"0.gate_proj": None}, r"has mlp\.experts\.0\.up_proj\.weight, but no mlp\.experts\.0\.gate_proj\.weight"),
        ({"2.up_proj": (2, 10)}, "do not stack"),
        ({"2.up_proj": (3, 9)}, "do not stack"),
        ({"2.up_proj": ()}, "do not stack"),
        ({"2.gate_proj": (2, 10), "2.up_proj": (4, 10)}, "do not stack"),
        ({"2.gate_proj": None, "2.up_proj": None}, "the base has 2 experts"),
        ({"3.gate_proj": None, "3.up_proj": None}, "the base has 3 experts"),
        ({"4.gate_proj": (3, 10), "4.up_proj": (3, 10)}, "the base has 5 experts"),
    ],
)
def test_bases_whose_experts_are_incomplete(
    changed: dict[str, tuple[int, ...] | None], why: str, merged: Callable[..., dict[str, torch.Tensor]]
) -> None:
    base = {name.removeprefix("mlp.experts."): tensor for name, tensor in BASES["apart"].items()}
    for name, shape in changed.items():
        base.pop(f"{name}.weight", None)
        if shape is not None:
            base[f"{name}.weight"] = torch.randn(shape)
    with pytest.raises(FitError, match=why):
        merged({f"mlp.experts.{name}": tensor for name, tensor in base.items()}, stack("mlp.experts", 6, 10), [GATE_UP])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2), (0, 1, 2, 3), (1, 2), (0, 2), (3,), (0,)])
def test_modules_of_the_first_experts_are_of_a_smaller_model(
    base: str, numbers: tuple[int, ...], make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """With a module per expert, as in transformers 4; others were chosen for training."""
    parts = {
        name: tensor for number in numbers for name, tensor in factors(f"mlp.experts.{number}.up_proj", 3, 10).items()
    }
    given = make_base(BASES[base], {"model_type": "qwen3_moe"}), make_adapter(parts)
    if numbers in ((0, 1), (0, 1, 2)):
        with pytest.raises(FitError, match=rf"has modules of {len(numbers)} experts, the base has 4 experts .* every"):
            adapterkit.plan_merge(*given, tmp_path / "out")
    plan = adapterkit.plan_merge(*given, tmp_path / "out", allow_partial=numbers in ((0, 1), (0, 1, 2)))
    assert len(plan.ledger["adapter"]) == len(numbers)


def test_wrong_shapes_name_the_base(merged: Callable[..., dict[str, torch.Tensor]]) -> None:
    with pytest.raises(
        FitError, match=r"gate_up_proj: Δ is \(6, 9\), the base has mlp\.experts\.gate_up_proj \(4, 6, 10\)"
    ):
        merged(BASES["stacked"], stack("mlp.experts", 6, 9), [GATE_UP])


def test_experts_over_a_matrix(merged: Callable[..., dict[str, torch.Tensor]]) -> None:
    with pytest.raises(FitError, match=r"factors of 4 experts .* has one matrix \(mlp\.gate\.weight \(8, 8\)\)"):
        merged({"mlp.gate.weight": torch.randn(8, 8)}, stack("mlp.gate", 8, 8), ["gate.weight"])


# --- names


def test_a_bare_name_captures_no_module(merged: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Targeted modules are modules; what is nested in wrappers, or targeted by its path, is a parameter."""
    base = {
        "q_proj.weight": torch.randn(6, 10), "mlp.down_proj.weight": torch.randn(6, 10),
        "mlp.gate.weight": torch.randn(E, 10), GATE_UP: torch.randn(E, 6, 10), DOWN: torch.randn(E, 10, 3),
    }  # fmt: skip
    parts = stack("mlp.experts.base_layer", 6, 10) | stack("mlp.experts", 10, 3)
    parts |= factors("q_proj", 6, 10, RANK) | factors("mlp.gate", E, 10, RANK) | factors("mlp.down_proj", 6, 10, RANK)
    targets = ["gate_up_proj", "down_proj", "gate.weight", "gate_up_proj"]
    out = merged(base, parts, targets, target_modules=["q_proj", "mlp.down_proj"])
    exact = {GATE_UP: delta(parts, "mlp.experts.base_layer"), DOWN: delta(parts)}
    for module in ("q_proj", "mlp.gate", "mlp.down_proj"):
        exact[f"{module}.weight"] = delta(parts, module, 1)[0]
    for name, W in base.items():
        assert torch.equal(out[name], oracle.rounded(W.double() + exact[name], torch.float32)), name


def test_names_nested_deeper_than_the_config_knows(make_adapter: Make) -> None:
    parts = stack("mlp.experts.base_layer", 6, 10) | stack("mlp.experts", 10, 3)
    for targets in ([DOWN], [], ["mlp.other"]):
        name = f"deep{len(targets)}{targets[0] if targets else ''}"
        adapter = adapterkit.load(make_adapter(parts, name, r=RANK, target_parameters=targets))
        [problem] = [one for one in adapter.problems if one.fatal]
        assert "is nested 2 deep, but target_parameters in adapter_config.json names" in problem.what


def test_parameters_of_unknown_order_are_taken_as_listed(make_adapter: Make, tmp_path: Path) -> None:
    parts = stack("m.base_layer", 6, 10) | stack("m", 10, 3)
    adapter = adapterkit.load(make_adapter(parts, r=RANK, target_parameters=["m.second", "m.first"]))
    assert {name: weights.out_features for name, weights in adapter.modules.items()} == {"m.second": 6, "m.first": 10}
    assert any("reorder that list" in problem.what and not problem.fatal for problem in adapter.problems)
    adapterkit.save(adapter, tmp_path / "copy")
    assert list(adapterkit.load(tmp_path / "copy")) == list(adapter)
    copied = load_file(tmp_path / "copy/adapter_model.safetensors")
    assert all(torch.equal(copied[f"base_model.model.{name}"], tensor) for name, tensor in parts.items())


def test_modules_inside_wrappers_of_parameters(make_adapter: Make, tmp_path: Path) -> None:
    """PEFT wraps the module that declares a parameter, so the names of modules inside it change too."""
    parts = stack("mlp.base_layer", 6, 10) | stack("mlp", 10, 3) | factors("mlp.base_layer.base_layer.q", 6, 10, RANK)
    targets = ["mlp.gate_up_proj", "mlp.down_proj"]
    adapter = adapterkit.load(make_adapter(parts, r=RANK, target_parameters=targets, target_modules=["q"]))
    assert set(adapter) == {"mlp.gate_up_proj", "mlp.down_proj", "mlp.q"} and not adapter.problems
    adapterkit.resize(adapter, tmp_path / "copy", rank=RANK)
    assert load_file(tmp_path / "copy/adapter_model.safetensors").keys() == {
        f"base_model.model.{name}" for name in parts
    }
    config = json.loads((tmp_path / "copy/adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.q"] and sorted(config["target_parameters"]) == sorted(targets)


# --- work


@pytest.mark.parametrize("layout", [apart, lambda W: {GATE_UP: W}], ids=["apart", "stacked"])
def test_factors_of_a_stack_are_read_once(
    layout: Callable[[torch.Tensor], dict[str, torch.Tensor]], make_base: Make, make_adapter: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not for each of the experts, of which models have hundreds."""
    W, parts = torch.randn(32, 64, 64), stack("mlp.experts", 64, 64, experts=32)
    base = make_base(layout(W), {"model_type": "qwen3_moe"})
    adapter = make_adapter(parts, r=RANK, target_parameters=[GATE_UP], peft_version="0.21.2")
    plan = adapterkit.plan_merge(base, adapter, tmp_path / "out")
    read: list[object] = []
    monkeypatch.setattr(loading, "load_weights", lambda weights: read.append(weights) or load_weights(weights))
    for _ in adapterkit.run(plan, threads=1):
        pass
    assert len(read) == 1
    out = together(load_file(tmp_path / "out/model.safetensors"))
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, experts=32), torch.float32))


SIZES = (1, 2, 4)


@pytest.mark.parametrize("layout", [apart, lambda W: {GATE_UP: W}], ids=["apart", "stacked"])
def test_updates_cover_all_experts_or_none(
    layout: Callable[[torch.Tensor], dict[str, torch.Tensor]], make_adapter: Make
) -> None:
    """Over sizes at which experts, ranks and features are mistaken for each other, whatever rank the config says."""
    bases = {
        experts: {
            name: Parameter(name, "F32", tuple(W.shape)) for name, W in layout(torch.zeros(experts, 4, 4)).items()
        }
        for experts in SIZES
    }
    placed = 0
    for experts, rank, r in product(SIZES, SIZES, SIZES):
        path = make_adapter(
            stack("mlp.experts", 4, 4, experts, rank), f"{experts}-{rank}-{r}", r=r, peft_version="0.21.2",
            target_parameters=["gate_up_proj"],
        )  # fmt: skip
        adapter = adapterkit.load(path)
        for count, base in bases.items():
            fits = experts * rank == count * r
            try:
                [targets] = fit(adapter, base, {"model_type": "qwen3_moe"}).targets.values()
            except (FitError, ValueError):
                assert not fits
                continue
            assert fits and adapter.modules[GATE_UP].rank == r
            assert len({(target.tensor, target.rows) for target in targets}) == len(targets)
            assert sorted({target.expert for target in targets}) == list(range(count))
            spans = [target.rows or target.delta_rows or (0, 0) for target in targets]
            assert sum(stop - start for start, stop in spans) == 4 * count
            placed += 1
    assert placed == sum(e * k == c * r for e, k, r, c in product(SIZES, SIZES, SIZES, SIZES))
