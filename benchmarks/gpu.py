"""Benchmark merging on a GPU: exactness, resident weights, files, 4 bits, memory; see --help.

Needs torch and safetensors; comparisons with PEFT and bitsandbytes are skipped, with a note, if they are not installed.
Takes about ten minutes and 50 GB of disk for the shape of Llama 3 (8B).

"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import nn

import adapterkit
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra.rounding import round_once
from adapterkit.algebra.updates import Update
from adapterkit.base.quant.codebooks import CODES
from adapterkit.base.quant.schemes.bnb4 import nibbles
from adapterkit.merging.blocks.device import exact_products
from adapterkit.merging.live.weights import adder
from benchmarks.common.measure import Command, alternate, and_sync, child_environment, clean, python, table
from benchmarks.common.models import DELTA_RATIO, LLAMA3_8B, TINYLLAMA, WEIGHT_STD, Llama, cached_adapter, cached_llama
from benchmarks.common.paths import CACHE
from benchmarks.common.report import Target, report, targets_table
from benchmarks.merge import PEFT_MERGE

SHAPES = {"8b": LLAMA3_8B, "1b": TINYLLAMA, "tiny": Llama(hidden=64, intermediate=160, heads=4, kv_heads=2, vocab=96)}
RANK = 16
PARTS = (
    "files",
    "exactness",
    "resident",
    "four-bits",
)  # files first: peaks are inherited from this process, which grows
Part = tuple[list[str], list[Target]]


def main() -> None:
    """Run the parts, print tables and targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="model shape (default %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the files part (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")

    device, shape = torch.device(args.device), SHAPES[args.shape]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    runs: dict[str, Callable[[Path], Part]] = {
        "exactness": lambda _: exactness(device, shape),
        "resident": lambda _: resident(device, shape, args.layers),
        "four-bits": lambda _: four_bits(device, shape),
        "files": lambda work: files(args, shape, work),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        tables: list[str] = []
        targets: list[Target] = []
        for part in (part for part in PARTS if part in args.parts):
            found, judged = runs[part](Path(directory))
            print("\n\n".join([f"### {part}", *found]), flush=True)
            tables += found
            targets += judged
        title = f"on {name}, {args.shape} shape, {args.layers} layers, rank {RANK}"
        report(title, [*tables, targets_table(targets)], output=CACHE, record=args.record)


# --- exactness -------------------------------------------------------------------------------------------------------


def exactness(device: torch.device, shape: Llama) -> Part:
    """Count the elements that differ from the exact float64 sum, rounded once, for each way to merge."""
    lines = ["| merge of one bf16 weight | rank | factors | not correctly rounded | off by more than an ulp |"]
    lines.append("|---|--:|---|--:|--:|")
    worst = 0.0
    rows, columns = shape.linears()["mlp.gate_proj"]
    for rank in (1, 16, 256):
        for dtype in (torch.float32, torch.bfloat16):
            weight, update = random_update(device, rows, columns, rank, dtype)
            exact = exact_of(weight, update)
            correct = round_once(exact, torch.bfloat16)
            ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-38)))) * 2**-7
            terms = weight.double().abs() + update.strength * (update.left.double().abs() @ update.right.double().abs())
            for name, merged in ways_to_merge(weight, update).items():
                wrong = float((merged != correct).double().mean())
                beyond = int(((merged.double() - exact).abs() > ulp + terms * 2.0**-20).sum())  # sums may cancel
                kind = str(dtype).removeprefix("torch.")
                lines.append(f"| {name} | {rank} | {kind} | {wrong:.1e} | {beyond} |")
                if name == "adapterkit, resident":
                    worst = max(worst, wrong)
                    assert not beyond
    target = Target("resident merges: at most 2e-5 not correctly rounded", f"{worst:.1e}", worst <= 2e-5)
    return ["\n".join(lines)], [target]


def random_update(
    device: torch.device, rows: int, columns: int, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, Update]:
    """Return a bf16 weight, and an update of typical size whose factors fit `dtype`."""
    rng = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=rng, device=device).mul_(WEIGHT_STD).bfloat16()
    left = torch.randn(rows, rank, generator=rng, device=device).to(dtype).float()
    right = torch.randn(rank, columns, generator=rng, device=device).mul_(WEIGHT_STD).to(dtype).float()
    return weight, Update(0, rows, left, right, DELTA_RATIO / rank**0.5)


def exact_of(weight: torch.Tensor, update: Update) -> torch.Tensor:
    return torch.addmm(weight.double(), update.left.double(), update.right.double(), alpha=update.strength)


def ways_to_merge(weight: torch.Tensor, update: Update) -> dict[str, torch.Tensor]:
    """Return the weight merged by adapterkit's live merge, and by PEFT."""
    ours = weight.clone()
    with exact_products():
        adder(ours, [update])(0, len(ours))
    delta = (update.left.bfloat16() @ update.right.bfloat16()) * update.strength
    return {"adapterkit, resident": ours, "product in bf16, then added (PEFT)": weight + delta}


# --- weights on the GPU ----------------------------------------------------------------------------------------------


class Resident(nn.Module):
    """The linear layers of a model with random weights on the device."""

    def __init__(self, shape: Llama, layers: int, device: torch.device) -> None:
        super().__init__()
        for layer in range(layers):
            for name, (rows, columns) in shape.linears().items():
                linear = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
                nn.init.normal_(linear.weight, std=WEIGHT_STD)
                self.add_module(f"{layer}_{name.replace('.', '_')}", linear)


def adapter_for(model: nn.Module) -> Adapter:
    """Return an adapter of every layer, in memory."""
    rng = torch.Generator().manual_seed(1)
    modules = {}
    for name, layer in model.named_children():
        rows, columns = layer.weight.shape
        a = torch.randn(RANK, columns, generator=rng).mul_(WEIGHT_STD)
        b = torch.randn(rows, RANK, generator=rng)
        modules[name] = LoraWeights(LazyTensor.of(a), LazyTensor.of(b), DELTA_RATIO / RANK**0.5)
    return Adapter("memory", modules)


def resident(device: torch.device, shape: Llama, layers: int) -> Part:
    """Time merging into weights on the GPU, relative to copying them, with and without a receipt."""
    model = Resident(shape, layers, device)
    adapter = adapter_for(model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    pairs = [(parameter.data, updates_on(device, adapter, name)) for name, parameter in model.named_parameters()]
    copied = 2 * total * seconds_a_byte(device, min(total, 4 << 30))

    def merge() -> None:
        with exact_products():
            for data, updates in pairs:
                add = adder(data, updates)
                add(0, len(data))

    def naive() -> None:
        for data, [update] in pairs:
            data += (update.left.bfloat16() @ update.right.bfloat16()) * update.strength

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bare, peft = timed(merge, device), timed(naive, device)
    applied, removed = [], []
    for _ in range(3):
        applied.append(timed(lambda: adapterkit.apply(model, adapter), device, times=1))
        removed.append(timed(lambda: adapterkit.remove(model, adapter), device, times=1))
    share = copied / bare
    rows = {
        "copy": copied,
        "merge in place": bare,
        "`W += s·(B @ A)` in bf16 (PEFT)": peft,
        "`adapterkit.apply`, with what undoes it": median(applied),
        "`adapterkit.remove`": median(removed),
    }
    lines = [f"| {total / 1e9:.1f} GB of resident weights | ms | GB/s |", "|---|--:|--:|"]
    lines += [f"| {name} | {1e3 * s:.1f} | {2 * total / s / 1e9:.0f} |" for name, s in rows.items()]
    lines += ["", f"Peak memory on the device beside the weights: {beside(device, total) / 1e6:.0f} MB."]
    target = Target("resident merge: 80% of the copy bandwidth", f"{share:.0%}", share >= 0.8)
    return ["\n".join(lines)], [target]


def seconds_a_byte(device: torch.device, size: int) -> float:
    """Return the time per byte read or written when a tensor of `size` bytes is copied."""
    one = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    other = torch.empty_like(one)
    return timed(lambda: other.copy_(one), device) / (2 * one.nbytes)


def updates_on(device: torch.device, adapter: Adapter, parameter: str) -> list[Update]:
    weights = adapter.modules[parameter.removesuffix(".weight")]
    left, right = weights.B.read().to(device), weights.A.read().to(device)
    return [Update(0, len(left), left, right, weights.scaling)]


def beside(device: torch.device, total: int) -> int:
    return max(0, torch.cuda.max_memory_allocated(device) - total) if device.type == "cuda" else 0


def timed(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Return the median seconds of `times` runs, after a warm-up if there are several."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if times > 1:
        once()
    return median(once() for _ in range(times))


# --- 4 bits ----------------------------------------------------------------------------------------------------------


def four_bits(device: torch.device, shape: Llama) -> Part:
    """Dequantize an NF4 weight and add an update, by torch operations and by bitsandbytes' kernel if installed."""
    rows, columns = shape.linears()["mlp.gate_proj"]
    _, update = random_update(device, rows, columns, RANK, torch.float32)
    raw = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(rows * columns // 64, device=device)
    pairs = nibbles.pair_table(torch.tensor(CODES["nf4"], device=device))

    def merged(values: torch.Tensor) -> torch.Tensor:
        matrix = values.view(rows, columns).to(torch.bfloat16)
        adder(matrix, [update])(0, rows)
        return matrix

    def by_torch() -> torch.Tensor:
        return merged(nibbles.dequantize(raw, absmax, pairs, 64))

    def by_kernel() -> torch.Tensor:
        return merged(nibbles.kernel(raw, absmax, 64, "nf4", rows * columns, torch.bfloat16))

    def by_bitsandbytes() -> torch.Tensor:
        values = nibbles.kernel(raw, absmax, 64, "nf4", rows * columns, torch.bfloat16).view(rows, columns)
        return values + (update.left.bfloat16() @ update.right.bfloat16()) * update.strength

    with exact_products():
        times = {"adapterkit, torch's operations": timed(by_torch, device)}
        targets = []
        if nibbles.has_kernels():
            assert torch.equal(by_torch(), by_kernel())
            times["adapterkit, bitsandbytes' kernel"] = timed(by_kernel, device)
            times["bitsandbytes + add"] = timed(by_bitsandbytes, device)
            ours, theirs = times["adapterkit, bitsandbytes' kernel"], times["bitsandbytes + add"]
            targets.append(Target("NF4 + add as fast as bitsandbytes + add", f"{theirs / ours:.2f} x", ours <= theirs))
    lines = [f"| NF4 {rows} × {columns}, dequantize and add | ms |", "|---|--:|"]
    lines += [f"| {name} | {1e3 * seconds:.3f} |" for name, seconds in times.items()]
    if not targets:
        lines += ["", "bitsandbytes is not installed: not compared."]
    return ["\n".join(lines)], targets


# --- files -----------------------------------------------------------------------------------------------------------


def files(args: argparse.Namespace, shape: Llama, work: Path) -> Part:
    """Time merging files on the GPU against the CPU, copying, and PEFT on the same GPU."""
    base = cached_llama(args.layers, shards=min(4, args.layers), shape=shape)
    adapter, output = cached_adapter(args.layers, RANK, shape), work / "merged"
    copy = ["cp", "-r", str(base), str(output)]

    def ours(device: str) -> Command:
        argv = python("adapterkit", "merge", base, adapter, "-o", output, "--device", device)
        return Command(f"adapterkit, --device {device}", argv, before=lambda: clean(work))

    commands = [
        Command("import torch", [sys.executable, "-c", "import torch"]),
        Command("cp + sync", and_sync(copy, output), before=lambda: clean(work)),
        *(ours(device) for device in dict.fromkeys([args.device, "cpu", "auto"])),
    ]
    notes = []
    if find_spec("peft") and find_spec("transformers"):
        peft = python(PEFT_MERGE, base, adapter, output, "5GB", args.device)
        commands.append(Command("PEFT + sync", and_sync(peft, output), before=lambda: clean(work), rounds=1))
    else:
        notes.append("PEFT is not installed: not compared.")
    results = alternate(commands, args.rounds, child_environment())
    torch_only, copied, gpu = results[:3]
    ratio = (gpu.wall - torch_only.wall) / copied.wall
    targets = [Target("file to file: at most 1.2 x cp + sync, beyond `import torch`", f"{ratio:.2f} x", ratio <= 1.2)]
    if not notes:
        speedup = results[-1].wall / gpu.wall
        targets.append(Target("file to file: 5 x faster than PEFT", f"{speedup:.2f} x", speedup >= 5))
    return ["\n\n".join([table(results, reference=gpu), *notes, *device_memory(args, base, adapter, work)])], targets


def device_memory(args: argparse.Namespace, base: Path, adapter: Path, work: Path) -> Iterator[str]:
    """Measure the peak device memory of merging files."""
    clean(work)
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    adapterkit.merge(base, [adapter], work / "merged", device=args.device)
    shutil.rmtree(work / "merged")
    if args.device != "cpu":
        yield f"Peak memory on the device: {torch.cuda.max_memory_reserved() / 1e6:.0f} MB."


if __name__ == "__main__":
    main()
