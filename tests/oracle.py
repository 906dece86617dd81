"""The expected result of a merge, computed densely in float64 from the papers' formulas, without code of adapterkit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # half an ulp, relative to 2^e
SMALLEST = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}  # the exponent where denormals begin
FP32 = 2.0**-24


@dataclass
class Expected:
    """The exact merged weight, and a bound on the error of float32 arithmetic before the final rounding."""

    exact: torch.Tensor
    slack: torch.Tensor


def merged(
    base: dict[str, torch.Tensor], adapter: Path, weight: float = 1.0, conv1d: bool = False
) -> dict[str, Expected]:
    """Return the tensors of `base` changed by the PEFT adapter in the directory `adapter`; `conv1d`: stored (in, out)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        k.removeprefix("base_model.model."): v for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    result: dict[str, Expected] = {}
    replaced = {k.replace(".base_layer", ""): v for k, v in tensors.items() if "lora_" not in k}
    for name, value in replaced.items():
        exact = base[name].double() + weight * (value.double() - base[name].double())
        result[name] = Expected(exact, FP32 * exact.abs())
    for key in tensors:
        found = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_embedding_A)", key)
        if not found:
            continue
        module, embedding = found[1], found[2] == "lora_embedding_A"
        a = tensors[key].double()
        b = tensors[key.replace("_A", "_B")].double()
        magnitude = tensors.get(f"{module}.lora_magnitude_vector")
        name = f"{module}.weight"
        W = replaced.get(name, base[name]).double()
        result[name] = _lora(W, a, b, scaling_of(config, module, a.shape[0]), magnitude, weight, embedding or conv1d)
    return result


def scaling_of(config: dict, module: str, rank: int) -> float:
    """Return alpha / r, or alpha / √r with rsLoRA; the first matching alpha_pattern wins."""
    alpha = config["lora_alpha"]
    for pattern, value in config["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def _lora(
    W: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: float, m: torch.Tensor | None, weight: float, transposed: bool
) -> Expected:
    """Return W + s·BA, or with a magnitude diag(m / ‖V‖)·V for V = W + s·BA (arXiv 2106.09685, 2402.09353)."""
    shape, rank = W.shape, a.shape[0]
    A, B = a.reshape(rank, -1), b.reshape(b.shape[0], -1)
    delta = s * (B @ A)
    # |fl(BA) − BA| ≤ γ_r·‖B_i‖·‖A_:j‖ (Cauchy–Schwarz on the standard bound)
    gamma = rank * FP32 / (1 - rank * FP32)
    slack = abs(weight) * gamma * abs(s) * B.norm(dim=1)[:, None] * A.norm(dim=0)[None, :]
    M = W.T if transposed else W.reshape(W.shape[0], -1)
    V = M + delta
    if m is not None:
        gain = (m.double().reshape(-1) / V.norm(dim=1))[:, None]
        exact, slack = M + weight * (gain * V - M), slack * gain.abs()
        slack = slack + 3 * FP32 * exact.abs()  # the gain's own rounding, and the product's
    else:
        exact = M + weight * delta
    slack = slack + FP32 * exact.abs()  # the sum W + Δ itself is rounded to float32 before it is rounded to bf16
    exact, slack = (exact.T, slack.T) if transposed else (exact, slack)
    return Expected(exact.reshape(shape).contiguous(), slack.reshape(shape).contiguous())


def half_ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half the distance between the neighbours of `exact` in `dtype`."""
    exponent = torch.frexp(exact.abs())[1] - 1  # |x| in [2^e, 2^(e+1))
    return torch.ldexp(torch.full_like(exact, UNIT[dtype]), exponent.clamp(min=SMALLEST[dtype]))


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `exact` rounded once, half to even; torch itself rounds float64 to bfloat16 through float32."""
    ulp = 2 * half_ulp(exact, dtype)
    return (torch.round(exact / ulp) * ulp).to(dtype)


def check(actual: torch.Tensor, expected: Expected) -> int:
    """Assert the bound for every element; returns the number of elements that are not correctly rounded."""
    error = (actual.double() - expected.exact).abs()
    limit = half_ulp(expected.exact, actual.dtype) + expected.slack
    worst = (error - limit).max()
    assert worst <= 0, f"{int((error > limit).sum())} elements beyond the bound, by up to {float(worst):.3g}"
    return int((actual != rounded(expected.exact, actual.dtype)).sum())
