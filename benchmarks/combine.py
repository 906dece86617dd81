"""Time combining, resizing, comparing, converting and extracting adapters, against PEFT and full SVDs; see --help."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common.measure import Command, Result, alternate, child_environment, clean, python, table
from benchmarks.common.models import LLAMA2_7B, SMOLLM2, cached_adapter, cached_llama
from benchmarks.common.paths import BASE, CACHE
from benchmarks.common.report import Target, report, targets_table

RANK = 16


def main() -> None:
    """Run the benchmark, print the tables and the targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default %(default)s)")
    parser.add_argument("--svd-layers", type=int, default=2, help="layers of the model that full SVDs extract from")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()

    small = [cached_adapter(30, RANK, SMOLLM2, number=number) for number in (1, 2)]
    large = [cached_adapter(32, RANK, LLAMA2_7B, number=number) for number in (1, 2)]
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        work = Path(directory)
        before, after = pairs(22, work), pairs(args.svd_layers, work)
        tables, targets = [], []
        for run in (partial(combining, small, large), partial(extracting, before, after)):
            results, judged = run(work, args.rounds)
            tables.append(table(results, reference=results[1]))
            targets += judged
        title = "combine, resize, compare, convert and extract"
        report(title, [*tables, targets_table(targets)], output=work, record=args.record)


def pairs(layers: int, work: Path) -> tuple[Path, Path]:
    """Write a base of 1.1B's shapes, and the same with an adapter merged into it."""
    base, tuned = cached_llama(layers, shards=min(5, layers)), work / f"{layers}.tuned"
    argv = python("adapterkit", "merge", base, cached_adapter(layers, RANK), "-o", tuned)
    subprocess.run(argv, check=True, capture_output=True)  # in another process: see `measure` on peaks
    return base, tuned


def adapterkit_of(name: str, work: Path, *words: object) -> Command:
    """Return an adapterkit command; those that write an adapter use the same output."""
    argv = python("adapterkit", *words)
    return Command(name, argv, before=partial(forget, work))


def forget(work: Path) -> None:
    """Delete the output of a command."""
    for path in work.iterdir():
        if path.name == "out" and path.is_dir():
            clean(path)
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def combining(small: list[Path], large: list[Path], work: Path, rounds: int) -> tuple[list[Result], list[Target]]:
    """Combine two adapters of SmolLM2 and of a 7B model; PEFT does the first only, once."""
    out = work / "out"

    def both(paths: list[Path]) -> tuple[object, ...]:
        return f"{paths[0]}:0.7", f"{paths[1]}:0.3", "-o", out

    to_dora = ("--to", "dora", "--base", BASE)
    peft = python("benchmarks.peers.peft_combine", BASE, *small, work / "peft", RANK)
    torch, ours, seven, resized, compared, *_ = results = alternate(
        [
            Command("import torch", [sys.executable, "-c", "import torch"]),
            adapterkit_of("combine by svd, SmolLM2", work, "combine", *both(small), "--method", "svd", "--rank", RANK),
            adapterkit_of("combine by svd, 7B", work, "combine", *both(large), "--method", "svd", "--rank", RANK),
            adapterkit_of("resize to 8, 7B", work, "resize", large[0], "-o", out, "--rank", 8),
            adapterkit_of("compare, 7B", work, "compare", *large),
            adapterkit_of("convert to DoRA, SmolLM2", work, "convert", small[0], "-o", out, *to_dora),
            Command("PEFT, svd, SmolLM2", peft, rounds=1),
        ],
        rounds,
        child_environment(),
    )
    errors = {name: off(small, where) for name, where in (("ours", None), ("PEFT", work / "peft" / "both"))}
    beyond = ours.wall - torch.wall
    targets = [
        Target("SmolLM2 in under 1.5 s beyond `import torch`", f"{beyond:.2f} s", beyond < 1.5),
        Target("7B in under 15 s", f"{seven.wall:.2f} s", seven.wall < 15),
        Target("7B in under 1500 MB", f"{seven.peak_mb:.0f} MB", seven.peak_mb < 1500),
        Target(
            "relative error no greater than PEFT's",
            f"{errors['ours']:.6f}, PEFT {errors['PEFT']:.6f}",
            errors["ours"] <= errors["PEFT"] * (1 + 1e-6),
        ),
        Target("resize and compare in seconds", f"{resized.wall:.1f} s, {compared.wall:.1f} s", compared.wall < 10),
    ]
    return results, targets


def off(adapters: list[Path], result: Path | None) -> float:
    """Return the error of a combination at this rank relative to the exact sum; of ours if there is no `result`."""
    import adapterkit

    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        exact = Path(folder) / "exact"
        adapterkit.combine([(adapters[0], 0.7), (adapters[1], 0.3)], exact)
        if result is None:
            result = Path(folder) / "ours"
            adapterkit.combine([(adapters[0], 0.7), (adapters[1], 0.3)], result, method="svd", rank=RANK)
        [pair] = adapterkit.compare([exact, result])
        return pair.total.distance


def extracting(
    whole: tuple[Path, Path], few: tuple[Path, Path], work: Path, rounds: int
) -> tuple[list[Result], list[Target]]:
    """Extract an adapter merged into a model of 1.1B's shapes; full SVDs from few layers only, once."""
    out = work / "out"
    svd = python("benchmarks.peers.full_svd", *few, work / "svd.safetensors", RANK)
    results = alternate(
        [
            adapterkit_of("extract, 1.1B", work, "extract", *whole, "-o", out, "--rank", RANK),
            adapterkit_of("extract, few layers", work, "extract", *few, "-o", out, "--rank", RANK),
            Command("full SVDs, few layers", svd, rounds=1),
        ],
        rounds,
        child_environment(),
    )
    _, ours, theirs = results
    error, best = errors_of_extraction(few, work)
    return results, [
        Target("extract 5 x faster than full SVDs", f"{theirs.wall / ours.wall:.1f} x", theirs.wall >= 5 * ours.wall),
        Target("its error within 1% of the optimum", f"{error / best - 1:+.3%}", error <= 1.01 * best),
    ]


def errors_of_extraction(few: tuple[Path, Path], work: Path) -> tuple[float, float]:
    """Return our relative error at this rank, and that of full SVDs, from the same differences."""
    from safetensors.torch import load_file

    import adapterkit

    result = adapterkit.extract(*few, work / "out", rank=RANK, overwrite=True)
    theirs = load_file(work / "svd.safetensors")
    before, after = (
        {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()} for folder in few
    )
    lost = 0.0
    for name in before:
        if name.endswith("_proj.weight"):
            whole = after[name].double() - before[name].double()
            lost += float((whole - theirs[f"{name}.B"].double() @ theirs[f"{name}.A"].double()).square().sum())
    return result.error, math.sqrt(lost / math.fsum(row.energy for row in result.modules))


if __name__ == "__main__":
    main()
