"""Each fact that stands out is found in the module that has it, and none in adapters without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from handmade import adapterkit as run_adapterkit

import adapterkit
from adapterkit.inspection.report import AdapterReport

LAYERS, RANK = 8, 6
ODD = "model.layers.5.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    names = [f"model.layers.{i}.self_attn.{part}" for i in range(LAYERS) for part in ("q_proj", "v_proj")]
    shapes = {"lora_A.weight": (RANK, 48), "lora_B.weight": (32, RANK)}
    return {f"{name}.{factor}": torch.randn(*shape) * 0.1 for name in names for factor, shape in shapes.items()}


def non_finite(factors: Tensors) -> None:
    factors[f"{ODD}.lora_A.weight"][2, 3] = torch.nan


def zero(factors: Tensors) -> None:
    factors[f"{ODD}.lora_B.weight"].zero_()


def near_zero(factors: Tensors) -> None:
    factors[f"{ODD}.lora_B.weight"] *= 5e-4


def dominated(factors: Tensors) -> None:
    factors[f"{ODD}.lora_B.weight"][:, 1:] *= 0.03


def relative_large(factors: Tensors) -> None:
    factors[f"{ODD}.lora_B.weight"] *= 40


def relative_small(factors: Tensors) -> None:
    for name, factor in factors.items():
        factor *= 1e-5 if "lora_B" in name else 1


def nothing(factors: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "value"),
    [(nothing, None), (non_finite, None), (zero, None), (near_zero, (0, 1e-3)), (dominated, (0.7, 1)),
     (relative_large, (0.5, 20)), (relative_small, (0, 1e-4))],
)  # fmt: skip
def test_what_stands_out_is_found_where_it_is(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], change: Callable[[Tensors], None],
    value: tuple[float, float] | None,
) -> None:  # fmt: skip
    change(factors := tensors())
    adapter = make_adapter(factors, r=RANK)
    shapes = {name.partition(".lora")[0]: (32, 48) for name in factors}
    base = make_base({f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()})
    report = adapterkit.inspect(adapter, against=base)
    assert isinstance(report, AdapterReport)
    findings = [finding for finding in report.findings if finding.kind == change.__name__]
    assert [finding.kind for finding in report.findings] == [finding.kind for finding in findings]
    if change is nothing:
        return
    [finding] = findings
    assert finding.of == 2 * LAYERS and len(finding.modules) == (2 * LAYERS if change is relative_small else 1)
    assert change is relative_small or finding.modules == (ODD,)
    if value is not None:
        assert finding.value is not None and value[0] < finding.value < value[1]
    assert finding.modules[0] in str(finding) and str(finding) in report.warnings()
    done = run_adapterkit("inspect", adapter, "--against", base, "--json")  # checks that its fields are documented
    assert [one["kind"] for one in json.loads(done.out)["findings"]] == [change.__name__]
    assert finding.modules[0] in run_adapterkit("inspect", adapter, "--against", base).out.replace("\n  ", "")


@pytest.mark.parametrize(
    "adapter", [path.name for path in FIXTURES.iterdir() if (path / "adapter_config.json").exists()]
)
def test_nothing_stands_out_in_sound_adapters(adapter: str) -> None:
    report = adapterkit.inspect(FIXTURES / adapter)
    assert isinstance(report, AdapterReport) and report.findings == []


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_of_the_base_without_an_update_are_named(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], stacked: bool
) -> None:
    experts, shapes = "model.layers.0.mlp.experts", {"lora_A": (RANK, 10), "lora_B": (24, RANK)}
    single = {f"{experts}.{expert}.down_proj.weight": torch.randn(24, 10) for expert in range(6)}
    base = {f"{experts}.down_proj": torch.randn(6, 24, 10)} if stacked else single
    chosen = {
        f"{experts}.{expert}.down_proj.{factor}.weight": torch.randn(shape)
        for expert in (0, 1, 2, 4) for factor, shape in shapes.items()
    }  # fmt: skip
    made, adapter = make_base(base, {"model_type": "qwen3_moe"}), make_adapter(chosen, r=RANK)
    report = adapterkit.inspect(adapter, against=made, header_only=True)
    assert isinstance(report, AdapterReport) and report.match is not None
    [(name, idle)] = report.match.idle_experts.items()
    assert name.startswith(experts) and idle == (3, 5)
    assert "2 experts of" in run_adapterkit("inspect", adapter, "--against", made, "--header-only").out
    run_adapterkit("inspect", adapter, "--against", made, "--json")  # checks that its fields are documented


def test_experts_without_an_update_are_counted(make_adapter: Callable[..., Path]) -> None:
    experts = "model.layers.{}.mlp.experts"
    A, B = torch.randn(8 * RANK, 10), torch.randn(24, RANK, 8)
    B[:, :, [2, 5]] = 0.0
    A[3 * RANK : 4 * RANK] = 0.0
    stacked = {f"{experts.format(0)}.lora_A.weight": A, f"{experts.format(0)}.lora_B.weight": B.flatten(1)}
    report = adapterkit.inspect(
        make_adapter(stacked, "stacked", r=RANK, target_parameters=["mlp.experts.gate_up_proj"])
    )
    assert isinstance(report, AdapterReport) and report.modules[0].idle_experts == (2, 3, 5)
    assert [(one.kind, one.value) for one in report.findings] == [("experts_without_update", 3)]
    single = {
        f"{experts.format(layer)}.{expert}.up_proj.{factor}.weight": torch.randn(shape)
        for layer in range(3) for expert in range(4) if (layer, expert) not in ((1, 3), (2, 0))
        for factor, shape in (("lora_A", (RANK, 10)), ("lora_B", (24, RANK)))
    }  # fmt: skip
    report = adapterkit.inspect(make_adapter(single, "single", r=RANK))
    assert isinstance(report, AdapterReport)
    [finding] = report.findings
    lacking = tuple(f"{experts.format(layer)}.{expert}.up_proj" for layer, expert in ((1, 3), (2, 0)))
    assert finding.kind == "experts_without_update" and finding.value == 2 and finding.modules == lacking
