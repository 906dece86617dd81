"""Modules that are one expert each, in bases that stack experts: compared with PEFT, and with float64 matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import factors
from matrix.models import Model
from peft import PeftModel
from safetensors.torch import load_file

import adapterkit
from adapterkit.errors import FitError

Make = Callable[..., Path]

# The modules of transformers 4, by model type: per layer, with output and input widths; and the target_modules.
TRAINED = {
    "mixtral": (
        {
            "self_attn.q_proj": (32, 32),
            "block_sparse_moe.gate": (4, 32),
            **{f"block_sparse_moe.experts.{e}.{part}": (48, 32) for e in range(4) for part in ("w1", "w3")},
            **{f"block_sparse_moe.experts.{e}.w2": (32, 48) for e in range(4)},
        },
        ["q_proj", "gate", "w1", "w2", "w3"],
    ),
    "qwen3_moe": (
        {
            "mlp.gate": (4, 32),
            **{f"mlp.experts.{e}.{part}": (24, 32) for e in range(4) for part in ("gate_proj", "up_proj")},
            **{f"mlp.experts.{e}.down_proj": (32, 24) for e in range(4)},
        },
        ["gate", "gate_proj", "up_proj", "down_proj"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stacked", [False, True], ids=["a tensor per expert", "stacked"])
@pytest.mark.parametrize("name", TRAINED)
def test_adapters_of_transformers_4_fit_bases_of_5(
    name: str, stacked: bool, make_adapter: Make, tmp_path: Path
) -> None:
    """As PEFT computes them, which converts the adapter when it loads it; bases saved in both formats."""
    model, (modules, targets) = Model("causal", name), TRAINED[name]
    made, base = model.make(), tmp_path / "base"
    made.save_pretrained(base, save_original_format=not stacked)
    tensors = {}
    for layer in range(2):
        for module, (out, width) in modules.items():
            tensors |= factors(f"model.layers.{layer}.{module}", out, width)
    how = {"target_modules": targets, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y"}
    adapter = make_adapter({key: tensor * 0.3 for key, tensor in tensors.items()}, **how)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    expected = model.logits(PeftModel.from_pretrained(made, adapter).eval())
    merged = model.logits(model.cls.from_pretrained(tmp_path / "out").eval())
    assert (merged - expected).norm() < 1e-5 * expected.norm()
    adapterkit.unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("model", "stack", "module", "rows", "transposed"),
    [
        ("mixtral", (4, 12, 5), "2.w1", (0, 6), False),
        ("mixtral", (4, 12, 5), "2.w3", (6, 12), False),
        ("qwen3_moe", (4, 12, 6), "3.up_proj", (6, 12), False),  # square
        ("gpt_oss", (4, 5, 12), "gate_up_projs.1", (0, 5), True),
        ("gpt_oss", (4, 6, 6), "gate_up_projs.1", (0, 6), True),
        ("qwen3_vl_moe", (4, 5, 12), "gate_up_projs.1", (0, 5), True),  # as published
        ("strange", (4, 12, 5), "gate_up_projs.1", (0, 12), False),
    ],
)
def test_a_module_changes_its_rows_of_its_expert(
    model: str, stack: tuple[int, ...], module: str, rows: tuple[int, int], transposed: bool,
    make_base: Make, make_adapter: Make, tmp_path: Path,
) -> None:  # fmt: skip
    W, number = torch.randn(*stack), next(int(part) for part in module.split(".") if part.isdecimal())
    out, width = (stack[2], stack[1]) if transposed else (rows[1] - rows[0], stack[2])
    parts = factors(f"{EXPERTS}.{module}", out, width)
    base = make_base({f"{EXPERTS}.gate_up_proj": W}, {"model_type": model})
    adapterkit.merge(base, [make_adapter(parts)], tmp_path / "out")
    expected = W.double()
    A, B = (parts[f"{EXPERTS}.{module}.lora_{role}.weight"].double() for role in "AB")
    expected[number, slice(*rows)] += 1.5 * ((B @ A).mT if transposed else B @ A)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{EXPERTS}.gate_up_proj"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([found[:number], found[number + 1 :]]), torch.cat([W[:number], W[number + 1 :]]))


@pytest.mark.parametrize(
    ("model", "stack", "module", "error"),
    [
        ("mixtral", (4, 12, 6), "4.w1", "the base has 4 experts"),
        ("mixtral", (4, 14, 6), "2.w1", "which has other shapes"),
        ("gpt_oss", (4, 6, 12), "2.gate_proj", "of which parts are not supported"),
        ("strange", (4, 6, 6), "gate_up_projs.1", "unknown whether .* stores"),
    ],
)
def test_what_fits_no_stack_is_refused(
    model: str, stack: tuple[int, ...], module: str, error: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"{EXPERTS}.gate_up_proj": torch.randn(*stack)}, {"model_type": model})
    with pytest.raises(FitError, match=error):
        adapterkit.plan_merge(base, [make_adapter(factors(f"{EXPERTS}.{module}", 6, 6))], tmp_path / "out")


def test_dora_of_an_expert_that_is_stored_transposed_is_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"{EXPERTS}.down_proj": torch.randn(4, 5, 12)}, {"model_type": "llama4_text"})
    parts = factors(f"{EXPERTS}.2.down_proj", 12, 5)
    parts[f"{EXPERTS}.2.down_proj.lora_magnitude_vector"] = torch.ones(12)
    with pytest.raises(FitError, match="DoRA of an expert"):
        adapterkit.plan_merge(base, [make_adapter(parts, use_dora=True)], tmp_path / "out")
