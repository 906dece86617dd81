"""Devices and buffers: blocks are computed on a worker's core, or on a GPU with a stream for each worker.

For a GPU a worker reads into pinned memory, then copies, computes and copies back on its own stream, so that its
transfers overlap with another worker's computation.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapterkit.errors import UsageError
from adapterkit.files.outfile import PageBuffer
from adapterkit.files.safetensors import PAGE, TORCH_NAMES, TensorInfo, read_span
from adapterkit.kernels.cpu import DoubtMask
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import MergePlan
from adapterkit.text import counted

CUDA: Any = torch.cuda  # untyped in parts

CPU_CHUNK = 1 << 16  # elements: a float32 chunk and its intermediates fit in the L2 cache of most cores
GPU_CHUNK = 1 << 22  # a whole block, since every kernel launch costs some µs
MIN_GPU_CHUNK = 1 << 18  # below, a GPU is hardly faster than the CPU

# Rates per second, and per thread on the CPU, by which `auto` decides: measured on a Xeon core (benchmarks/RESULTS.md).
CPU_FLOPS = 1e11
PACK_ELEMENTS = {"nearest": 7e7, "stochastic": 1.5e7, "compensated": 1.2e7}
DISK_BYTES = 2e9  # of a fast disk
GPU_START = 2.0  # seconds to initialize a GPU


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device, and the number of elements that it computes at a time."""

    device: torch.device
    chunk: int

    def smaller(self) -> ComputeDevice:
        """The same device with half the chunk; below the minimum, the CPU."""
        return replace(self, chunk=self.chunk // 2) if self.chunk // 2 >= MIN_GPU_CHUNK else CPU

    def buffers(self) -> Buffers:
        """Create buffers for one worker."""
        return Buffers() if self.device.type == "cpu" else GpuBuffers(self)

    def __str__(self) -> str:
        return "the CPU" if self == CPU else f"{self.device}, {self.chunk:,} elements at a time"


CPU = ComputeDevice(torch.device("cpu"), CPU_CHUNK)


def choose(wanted: str, plan: MergePlan, threads: int) -> ComputeDevice:
    """Choose the device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError if there is no such GPU."""
    if wanted == "cpu" or (wanted == "auto" and not (_gpu_pays_off(plan, threads) and torch.cuda.is_available())):
        return CPU
    number = int(wanted.partition(":")[2] or 0) if wanted != "auto" else 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= found:
        built = torch.version.cuda or torch.version.hip
        why = "see nvidia-smi" if built else "it was built without CUDA"
        raise UsageError(f"device {wanted}: torch finds {counted(found, 'GPU')} ({why}); use cpu or auto")
    return ComputeDevice(torch.device("cuda", number), GPU_CHUNK)


def _gpu_pays_off(plan: MergePlan, threads: int) -> bool:
    """Whether the CPU would be slower than the disk by more time than a GPU takes to start."""
    seconds = sum(_cpu_seconds(edit) for file in plan.files for edit in file.edits) / threads
    return seconds > plan.bytes_to_write / DISK_BYTES + GPU_START


def _cpu_seconds(edit: MergeEdit | RestoreEdit) -> float:
    rows, columns = edit.matrix
    ranks = sum(delta.weights.rank * (3 if delta.weights.magnitude else 1) for delta in edit.deltas)
    spec = edit.packing if isinstance(edit, MergeEdit) else None
    packing = rows * columns / PACK_ELEMENTS[spec.rounding.kind] if spec else 0.0
    return 2 * rows * columns * ranks / CPU_FLOPS + packing


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute matrix products in full precision: no TF32, no bf16 for float32, and float32 accumulation for 16 bits.

    These are settings of the process, restored at the end.
    """
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    attributes = [(gpu, f"allow_{kind}_reduced_precision_reduction") for kind in ("bf16", "fp16")]
    precision = None
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if it was set through torch's newer interface
        attributes += [(gpu, "fp32_precision"), (cpu, "fp32_precision")]
    saved = [(owner, name, getattr(owner, name)) for owner, name in attributes]
    torch.set_float32_matmul_precision("highest")
    for owner, name in attributes[:2]:
        setattr(owner, name, False)
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for owner, name, value in saved:
            setattr(owner, name, value)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, the driver or a CUDA library means that a GPU ran out of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "ALLOC_FAILED")
    )


class Buffers:
    """Memory that a worker on the CPU reuses from block to block; it grows to the largest."""

    def __init__(self) -> None:
        self.place = CPU
        self._memory = memoryview(bytearray())
        self._sums = torch.empty(0)
        self._products = torch.empty(0)
        self._marks = torch.empty(0)

    def at_work(self) -> AbstractContextManager[object]:
        """A context in which the worker computes on its device."""
        return nullcontext()

    def read(self, fd: int, info: TensorInfo) -> torch.Tensor:
        """Read a tensor from the open file `fd`; valid until the next read."""
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        raw = self._raw(info.nbytes)
        if not raw:
            return torch.empty(info.shape, dtype=dtype)
        read_span(fd, raw, info.start, info.file)
        return torch.frombuffer(raw, dtype=dtype).view(info.shape)

    def sums(self, rows: int, columns: int) -> torch.Tensor:
        """An uninitialized float32 matrix, valid until the next call."""
        if self._sums.numel() < rows * columns:
            self._sums = torch.empty(rows * columns)
        return self._sums[: rows * columns].view(rows, columns)

    def products(self, rows: int, columns: int) -> torch.Tensor:
        """Another matrix like `sums`."""
        if self._products.numel() < rows * columns:
            self._products = self._sums.new_empty(rows * columns)
        return self._products[: rows * columns].view(rows, columns)

    def doubts(self, base: torch.Tensor) -> DoubtMask:
        """A mask for elements of `base`, valid until the next call."""
        if self._marks.numel() < base.numel() or self._marks.dtype != base.dtype:
            self._marks = torch.empty_like(base).view(-1)
        return DoubtMask(self._marks[: base.numel()].view_as(base))

    def output(self, into: memoryview, dtype: torch.dtype) -> torch.Tensor:
        """A tensor to compute in, which `deliver` then copies to `into`."""
        return torch.frombuffer(into, dtype=dtype)

    def deliver(self, output: torch.Tensor, into: memoryview) -> None:
        """Copy `output` to `into`, unless they share memory."""

    def page(self) -> PageBuffer:
        """Create a page for output."""
        return PageBuffer()

    def close(self) -> None:
        """Release pinned memory."""

    def _raw(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        return self._memory[:size]


class GpuBuffers(Buffers):
    """Buffers for a GPU: input is copied to it, output is copied back."""

    def __init__(self, place: ComputeDevice) -> None:
        super().__init__()
        self.place = place
        self._stream: Any = CUDA.Stream(device=place.device)
        self._copied: Any = CUDA.Event()  # the last input has left the pinned memory
        self._sums = torch.empty(0, device=place.device)
        self._products = torch.empty(0, device=place.device)
        self._pinned: list[PinnedPages] = []
        self._input = self.page()

    def at_work(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(CUDA.device(self.place.device))
        stack.enter_context(CUDA.stream(self._stream))
        return stack

    def read(self, fd: int, info: TensorInfo) -> torch.Tensor:
        self._copied.synchronize()
        on_device = super().read(fd, info).to(self.place.device, non_blocking=True)
        self._copied.record(self._stream)
        return on_device

    def sums(self, rows: int, columns: int) -> torch.Tensor:
        if self._sums.numel() < rows * columns:
            self._sums = torch.empty(rows * columns, device=self.place.device)
        return super().sums(rows, columns)

    def output(self, into: memoryview, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(len(into) // dtype.itemsize, dtype=dtype, device=self.place.device)

    def deliver(self, output: torch.Tensor, into: memoryview) -> None:
        torch.frombuffer(into, dtype=output.dtype).copy_(output.view(-1), non_blocking=True)
        self._stream.synchronize()

    def page(self) -> PageBuffer:
        page = PinnedPages(self.place.device)
        self._pinned.append(page)
        return page

    def close(self) -> None:
        self._stream.synchronize()
        for page in self._pinned:
            page.unpin()

    def _raw(self, size: int) -> memoryview:
        return self._input.view(size, 0)


class PinnedPages(PageBuffer):
    """Pages pinned in memory, so that a GPU copies to and from them directly."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = 0  # the address
        super().__init__()

    def unpin(self) -> None:
        """Unpin the pages."""
        if self._pinned:
            with CUDA.device(self._device):
                CUDA.cudart().cudaHostUnregister(self._pinned)
            self._pinned = 0

    def _map(self, size: int) -> mmap.mmap:
        self.unpin()
        memory = super()._map(size)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        with CUDA.device(self._device):
            failed = int(CUDA.cudart().cudaHostRegister(address, -(-size // PAGE) * PAGE, 0))
        self._pinned = 0 if failed else address  # unpinned pages work too, only slower
        return memory
