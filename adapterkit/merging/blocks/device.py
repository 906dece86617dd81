"""Where blocks are computed: on the worker's own core, or on a GPU, with a way there and back for each worker.

A worker reads into pinned memory, and its rows are copied to the GPU, computed and copied back on a stream of its own:
while one worker's rows travel, another's are computed and a third's come back.
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

CUDA: Any = torch.cuda  # untyped in parts

# In float32 half a megabyte, which with all that is made of it stays in the L2 cache of most cores.
CPU_CHUNK = 1 << 16
GPU_CHUNK = 1 << 22  # as many as a block has, at most: every launch costs some µs
LEAST_CHUNK = 1 << 18  # with which a GPU is hardly worth it

# What `auto` reckons with, by thread and per second: measured on one core of a Xeon (benchmarks/RESULTS.md).
CPU_FLOPS = 1e11
PACK_ELEMENTS = {"nearest": 7e7, "stochastic": 1.5e7, "compensated": 1.2e7}
DISK_BYTES = 2e9  # a fast disk's, for the whole machine
GPU_START = 2.0  # seconds that a process takes to set a GPU up


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device, and how many elements at a time are computed on it."""

    device: torch.device
    chunk: int

    def smaller(self) -> ComputeDevice:
        """Half as many at a time; below the least the CPU."""
        return replace(self, chunk=self.chunk // 2) if self.chunk // 2 >= LEAST_CHUNK else CPU

    def buffers(self) -> Buffers:
        """New buffers for one worker."""
        return Buffers() if self.device.type == "cpu" else GpuBuffers(self)

    def __str__(self) -> str:
        return "the CPU" if self == CPU else f"{self.device}, {self.chunk:,} elements at a time"


CPU = ComputeDevice(torch.device("cpu"), CPU_CHUNK)


def choose(wanted: str, plan: MergePlan, threads: int) -> ComputeDevice:
    """The place for `auto`, `cpu`, `cuda` or `cuda:N`. Raises UsageError where there is no such GPU."""
    if wanted == "cpu" or (wanted == "auto" and not (_gains(plan, threads) and torch.cuda.is_available())):
        return CPU
    number = int(wanted.partition(":")[2] or 0) if wanted != "auto" else 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= found:
        built = torch.version.cuda or torch.version.hip
        why = "see nvidia-smi" if built else "it was built without CUDA"
        raise UsageError(f"device {wanted}: torch finds {found} GPUs here ({why}); use cpu or auto")
    return ComputeDevice(torch.device("cuda", number), GPU_CHUNK)


def _gains(plan: MergePlan, threads: int) -> bool:
    """Whether the CPU would keep the disk waiting for longer than a GPU takes to start."""
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
    """Matrix products in the precision of their inputs: no TF32, no bf16 for float32, and 16 bits summed in float32.

    The settings are the process's own, and put back.
    """
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    kept = [(gpu, f"allow_{kind}_reduced_precision_reduction") for kind in ("bf16", "fp16")]
    precision = None
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer interface, which the older one then refuses to describe
        kept += [(gpu, "fp32_precision"), (cpu, "fp32_precision")]
    before = [(settings, name, getattr(settings, name)) for settings, name in kept]
    torch.set_float32_matmul_precision("highest")
    for settings, name in kept[:2]:
        setattr(settings, name, False)
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for settings, name, value in before:
            setattr(settings, name, value)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory left, as torch, the driver or one of CUDA's libraries says it."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        said in str(error) for said in ("out of memory", "ALLOC_FAILED")
    )


class Buffers:
    """What one worker on the CPU reuses from block to block, grown to the largest it met."""

    def __init__(self) -> None:
        self.place = CPU
        self._memory = memoryview(bytearray())
        self._sums = torch.empty(0)
        self._products = torch.empty(0)
        self._marks = torch.empty(0)

    def at_work(self) -> AbstractContextManager[object]:
        """Within it the worker computes at its place."""
        return nullcontext()

    def read(self, fd: int, info: TensorInfo) -> torch.Tensor:
        """The tensor that `info` spans in the open file `fd`; it is valid until the next one is read."""
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        raw = self._raw(info.nbytes)
        if not raw:
            return torch.empty(info.shape, dtype=dtype)
        read_span(fd, raw, info.start, info.file)
        return torch.frombuffer(raw, dtype=dtype).view(info.shape)

    def sums(self, rows: int, columns: int) -> torch.Tensor:
        """A float32 matrix with anything in it, valid until the next."""
        if self._sums.numel() < rows * columns:
            self._sums = torch.empty(rows * columns)
        return self._sums[: rows * columns].view(rows, columns)

    def products(self, rows: int, columns: int) -> torch.Tensor:
        """Another matrix like `sums`."""
        if self._products.numel() < rows * columns:
            self._products = self._sums.new_empty(rows * columns)
        return self._products[: rows * columns].view(rows, columns)

    def doubts(self, base: torch.Tensor) -> DoubtMask:
        """Room to mark elements of `base`; valid until the next."""
        if self._marks.numel() < base.numel() or self._marks.dtype != base.dtype:
            self._marks = torch.empty_like(base).view(-1)
        return DoubtMask(self._marks[: base.numel()].view_as(base))

    def output(self, into: memoryview, dtype: torch.dtype) -> torch.Tensor:
        """Where to compute what `deliver` puts into `into`."""
        return torch.frombuffer(into, dtype=dtype)

    def deliver(self, output: torch.Tensor, into: memoryview) -> None:
        """Have what `output` holds in `into`."""

    def page(self) -> PageBuffer:
        """Memory for output."""
        return PageBuffer()

    def close(self) -> None:
        """Give back what other processes could use."""

    def _raw(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        return self._memory[:size]


class GpuBuffers(Buffers):
    """The same for a GPU: what is read goes there, what is computed comes back."""

    def __init__(self, place: ComputeDevice) -> None:
        super().__init__()
        self.place = place
        self._stream: Any = CUDA.Stream(device=place.device)
        self._taken: Any = CUDA.Event()  # the last bytes read have left the pinned memory
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
        self._taken.synchronize()
        there = super().read(fd, info).to(self.place.device, non_blocking=True)
        self._taken.record(self._stream)
        return there

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
    """Pages that stay where they are, so that a GPU copies to and from them itself; with direct writes like others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = 0  # the address
        super().__init__()

    def unpin(self) -> None:
        """Let the pages move again."""
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
        self._pinned = 0 if failed else address  # not pinned it works too, only slower
        return memory
