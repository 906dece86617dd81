"""Measure the time and space cost of a receipt, and the time to undo a merge; see --help."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.measure import Command, alternate, child_environment, python, table
from benchmarks.common.models import cached_adapter, cached_llama
from benchmarks.common.paths import BASE, CACHE
from benchmarks.common.report import Target, report, targets_table

if TYPE_CHECKING:
    import torch

# ‖Δ‖/‖W‖ -> the target for a receipt's share of the bytes.
RATIOS = {1e-4: None, 1e-3: 0.0025, 1e-2: 0.015, 1e-1: 0.07}
RANK = 16


def main() -> None:
    """Run both parts, print the tables and the targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--layers", type=int, default=22, help="layers of the base; 22 is TinyLlama (1.1B)")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        work = Path(directory)
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # so that its memory does not count for this one's
            sizes, promised = other.submit(sizes_table, work).result()
        base, adapter = cached_llama(args.layers), cached_adapter(args.layers, RANK)
        results = alternate(commands(base, adapter, work), args.rounds, child_environment())
        without, merge, unmerge = results
        assert hashes(work / "again") == hashes(base), "not restored"
        more, back = merge.wall / without.wall, unmerge.wall / merge.wall
        targets = [
            *promised,
            Target("merge at most 1.5 x one without a receipt", f"{more:.2f} x", more <= 1.5),
            Target("unmerge no slower than merge", f"{back:.2f} x", back <= 1),
        ]
        share = receipt_bytes(work / "merged") / weight_bytes(base)
        note = f"Every file restored has the SHA-256 it had. The receipt takes {share:.2%} of the 1.1B model's bytes."
        tables = [sizes, table(results, reference=without), targets_table(targets), note]
        report(f"receipts and unmerging, {args.layers} layers, rank {RANK}", tables, output=work, record=args.record)


def commands(base: Path, adapter: Path, work: Path) -> list[Command]:
    """Return a merge without a receipt, one with it, and its undoing, with warm inputs and no output."""
    merge = python("adapterkit", "merge", base, adapter, "-o")
    undo = python("adapterkit", "unmerge", work / "merged", "--adapter", adapter, "-o", work / "again")
    return [
        Command(
            "merge --no-receipt", [*merge, str(work / "bare"), "--no-receipt"], partial(ready, base, work / "bare")
        ),
        Command("merge", [*merge, str(work / "merged")], partial(ready, base, work / "merged")),
        Command("unmerge", undo, partial(ready, work / "merged", work / "again")),
    ]


def ready(source: Path, out: Path) -> None:
    """Load the weights of `source` into the page cache, which merging bypasses, and remove `out`."""
    shutil.rmtree(out, ignore_errors=True)
    for file in source.glob("*.safetensors"):
        with open(file, "rb") as stream:
            while stream.read(1 << 22):
                pass


def sizes_table(work: Path) -> tuple[str, list[Target]]:
    """Measure receipts of random updates of SmolLM2's projections, all with the same size relative to the weights."""
    import adapterkit

    lines = [
        "| ‖Δ‖/‖W‖ | receipt, of the checkpoint's bytes | of the changed weights' | restored |",
        "|--:|--:|--:|---|",
    ]
    targets = []
    for ratio, most in RATIOS.items():
        adapter = write_adapter(work / "adapter", ratio)
        adapterkit.merge(BASE, [adapter], work / "small", overwrite=True)
        shutil.rmtree(work / "small-again", ignore_errors=True)
        adapterkit.unmerge(work / "small", work / "small-again", adapters=[adapter])
        same = hashes(work / "small-again") == hashes(BASE)
        share = receipt_bytes(work / "small") / weight_bytes(BASE)
        changed = receipt_bytes(work / "small") / sum(2 * weight.numel() for weight in projections().values())
        lines.append(f"| {ratio:g} | {share:.3%} | {changed:.3%} | {'every SHA-256' if same else '**no**'} |")
        if most is not None:
            targets.append(Target(f"receipt under {most:.2%} at {ratio:g}", f"{share:.3%}", same and share < most))
    return "\n".join([*lines, "", f"SmolLM2's 210 projections, rank {RANK}, random factors."]), targets


def write_adapter(folder: Path, ratio: float) -> Path:
    """Write a LoRA adapter of random factors on every projection, whose Δ has `ratio` times the norm of the weight."""
    import torch
    from safetensors.torch import save_file

    rng, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in projections().items():
        a = torch.randn(RANK, weight.shape[1], generator=rng)
        b = torch.randn(weight.shape[0], RANK, generator=rng)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = a
        tensors[f"{prefix}.lora_B.weight"] = b * (ratio * weight.float().norm() / (b @ a).norm())
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return folder


def projections() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: w for name, w in load_file(BASE / "model.safetensors").items() if name.endswith("_proj.weight")}


def hashes(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]


def receipt_bytes(folder: Path) -> int:
    files = [folder / "adapterkit_receipt.json", *(folder / "adapterkit_receipt").glob("*.residuals")]
    return sum(file.stat().st_size for file in files)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
