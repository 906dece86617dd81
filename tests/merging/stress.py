"""Merge and undo 200 adversarial inputs, and a real model, through files: `pytest -s tests/merging/stress.py`.

It takes minutes, so pytest finds it only by this name. STRESS_RUNS and STRESS_ROWS shorten it.
"""

from __future__ import annotations

import os
from pathlib import Path

import adversarial
import pytest
import torch
from safetensors.torch import load_file
from test_device import StandIn, cuda
from test_unmerge import Make, contents, hashes, same

import adapterkit

__all__ = ["cuda"]  # a fixture
RUNS = int(os.environ.get("STRESS_RUNS", "200"))
ROWS = int(os.environ.get("STRESS_ROWS", "50000"))


@pytest.mark.parametrize("run", range(RUNS))
def test_hardest_sums(run: int, cuda: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case in turn, each time with other numbers, arithmetic and devices."""
    name = adversarial.CASES[run % len(adversarial.CASES)]
    case = adversarial.write(name, tmp_path, ROWS, 1000 * run)
    devices = ("cpu", "cuda") if run // len(adversarial.CASES) % 2 else ("cuda", "cpu")
    adapterkit.merge(case.base, case.adapters, tmp_path / "merged", device=devices[0], **case.how)
    adversarial.undo_by(list(adversarial.ARITHMETIC.values())[run % len(adversarial.ARITHMETIC)], monkeypatch)
    result = adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=case.adapters, device=devices[1])
    assert same(case.base, tmp_path / "again") and result.hashes.outputs == hashes(case.base)
    sizes = [sum(map(len, filter(None, contents(folder).values()))) for folder in (case.base, tmp_path / "merged")]
    print(f"\n{name}: {4 * ROWS:,} sums restored; receipt {sizes[1] - sizes[0]:,} bytes for {sizes[0]:,}", end="")


@pytest.mark.base
@pytest.mark.parametrize(
    ("count", "size", "seed"),
    [(2, 0.01, 1), (2, 0.05, 2), (3, 0.05, 0), *((count, size, 9) for count in (2, 3) for size in (0.02, 0.1))],
)
def test_smollm2_with_random_adapters(
    count: int, size: float, seed: int, smollm2: Path, make_adapter: Make, tmp_path: Path
) -> None:
    """Rank 16, on every linear layer. In the first three settling a midpoint takes one weight to its nearer boundary."""
    torch.manual_seed(seed)
    adapters: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, W in load_file(smollm2 / "model.safetensors").items():
        for parts in adapters if "_proj" in name else ():
            module = name.removesuffix(".weight")
            parts[f"{module}.lora_B.weight"] = torch.randn(W.shape[0], 16) * size
            parts[f"{module}.lora_A.weight"] = torch.randn(16, W.shape[1]) * size
    given = [make_adapter(parts, f"random-{at}", r=16, lora_alpha=32) for at, parts in enumerate(adapters)]
    adapterkit.merge(smollm2, given, tmp_path / "merged")
    result = adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=given)
    assert result.hashes.outputs == hashes(tmp_path / "again") == hashes(smollm2) != hashes(tmp_path / "merged")
