"""Verifying merges that other tools make, in each dtype, and the same merges with small faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_verify import MakeAdapter, MakeBase, changed, kinds, verdicts

import adapterkit
from adapterkit.merging.verdict import Verdict

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OUT, IN, RANK, S = 64, 96, 8, 1.5  # the scaling is no power of two: a tool that rounds around it rounds twice
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # W, A, B, m


def case(dtype: torch.dtype, factors: torch.dtype, dora: bool = False, out: int = OUT) -> Case:
    """A weight with some zeros, as dequantization from 4 bits leaves them, and an update of a tenth of its size."""
    W = (torch.randn(out, IN) * 0.05).masked_fill_(torch.rand(out, IN) < 0.05, 0.0).to(dtype)
    A, B = (torch.randn(RANK, IN) * 0.03).to(factors), (torch.randn(out, RANK) * 0.03).to(factors)
    norms = (W.double() + S * B.double() @ A.double()).norm(dim=1)
    return W, A, B, (norms * (0.9 + 0.2 * torch.rand(out))).to(factors) if dora else None


def peft(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor | None, **how: bool) -> torch.Tensor:
    """PEFT's own merge; without `autocast` it computes in the dtype of the base."""
    return merged_by_peft(W, [(A, B, m)], **how)


def merged_by_peft(
    W: torch.Tensor, adapters: Iterable[tuple[torch.Tensor, ...]], safe: bool = False, autocast: bool = True
) -> torch.Tensor:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(IN, len(W), bias=False))
    model[0].weight = torch.nn.Parameter(W.clone())
    names = []
    for A, B, m in adapters:
        config = LoraConfig(r=RANK, lora_alpha=S * RANK, target_modules=["0"], use_dora=m is not None)
        names.append(f"a{len(names)}")
        if len(names) == 1:
            model = get_peft_model(model, config, names[0], autocast_adapter_dtype=autocast)
        else:
            model.add_adapter(names[-1], config)
        layer = model.base_model.model[0]
        at = {"lora_A": A, "lora_B": B} | ({"lora_magnitude_vector": m} if m is not None else {})
        for part, values in at.items():
            weight = getattr(layer, part)[names[-1]].weight
            weight.data = values.to(weight.dtype if autocast else W.dtype)
    return model.merge_and_unload(safe_merge=safe, adapter_names=names)[0].weight.detach()


def unsloth(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    """`_merge_lora` of unsloth_zoo.saving_utils: everything in float32."""
    V = torch.addmm(W.float(), B.float(), A.float(), alpha=S)
    return (V if m is None else (m.float() / torch.linalg.norm(V, dim=1).clamp_min(1e-9)).unsqueeze(1) * V).to(W.dtype)


def axolotl(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    """`_merge_tensor_with_lora` of axolotl.cli: Δ in the adapter's dtype, that of a DoRA as `W' − W` in the base's."""
    delta = (B.float() @ A.float() * S).to(A.dtype) if m is None else peft(W, A, B, m) - W
    return (W.float() + delta.float()).to(W.dtype)


def cuda(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    """PEFT on a GPU: a product of 16-bit factors is rounded before it is scaled, and after."""
    delta = ((B.float() @ A.float()).to(A.dtype).float() * S).to(A.dtype)
    return (W.float() + delta.float()).to(W.dtype) if m is None else peft(W, A, B, m)


TOOLS: dict[str, Callable[..., torch.Tensor]] = {
    "PEFT": peft,
    "PEFT, safe_merge": lambda *parts: peft(*parts, safe=True),
    "PEFT in the base's dtype": lambda *parts: peft(*parts, autocast=False),
    "PEFT in the base's dtype, safe_merge": lambda *parts: peft(*parts, safe=True, autocast=False),
    "PEFT on a GPU": cuda,
    "axolotl": axolotl,
    "Unsloth": unsloth,
}


@pytest.fixture
def verified(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> Callable[..., dict[str, Verdict]]:
    """Verify tensors found in a merge, one for each label; their cases are bases with one adapter, or several."""

    def verify(found: dict[str, torch.Tensor], *cases: Case) -> dict[str, Verdict]:
        at = {label: f"model.layers.{i}.q" for i, label in enumerate(found)}
        base = make_base({f"{name}.weight": cases[0][0].clone() for name in at.values()})
        adapters = []
        for _, A, B, m in cases:
            parts = {"lora_A.weight": A, "lora_B.weight": B} | ({"lora_magnitude_vector": m} if m is not None else {})
            tensors = {f"{name}.{part}": value.clone() for name in at.values() for part, value in parts.items()}
            adapters.append(
                make_adapter(tensors, f"adapter{len(adapters)}", r=RANK, lora_alpha=S * RANK, use_dora=m is not None)
            )
        out = tmp_path / "out"
        out.mkdir()
        save_file(
            {f"{at[label]}.weight": value.contiguous() for label, value in found.items()}, out / "model.safetensors"
        )
        verdict = verdicts(out, base, *adapters)
        return {label: verdict[f"{name}.weight"] for label, name in at.items()}

    return verify


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("factors", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_merges_of_every_tool_pass(
    verified: Callable[..., dict[str, Verdict]], dtype: torch.dtype, factors: torch.dtype, dora: bool
) -> None:
    parts = case(dtype, factors, dora)
    found = verified({name: tool(*parts) for name, tool in TOOLS.items()}, parts)
    assert {name: verdict for name, verdict in found.items() if not verdict.fits} == {}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_small_faults_in_a_merge_by_peft_are_found(
    verified: Callable[..., dict[str, Verdict]], dtype: torch.dtype
) -> None:
    W, A, B, m = parts = case(dtype, FP32, out=IN)  # square, so that Δᵀ has its shape

    def merge(by: float = 1.0, rank: int = RANK) -> torch.Tensor:
        return peft(W, A[:rank] * by if rank == RANK else torch.cat([A[:rank], A[rank:] * 0]), B, m)

    def changed(change: Callable[[torch.Tensor], object]) -> torch.Tensor:
        change(found := merge())
        return found

    def step(rows: torch.Tensor) -> None:
        rows.view(torch.int16).add_(1)

    faults = {
        "Δ × 1.01": merge(1.01),
        "Δ × 0.99": merge(0.99),
        "Δ × 2": merge(2.0),
        "a rank missing": merge(rank=RANK - 1),
        "Δᵀ": (W.float() + S * (B @ A).T).to(dtype),
        "Δ missing in a row": changed(lambda found: found[5].copy_(W[5])),
        "Δ missing in a sixth of the rows": changed(lambda found: found[16:32].copy_(W[16:32])),
        "two rows swapped": changed(lambda found: found[[4, 5]].copy_(found[[5, 4]])),
        "an element off by 2%": changed(lambda found: found[7, found[7].abs().argmax()].mul_(1.02)),
        "W alone": W,
    }
    faults["two rows swapped"][[4, 5]] = merge()[[5, 4]]
    if dtype != FP32:
        faults["a row off by one unit"] = changed(lambda found: step(found[9]))
    found = verified(faults | {"nothing": merge()}, parts)
    assert [name for name, verdict in found.items() if verdict.fits] == ["nothing"]
    assert {found[name].kind for name in ("Δ × 1.01", "Δ × 0.99", "Δ × 2")} == {"scaled"}
    assert found["Δ × 1.01"].scales[0][1] == pytest.approx(1.01, abs=0.004)
    assert found["an element off by 2%"].kind == "damaged" and found["an element off by 2%"].mismatched == 1
    assert found["W alone"].kind == "missing"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_bound_on_cancelling_products_is_tight(
    verified: Callable[..., dict[str, Verdict]], dtype: torch.dtype
) -> None:
    """W = 0, and terms up to 1 that cancel to 1e-10: any order of summation passes, a larger error does not."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(RANK, IN, generator=generator)
    B = torch.randn(OUT, RANK, generator=generator)
    A[1::2], B[:, 1::2] = -A[::2], B[:, ::2] * (1 + torch.randn(OUT, RANK // 2, generator=generator) * 1e-7)
    order = torch.randperm(RANK, generator=generator)
    terms = B.T[:, :, None] * A[:, None] * S  # (rank, out, in), in float32
    exact = (B.double() @ A.double()) * S
    size = (B.abs().double() @ A.abs().double()) * S * (RANK + 2) * 2**-24
    orders = {
        "first to last": [*range(RANK)], "last to first": [*reversed(range(RANK))], "shuffled": order.tolist(),
        "even, then odd": [*range(0, RANK, 2), *range(1, RANK, 2)],
    }  # fmt: skip
    found = {name: sum((terms[k] for k in by), torch.zeros(OUT, IN)).to(dtype) for name, by in orders.items()}
    beyond = exact.clone()
    beyond[3, 4] += 1.5 * size[3, 4] + 2 * exact[3, 4].abs() * torch.finfo(dtype).eps
    inside = exact + 0.95 * size * (torch.rand(OUT, IN, generator=generator).double() * 2 - 1)
    parts = torch.zeros(OUT, IN, dtype=dtype), A, B, None
    verdict = verified(found | {"inside": inside.to(dtype), "beyond": beyond.to(dtype)}, parts)
    assert [name for name, one in verdict.items() if not one.fits] == ["beyond"]
    assert verdict["beyond"].mismatched == 1 and verdict["beyond"].first_mismatch.startswith("[3, 4]")


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_base_read_in_the_dtype_of_the_output_passes(
    verified: Callable[..., dict[str, Verdict]], dtype: torch.dtype
) -> None:
    W, A, B, _ = parts = case(FP32, FP32)
    found = {
        "base": peft(W.to(dtype), A, B, None), "base and factors": peft(W.to(dtype), A, B, None, autocast=False),
        "rounded and stored in fp32": peft(W.to(dtype), A, B, None).float(),
    }  # fmt: skip
    verdict = verified(found | {"one unit off": (found["base"].view(torch.int16) + 1).view(dtype)}, parts)
    assert [name for name, one in verdict.items() if not one.fits] == ["one unit off"]
    assert "base" in verdict["base"].explanation and verdict["base"].kind == "rounded"


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_adapters_merged_one_after_another_pass(
    verified: Callable[..., dict[str, Verdict]], dtype: torch.dtype
) -> None:
    first, second, third = case(dtype, FP32), case(dtype, FP32), case(dtype, FP32)
    cases = [first, (first[0], *second[1:]), (first[0], *third[1:])]
    found = {
        "in turn": merged_by_peft(first[0], [parts[1:] for parts in cases]),
        "one of them twice": merged_by_peft(first[0], [parts[1:] for parts in (*cases, third)]),
        "without one": merged_by_peft(first[0], [parts[1:] for parts in cases[:2]]),
    }
    verdict = verified(found, *cases)
    assert [name for name, one in verdict.items() if one.fits] == ["in turn"]
    assert dict(verdict["one of them twice"].scales)["adapter2"] == pytest.approx(2, abs=sqrt(1e-3))
    assert kinds(verdict) <= {"exact", "rounded", "scaled"}


def test_an_expert_without_its_update_is_found(make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    name, experts = "model.layers.0.mlp.experts.gate_up_proj", 16
    base = make_base(
        {name: torch.randn(experts, 24, 10).bfloat16()}, {"model_type": "qwen3_moe", "num_experts": experts}
    )
    parts = {"lora_A.weight": torch.randn(2 * experts, 10) * 0.1, "lora_B.weight": torch.randn(24, 2 * experts) * 0.1}
    tensors = {f"model.layers.0.mlp.experts.{part}": value for part, value in parts.items()}
    adapter = make_adapter(tensors, r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    merged = adapterkit.merge(base, [adapter], tmp_path / "whole").out
    assert kinds(verdicts(merged, base, adapter)) == {"exact"}
    before = load_file(base / "model.safetensors")[name]
    out = changed(merged, tmp_path / "out", lambda found: found[name][11].copy_(before[11]))
    assert kinds(verdicts(out, base, adapter)) == {"different"}


def test_a_merge_in_fp16_written_in_bf16_passes(verified: Callable[..., dict[str, Verdict]]) -> None:
    """As mergekit writes it with --lora-merge-dtype float16."""
    W, A, B, _ = parts = case(BF16, FP32)
    through = peft(W.to(FP16), A, B, None).to(BF16)
    found = verified({"through fp16": through, "one unit off": (through.view(torch.int16) + 1).view(BF16)}, parts)
    assert [name for name, verdict in found.items() if not verdict.fits] == ["one unit off"]


def test_updates_whose_rounding_rarely_shows_pass(verified: Callable[..., dict[str, Verdict]]) -> None:
    """Small updates from bf16 factors in fp32: the rounding of Δ is near the last place of W."""
    W, A, B, _ = case(FP32, BF16)
    W, A, B = W * 160, A / 30, B / 30
    found = verified({"axolotl": axolotl(W, A, B, None), "Δ × 1.05": axolotl(W, A * 1.05, B, None)}, (W, A, B, None))
    assert [name for name, verdict in found.items() if not verdict.fits] == ["Δ × 1.05"]


def test_a_sum_that_begins_with_the_weight_passes(verified: Callable[..., dict[str, Verdict]]) -> None:
    """As a matrix product of high rank adds up: W and each term in turn, in float32."""
    W, A, B, _ = case(FP32, FP32)
    W = W * 100
    in_turn = W.clone()
    for k in range(RANK):
        in_turn += B[:, [k]] * A[[k]] * S
    found = verified({"in turn": in_turn, "off": in_turn * (1 + 1e-5)}, (W, A, B, None))
    assert [name for name, verdict in found.items() if not verdict.fits] == ["off"]
