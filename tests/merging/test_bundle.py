"""Small tensors merged in bundles: bit for bit what each of them is when it is merged by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import adversarial
import pytest
import torch
from handmade import contents, packed

import adapterkit
from adapterkit import MergePlan, RunOptions
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TORCH_NAMES
from adapterkit.merging.run import pieces
from adapterkit.merging.run.run import Merged, TensorMerged, run, run_file

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
NAMES = {getattr(torch, name): key for key, name in TORCH_NAMES.items()}


def write_base(folder: Path, tensors: Tensors, config: dict[str, object] | None = None) -> Path:
    """A checkpoint of one file, whose tensors lie in the order given: `save_file` would sort them by dtype."""
    folder.mkdir()
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        spot = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spot}
        data += raw
    (folder / "model.safetensors").write_bytes(packed(header, data))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


class Crowd:
    """A base of many small tensors, and three adapters: one on all, others on some of the same, one of them DoRA."""

    def __init__(self) -> None:
        self.base: Tensors = {}
        self.adapters: tuple[Tensors, Tensors, Tensors] = ({}, {}, {})

    def add(self, W: torch.Tensor, *updates: adversarial.Factors, leaf: str = "m") -> str:
        name = f"layers.{len(self.base)}.{leaf}"
        self.base[f"{name}.weight"] = W
        for adapter, (B, A) in zip(self.adapters, updates, strict=False):
            adapter |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        return name

    def midpoints(self, rows: int, dtype: torch.dtype = LOW, parts: int = 1) -> None:
        """Weights all of whose sums lie on a midpoint or next to it."""
        W, updates = adversarial.plain(rows, dtype, len(self.base), parts)
        self.add(W, *updates)

    def random(self, rows: int, columns: int, rank: int = 4) -> str:
        return self.add(torch.randn(rows, columns).bfloat16(), (torch.randn(rows, rank), torch.randn(rank, columns)))


def crowd() -> Crowd:
    """Neighbours of every kind."""
    found = Crowd()
    for rows in (8, 8, 8, 33, 33, 7, 8):
        found.midpoints(rows)
    found.add(torch.randn(8, 4).bfloat16())  # nothing changes it
    for parts, dtype in ((2, LOW), (2, LOW), (1, LOW), (1, HALF), (1, HALF), (2, HALF), (1, LOW), (1, FULL), (1, LOW)):
        found.midpoints(8, dtype, parts)
    found.base["empty"] = torch.empty(0, 4).bfloat16()
    for rows, columns in ((1, 40), (1, 40), (40, 1), (40, 1), (3, 5), (3, 5), (12, 8), (8, 12)):
        found.random(rows, columns)
    for rank in (2, 4, 9, 2, 9):
        found.random(12, 8, rank)
    for _ in range(2):  # stored transposed
        found.add(torch.randn(12, 8).bfloat16(), (torch.randn(8, 4), torch.randn(4, 12)))
    dora = found.random(12, 8)
    found.adapters[2].update({f"{dora}.lora_A.weight": torch.randn(4, 8), f"{dora}.lora_B.weight": torch.randn(12, 4)})
    found.adapters[2][f"{dora}.lora_magnitude_vector"] = torch.rand(12)
    for odd in (torch.nan, torch.inf, -0.0, 1e-40):
        W = torch.randn(12, 8).bfloat16()
        W[3, 2:5] = odd
        found.add(W, (torch.randn(12, 4), torch.randn(4, 8)))
    zeros = torch.zeros(8, 4).half()
    found.add(zeros, (torch.randn(8, 4) * 1e-9, torch.randn(4, 4)))
    found.add(torch.randn(12, 8).bfloat16(), (torch.zeros(12, 4), torch.randn(4, 8)))  # an update of zero
    for _ in range(6):  # four are a bundle, and a chunk of them would end within one of them
        found.random(10, 1500)
    for rows in (128, 129, 128, 128, 128, 128, 128):  # the largest that is bundled, one that is not, a full bundle
        found.random(rows, 128)
    name = found.add(torch.randn(24, 8).bfloat16(), leaf="qkv_proj").removesuffix("qkv_proj")
    for leaf in "qkv":
        found.adapters[0].update({f"{name}{leaf}_proj.lora_A.weight": torch.randn(4, 8),
                                  f"{name}{leaf}_proj.lora_B.weight": torch.randn(8, 4)})  # fmt: skip
    for leaf in "qk":  # alike but for their rows
        name = found.add(torch.randn(24, 8).bfloat16(), leaf="qkv_proj").removesuffix("qkv_proj")
        found.adapters[0].update({f"{name}{leaf}_proj.lora_A.weight": torch.randn(4, 8),
                                  f"{name}{leaf}_proj.lora_B.weight": torch.randn(8, 4)})  # fmt: skip
    for kind, ending in (("", ".weight"), ("embedding_", "")):  # alike, but an embedding's is added transposed
        name = found.add(torch.randn(12, 12).bfloat16())
        found.adapters[0].update({f"{name}.lora_{kind}A{ending}": torch.randn(4, 12),
                                  f"{name}.lora_{kind}B{ending}": torch.randn(12, 4)})  # fmt: skip
    found.base |= {f"fused.{part}_proj.weight": torch.randn(8, 8).bfloat16() for part in ("gate", "up")}
    found.adapters[0].update({"fused.gate_up_proj.lora_A.weight": torch.randn(4, 8),
                              "fused.gate_up_proj.lora_B.weight": torch.randn(16, 4)})  # fmt: skip
    found.add(torch.randn(6, 2, 3, 3).bfloat16(), (torch.randn(6, 4, 1, 1), torch.randn(4, 2, 3, 3)))
    return found


@pytest.fixture
def given(tmp_path: Path, make_adapter: Make) -> tuple[Path, list[tuple[Path, float]]]:
    """The crowd as files, and what is merged into it."""
    found = crowd()
    base = write_base(tmp_path / "base", found.base, {"model_type": "llama"})
    first, second, dora = found.adapters
    ranks = {name.partition(".lora_")[0]: len(A) for name, A in first.items() if "_A" in name}
    adapters = [
        (make_adapter(first, "first", lora_alpha=4, rank_pattern=ranks), 1.0),
        (make_adapter(second, "second", lora_alpha=4), 1.0),
        (make_adapter(dora, "dora", use_dora=True), 0.5),
    ]
    return base, adapters


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have every tensor merged by itself from here on."""
    return lambda: monkeypatch.setattr(pieces, "SMALL_SHARE", 1 << 60)


def sizes(plan: MergePlan, records: bool = True) -> list[int]:
    """How many tensors each bundle of a plan has."""
    found = (piece for file in plan.files for piece in pieces.pieces_of(file, records))
    return [len(piece.works) for piece in found if isinstance(piece, pieces.Bundle)]


def made(plan: MergePlan, options: RunOptions) -> tuple[list[str], Merged]:
    """The tensors that a run tells of, in order, and its result."""
    *events, result = run(plan, options)
    assert isinstance(result, Merged)
    return sorted(event.name for event in events if isinstance(event, TensorMerged)), result


@pytest.mark.parametrize("how", [{}, {"receipt": False}, {"report": True}], ids=str)
def test_bundled_is_as_alone(
    given: tuple[Path, list[tuple[Path, float]]], alone: Callable[[], None], tmp_path: Path, how: dict[str, bool]
) -> None:
    options = RunOptions(threads=1, **how)
    plan = adapterkit.plan_merge(*given, tmp_path / "out")
    assert max(sizes(plan)) >= 7 and sum(sizes(plan)) > 40
    names, bundled = made(plan, options)
    alone()
    plan = adapterkit.plan_merge(*given, tmp_path / "alone")
    assert sizes(plan) == []
    same_names, single = made(plan, options)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert names == same_names and bundled.hashes == single.hashes and bundled.warnings == single.warnings
    assert bundled.retention.keys() == single.retention.keys()
    for name, measured in bundled.retention.items():
        other = single.retention[name]
        assert (measured.dot, measured.delta, measured.residual) == pytest.approx(
            (other.dot, other.delta, other.residual), nan_ok=True
        )


def test_threads_files_and_the_way_back(
    given: tuple[Path, list[tuple[Path, float]]], alone: Callable[[], None], tmp_path: Path
) -> None:
    """Several threads and `run_file` make the same bytes, the sidecar's too; the merge is undone."""
    base, adapters = given
    plan = adapterkit.plan_merge(base, adapters, tmp_path / "out")
    _, result = made(plan, RunOptions(threads=3))
    (tmp_path / "file").mkdir()
    done = run_file(plan, plan.files[0], tmp_path / "file", RunOptions(threads=1))
    assert done.after == result.hashes.outputs["model.safetensors"] and str(done.retention) == str(
        result.retention
    )  # of NaN too
    again = adapterkit.unmerge(tmp_path / "out", tmp_path / "again", adapters=[path for path, _ in adapters])
    assert contents(tmp_path / "again") == contents(base)
    assert again.hashes.outputs == result.hashes.base
    assert all(verdict.fits for verdict in adapterkit.verify(tmp_path / "out", base, adapters))
    alone()
    made(adapterkit.plan_merge(base, adapters, tmp_path / "alone"), RunOptions(threads=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert contents(tmp_path / "file").items() <= contents(tmp_path / "out").items()


def test_experts_and_quantized_neighbours(make_adapter: Make, alone: Callable[[], None], tmp_path: Path) -> None:
    """Stacked factors over a tensor for each expert, experts in one tensor, and FP8 weights between plain ones."""
    base, factors = Tensors(), Tensors()
    for expert in range(4):
        for part, shape in {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}.items():
            base[f"layers.0.mlp.experts.{expert}.{part}.weight"] = torch.randn(shape).bfloat16()
    factors |= {"layers.0.mlp.experts.lora_A.weight": torch.randn(16, 8),
                "layers.0.mlp.experts.lora_B.weight": torch.randn(12, 16)}  # fmt: skip
    for layer in range(1, 10):
        if layer == 9:
            base["layers.6.q_proj.weight_scale_inv"] = torch.rand(1, 1)  # which the output lacks
        W, name = torch.randn(16, 8), f"layers.{layer}.q_proj"
        base[f"{name}.weight"] = W.to(torch.float8_e4m3fn if layer in (3, 6) else LOW)
        if layer == 3:
            base[f"{name}.weight_scale_inv"] = torch.rand(1, 1)
        factors |= {f"{name}.lora_A.weight": torch.randn(4, 8), f"{name}.lora_B.weight": torch.randn(16, 4)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 8]}, "dtype": "bfloat16"}
    given = write_base(tmp_path / "base", base, config)
    adapter = make_adapter(factors, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"])
    plan = adapterkit.plan_merge(given, [adapter], tmp_path / "out")
    assert sizes(plan) == [2, 2, 2, 1]
    made(plan, RunOptions(threads=1))
    alone()
    made(adapterkit.plan_merge(given, [adapter], tmp_path / "alone"), RunOptions(threads=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    adapterkit.unmerge(tmp_path / "out", tmp_path / "again", adapters=[adapter])
    assert contents(tmp_path / "again") == contents(given)


@pytest.mark.parametrize("wrong", ["A", "B", "strength", "sum"])
def test_an_error_names_what_it_names_alone(
    make_adapter: Make, alone: Callable[[], None], tmp_path: Path, wrong: str
) -> None:
    """The fourth of eight neighbours is what cannot be merged."""
    names = [f"layers.{number}.q" for number in range(8)]
    base = write_base(tmp_path / "base", {f"{name}.weight": torch.ones(12, 8).half() for name in names})
    factors = {f"{name}.lora_{side}.weight": torch.ones(shape) for name in names
               for side, shape in (("A", (4, 8)), ("B", (12, 4)))}  # fmt: skip
    if wrong in ("A", "B"):
        factors[f"{names[3]}.lora_{wrong}.weight"][2, 2] = torch.nan
    elif wrong == "strength":
        factors = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    adapter = make_adapter(factors, alpha_pattern={names[3]: 4e8} if wrong in ("strength", "sum") else {})
    weight = 1e32 if wrong == "strength" else 1.0
    said = []
    for _ in range(2):
        with pytest.raises(FitError, match=names[3]) as caught:
            adapterkit.merge(base, [(adapter, weight)], tmp_path / "out", threads=1)
        said.append((str(caught.value), caught.value.hint))
        alone()
    assert said[0] == said[1] and sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
