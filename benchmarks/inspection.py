"""Time `adapterkit --help` and `adapterkit inspect` of a 7B model's rank-64 adapter; see --help."""

# Not named inspect.py, which would shadow the standard library's module for scripts in this folder.

from __future__ import annotations

import argparse
import sys

from benchmarks.common.measure import Command, alternate, child_environment, python, table
from benchmarks.common.models import LLAMA2_7B, cached_adapter
from benchmarks.common.paths import CACHE
from benchmarks.common.report import Target, report, targets_table


def main() -> None:
    """Run the benchmark, print the table and the targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the adapter; 32 is Llama 2 (7B)")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapter (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    adapter = cached_adapter(args.layers, args.rank, LLAMA2_7B)
    commands = [
        Command("import torch", [sys.executable, "-c", "import torch"]),
        Command("adapterkit --help", python("adapterkit", "--help")),
        Command("adapterkit inspect", python("adapterkit", "inspect", adapter)),
    ]
    torch, usage, inspect = results = alternate(commands, args.rounds, child_environment())
    beyond = inspect.wall - torch.wall
    targets = [
        Target("`--help` in under 0.3 s", f"{usage.wall:.2f} s", usage.wall < 0.3),
        Target("`inspect` in under 4 s beyond `import torch`", f"{beyond:.2f} s", beyond < 4),
        Target("`inspect` in under 1000 MB of memory", f"{inspect.peak_mb:.0f} MB", inspect.peak_mb < 1000),
    ]
    size = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
    title = f"inspect, 7B shape, {args.layers} layers, rank {args.rank}, {size:.0f} MB"
    report(title, [table(results, reference=torch), targets_table(targets)], output=CACHE, record=args.record)


if __name__ == "__main__":
    main()
