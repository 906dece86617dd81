"""Merging on a GPU: the same bits as on the CPU, pinned memory released, and fallbacks if memory runs out.

Without a GPU a stand-in replaces CUDA: it computes on the CPU, but keeps its tensors apart, pins, streams and runs out
of memory like a GPU.
Tests that need a real GPU are marked `gpu`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import adversarial
import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from safetensors.torch import save_file
from standin_gpu import NAME, standin
from test_merge import TINY, misrounded

import adapterkit
from adapterkit.base.quant.codebooks import CODES
from adapterkit.base.quant.rounding import ROUNDINGS
from adapterkit.base.quant.schemes import bnb4
from adapterkit.base.quant.schemes.bnb4 import nibbles
from adapterkit.base.quant.schemes.bnb4.quantizer import Quantizer4bit
from adapterkit.errors import UsageError
from adapterkit.merging.blocks import device
from adapterkit.merging.blocks.device import CPU, ComputeDevice
from adapterkit.merging.plan.types import MergePlan

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class StandIn:
    """The part of torch.cuda that adapterkit uses; `pinned` lists registered memory, `events` the events of each thread."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.most_pinned = 0
        self.refuse_to_pin = False
        self.on_stream: dict[int, int] = {}

    def Stream(self, device: torch.device) -> StandIn:
        return self

    def Event(self) -> StandIn:
        return self

    def record(self, stream: object) -> None:
        assert stream is self

    def synchronize(self) -> None:
        """Everything is done at once here."""

    @contextmanager
    def device(self, _: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.on_stream[threading.get_ident()] = self.on_stream.get(threading.get_ident(), 0) + 1
        yield

    def cudart(self) -> StandIn:
        return self

    def cudaHostRegister(self, address: int, size: int, _: int) -> int:
        if self.refuse_to_pin:
            return 2
        assert address % 4096 == 0 and size % 4096 == 0 and address not in self.pinned
        self.pinned[address] = size
        self.most_pinned = max(self.most_pinned, sum(self.pinned.values()))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class StandInPlace(ComputeDevice):
    def buffers(self) -> device.Buffers:
        return device.GpuBuffers(self)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(device, "CUDA", stand_in)
    place = StandInPlace(standin(), device.GPU_CHUNK)
    monkeypatch.setattr(device, "choose", lambda wanted, plan, threads: CPU if wanted == "cpu" else place)
    return stand_in


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def same_output(base: Path, adapter: Path, folder: Path, on: str, **how: Any) -> adapterkit.Merged:
    """Merge on the CPU and `on` a GPU, compare every byte, and return the second result."""
    adapterkit.merge(base, [adapter], folder / "cpu", device="cpu", **how)
    result = adapterkit.merge(base, [adapter], folder / "gpu", device=on, **how)
    assert files(folder / "cpu") == files(folder / "gpu")
    return result


@pytest.fixture
def nf4(tmp_path: Path) -> Callable[..., Path]:
    """A base quantized by adapterkit, with odd sizes."""

    def make(to: str = "nf4", **how: Any) -> Path:
        folder = tmp_path / "dense"
        folder.mkdir()
        shapes = {"layers.0.q": (56, 200), "layers.1.q": (56, 200), "head": (24, 40)}
        save_file(
            {f"{name}.weight": torch.randn(*shape).bfloat16() for name, shape in shapes.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text('{"torch_dtype": "bfloat16"}')
        adapterkit.quantize(folder, tmp_path / to, to=to, device="cpu", **how)
        return tmp_path / to

    return make


# --- with the stand-in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_adapter_has_the_same_bits(name: str, cuda: StandIn, tmp_path: Path) -> None:
    same_output(FIXTURES / "bases" / TINY[name], FIXTURES / name, tmp_path, "cuda", report=True)
    assert cuda.on_stream and cuda.most_pinned and not cuda.pinned


def undone_elsewhere(base: Path, adapter: Path, folder: Path, on: str) -> bool:
    """Whether a GPU undoes a merge of the CPU, and the other way round."""
    for here, there in (("cpu", on), (on, "cpu")):
        adapterkit.merge(base, [adapter], folder / here, device=here)
        adapterkit.unmerge(folder / here, folder / f"{here}-again", adapters=[adapter], device=there)
        if files(folder / f"{here}-again") != files(base):
            return False
    return True


@pytest.mark.parametrize("name", TINY)
def test_cpu_and_gpu_undo_each_others_merges(name: str, cuda: StandIn, tmp_path: Path) -> None:
    assert undone_elsewhere(FIXTURES / "bases" / TINY[name], FIXTURES / name, tmp_path, "cuda")
    assert not cuda.pinned


@pytest.mark.parametrize("name", adversarial.CASES[::3])
def test_adversarial_sums_are_undone_on_the_other_device(name: str, cuda: StandIn, tmp_path: Path) -> None:
    case = adversarial.write(name, tmp_path, 3_000, 2)
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        adapterkit.merge(case.base, case.adapters, tmp_path / here, device=here, **case.how)
        adapterkit.unmerge(tmp_path / here, tmp_path / f"{here}-again", adapters=case.adapters, device=there)
        assert files(tmp_path / f"{here}-again") == files(case.base)


def test_cpu_and_gpu_restore_each_others_four_bit_bases(
    cuda: StandIn, nf4: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(factors("layers.0.q", 56, 200) | factors("layers.1.q", 56, 200))
    assert undone_elsewhere(nf4(nested=True), adapter, tmp_path, "cuda")


@pytest.mark.parametrize(
    "how", [{}, *({"quantize": "same", "rounding": how, "accept_loss": True} for how in ROUNDINGS)]
)
def test_quantized_bases_have_the_same_bits(
    cuda: StandIn, nf4: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    adapter = make_adapter(factors("layers.0.q", 56, 200) | factors("layers.1.q", 56, 200))
    same_output(nf4(nested=True), adapter, tmp_path, "cuda", **how)
    assert not cuda.pinned


@pytest.mark.parametrize("rows", [1, 7, 10])
def test_small_blocks_and_many_workers(
    cuda: StandIn, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, rows: int,
) -> None:  # fmt: skip
    from adapterkit.merging.run import pieces

    monkeypatch.setattr(pieces, "BLOCK_BYTES", rows * 2 * 40)
    base = make_base({f"layers.{i}.q.weight": torch.randn(24, 40).bfloat16() for i in range(6)}, shards=2)
    adapter = make_adapter({k: t for i in range(6) for k, t in factors(f"layers.{i}.q", 24, 40).items()})
    same_output(base, adapter, tmp_path, "cuda", threads=5)


def test_memory_that_cannot_be_pinned_is_used_unpinned(cuda: StandIn, tmp_path: Path) -> None:
    cuda.refuse_to_pin = True
    same_output(FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-patterns", tmp_path, "cuda")
    assert not cuda.most_pinned


def test_a_failure_leaves_nothing_pinned(
    cuda: StandIn, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"q.weight": torch.full((24, 40), 6e4).half()})
    adapter = make_adapter({k: t * 1e4 for k, t in factors("q", 24, 40).items()})
    with pytest.raises(adapterkit.errors.FitError, match="exceeds 65504"):
        adapterkit.merge(base, [adapter], tmp_path / "out", device="cuda")
    assert cuda.most_pinned and not cuda.pinned and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("chunk", "said"), [(device.MIN_GPU_CHUNK, ["elements at a time"] * 4), (0, ["at a time"] * 4 + ["the CPU"])]
)
def test_running_out_of_memory_halves_chunks_then_falls_back_to_the_cpu(
    cuda: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, said: list[str]
) -> None:
    """The stand-in has memory for `chunk` elements at most."""

    def output(self: device.GpuBuffers, into: memoryview, dtype: torch.dtype) -> torch.Tensor:
        if self.place.chunk > chunk:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return torch.frombuffer(into, dtype=dtype)

    monkeypatch.setattr(device.GpuBuffers, "output", output)
    result = same_output(FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-patterns", tmp_path, "cuda", threads=3)
    assert len(result.notes) == len(said) and all(a in b for a, b in zip(said, result.notes, strict=True))
    assert result.place == ("the CPU" if not chunk else f"{NAME}:0, {chunk:,} elements at a time")
    assert not cuda.pinned


def test_quantizing_continues_where_memory_ran_out(
    cuda: StandIn, nf4: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales computed before are reused."""
    from adapterkit.merging.run import pieces

    calls = 0
    packed = Quantizer4bit.pack

    def pack(self: Quantizer4bit, rows: torch.Tensor, first: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return packed(self, rows, first)

    monkeypatch.setattr(pieces, "BLOCK_BYTES", 8 * 200 * 2)
    nf4(nested=True)
    monkeypatch.setattr(Quantizer4bit, "pack", pack)
    result = adapterkit.quantize(tmp_path / "dense", tmp_path / "again", to="nf4", nested=True, device="cuda")
    assert calls > 4 and len(result.notes) == 1
    assert files(tmp_path / "again") == files(tmp_path / "nf4")


def test_other_errors_are_not_mistaken_for_out_of_memory(
    cuda: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device.GpuBuffers, "output", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        adapterkit.merge(
            FIXTURES / "bases" / "tiny-llama", [FIXTURES / "tiny-patterns"], tmp_path / "out", device="cuda"
        )
    assert not cuda.pinned and not (tmp_path / "out").exists()


# --- which device ----------------------------------------------------------------------------------------------------


def plan_for(tmp_path: Path) -> MergePlan:
    return adapterkit.plan_merge(FIXTURES / "bases" / "tiny-llama", [FIXTURES / "tiny-patterns"], tmp_path / "out")


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_unknown_devices_are_named(wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        adapterkit.merge(FIXTURES / "bases" / "tiny-llama", [FIXTURES / "tiny-patterns"], tmp_path / "o", device=wanted)


def test_a_gpu_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    args = ["merge", FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-patterns", "-o", tmp_path / "out"]
    for more in ([], ["--dry-run"]):
        done = run_adapterkit(*args, "--device", "cuda:99", *more)
        assert done.code == 2 and "cuda:99: torch finds" in done.err and not (tmp_path / "out").exists()


def test_auto_uses_a_gpu_only_where_the_cpu_is_slower_than_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_base: Callable[..., Path]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.choose("auto", plan_for(tmp_path), threads=2) == CPU
    base = make_base({"layers.0.q.weight": torch.randn(64, 64).bfloat16()})
    plan = adapterkit.plan_quantize(base, tmp_path / "nf4", to="nf4", rounding="compensated")
    [file] = plan.files
    [edit] = file.edits
    large = replace(plan, files=(replace(file, edits=(replace(edit, shape=(16384, 16384)),) * 8),))
    assert device.choose("auto", large, threads=2) == ComputeDevice(torch.device("cuda", 0), device.GPU_CHUNK)
    assert device.choose("cpu", large, threads=2) == CPU
    assert device.choose("cuda:0", plan, threads=2).device == torch.device("cuda", 0)


def test_products_are_exact_and_settings_are_restored() -> None:
    settings = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), settings.allow_bf16_reduced_precision_reduction
    try:
        torch.set_float32_matmul_precision("high")
        settings.allow_bf16_reduced_precision_reduction = True
        with pytest.raises(KeyError), device.exact_products():
            assert not settings.allow_tf32 and not settings.allow_bf16_reduced_precision_reduction
            raise KeyError
        assert settings.allow_tf32 and settings.allow_bf16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "high"
        if hasattr(settings, "fp32_precision"):  # torch's newer interface
            torch.set_float32_matmul_precision("highest")
            cpu = torch.backends.mkldnn.matmul
            settings.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
            with device.exact_products():
                assert settings.fp32_precision == cpu.fp32_precision == "ieee"
            assert settings.fp32_precision == "tf32" and cpu.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before[0])
        settings.allow_bf16_reduced_precision_reduction = before[1]


@pytest.mark.parametrize("kind", bnb4.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bitsandbytes_operation_gets_valid_arguments(kind: str, dtype: torch.dtype) -> None:
    """Its CPU implementation stands in for its CUDA kernels, which the same call reaches."""
    if not nibbles.has_kernels():
        pytest.skip("no bitsandbytes here")
    raw, absmax = torch.randint(0, 256, (320,), dtype=torch.uint8), torch.rand(10)
    expected = nibbles.dequantize(raw, absmax, nibbles.pair_table(torch.tensor(CODES[kind])), 64).to(dtype)
    assert torch.equal(nibbles.kernel(raw, absmax, 64, kind, 640, dtype), expected)


# --- the real thing --------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_adapter_is_correctly_rounded_on_a_gpu(name: str, tmp_path: Path) -> None:
    base, out = FIXTURES / "bases" / TINY[name], tmp_path / "out"
    result = adapterkit.merge(base, [FIXTURES / name], out, device="cuda")
    assert result.place.startswith("cuda")
    wrong, _ = misrounded(base, FIXTURES / name, out, conv1d=name == "tiny-conv1d")
    assert wrong == 0


@gpu
@needs_gpu
@pytest.mark.parametrize("name", TINY)
def test_a_real_gpu_and_the_cpu_undo_each_others_merges(name: str, tmp_path: Path) -> None:
    assert undone_elsewhere(FIXTURES / "bases" / TINY[name], FIXTURES / name, tmp_path, "cuda")


@gpu
@needs_gpu
def test_the_cpu_restores_four_bit_bases_merged_on_a_gpu(
    nf4: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(factors("layers.0.q", 56, 200) | factors("layers.1.q", 56, 200))
    assert undone_elsewhere(nf4(nested=True), adapter, tmp_path, "cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_weight_is_correctly_rounded_on_a_gpu(
    dtype: torch.dtype, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({f"layers.{i}.q.weight": torch.randn(4096, 1100).mul_(0.02).to(dtype) for i in range(4)}, shards=2)
    adapter = make_adapter(
        {k: t for i in range(4) for k, t in factors(f"layers.{i}.q", 4096, 1100, rank=16, size=0.01).items()}, r=16
    )
    torch.set_float32_matmul_precision("high")  # which must not reach the merge
    try:
        adapterkit.merge(base, [adapter], tmp_path / "out", device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    wrong, total = misrounded(base, adapter, tmp_path / "out")
    assert wrong <= 1e-6 * total


@gpu
@needs_gpu
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_dequantizing_has_the_same_bits_on_a_gpu(to: str, nf4: Callable[..., Path]) -> None:
    from adapterkit.base import quant
    from adapterkit.base.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(nf4(to, **({"nested": True} if to != "int8" else {})))
    for weight in quant.weights(checkpoint.tensors, checkpoint.config).values():
        if isinstance(weight, quant.QuantizedWeight):
            rows = weight.open(weight.shape[1])
            there = rows(3, 24, lambda info: info.read().cuda())
            assert there.is_cuda and torch.equal(there.cpu(), rows(3, 24))


@gpu
@needs_gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_quantizing_has_the_same_bits_on_a_gpu(rounding: str, nf4: Callable[..., Path], tmp_path: Path) -> None:
    nf4(nested=True, rounding=rounding)
    adapterkit.quantize(tmp_path / "dense", tmp_path / "gpu", to="nf4", nested=True, rounding=rounding, device="cuda")
    assert files(tmp_path / "gpu") == files(tmp_path / "nf4")


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", bnb4.KINDS)
def test_bitsandbytes_kernels_have_the_same_bits(kind: str) -> None:
    if not nibbles.has_kernels():
        pytest.skip("no bitsandbytes here")
    raw, absmax = torch.randint(0, 256, (32000,), dtype=torch.uint8).cuda(), torch.rand(1000).cuda()
    pairs = nibbles.pair_table(torch.tensor(CODES[kind]).cuda())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = nibbles.dequantize(raw, absmax, pairs, 64).to(dtype)
        assert torch.equal(nibbles.kernel(raw, absmax, 64, kind, 64000, dtype), expected)


@gpu
@needs_gpu
def test_a_full_gpu_falls_back_to_the_cpu(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"q.weight": torch.randn(4096, 4096).bfloat16()})
    adapter = make_adapter(factors("q", 4096, 4096))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        result = adapterkit.merge(base, [adapter], tmp_path / "gpu", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.place == "the CPU" and "ran out of memory" in result.notes[0]
    adapterkit.merge(base, [adapter], tmp_path / "cpu", device="cpu")
    assert files(tmp_path / "gpu") == files(tmp_path / "cpu")
