"""The kernels for a GPU, compared with exact sums; without a GPU, Triton's interpreter runs them if it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from adapterkit.algebra.rounding import round_once
from adapterkit.kernels import gpu

SHAPES = [(1, 1, 1), (24, 40, 4), (64, 128, 16), (65, 129, 17), (130, 257, 33)]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("way", ["torch", "triton", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_an_update_is_added_in_float32_and_rounded_once(
    m: int, n: int, rank: int, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(gpu, "triton", None)
    elif way == "triton" and (gpu.triton is None or torch.cuda.is_available()):
        pytest.skip("needs triton, and no GPU")
    device = "cuda" if way == "cuda" else "cpu"
    larger = torch.randn(m + 2, n).to(dtype).to(device)  # rows beside it stay
    before, left, right = larger.clone(), torch.randn(m, rank).to(device), torch.randn(rank, n).to(device)
    gpu.add_in_place(larger[1:-1], left, right, -0.37)
    assert torch.equal(larger[:: m + 1], before[:: m + 1])
    exact = torch.addmm(before[1:-1].double(), left.double(), right.double(), alpha=-0.37)
    size = before[1:-1].double().abs() + 0.37 * left.double().abs() @ right.double().abs()
    off, half_ulp = (larger[1:-1].double() - exact).abs(), exact.abs() * torch.finfo(dtype).eps / 2
    slack: Any = (rank + 2) * 2.0**-24 * size + (dtype is torch.float16) * 2.0**-25
    if way == "triton" and dtype is torch.bfloat16:
        half_ulp *= 2  # the interpreter truncates to bf16
    assert bool((off <= half_ulp + slack).all())
    if way != "triton":
        assert float((larger[1:-1] != round_once(exact, dtype)).double().mean()) < 2e-3


def test_the_kernel_compiles_for_gpus() -> None:
    """Which the interpreter does not show: it takes annotations, for example, that the compiler does not."""
    pytest.importorskip("triton", reason="triton comes with torch for CUDA")
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from adapterkit.kernels.gpu import DEPTH, TILE, _add

kinds = ["*bf16", "*fp32", "*fp32", "fp32", "i32", "i32", "i32", *3 * ["constexpr"]]
source = ASTSource(_add, dict(zip(_add.arg_names, kinds)), {(7,): TILE[0], (8,): TILE[1], (9,): DEPTH})
for capability in (80, 90):
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True)
