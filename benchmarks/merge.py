"""Time `adapterkit merge` against copying the base, against PEFT and against mergekit; see --help."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.measure import Command, alternate, and_sync, child_environment, clean, python, table
from benchmarks.common.models import cached_adapter, cached_llama, cached_nf4
from benchmarks.common.paths import CACHE
from benchmarks.common.report import Target, report, targets_table

PEFT_MERGE = "benchmarks.peers.peft_merge"
SHARD_MB = 500  # about the size of the base's five shards, so that every tool writes similar files


def main() -> None:
    """Run the benchmark, print the tables and the targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds that include PEFT and mergekit (default 2)")
    parser.add_argument("--layers", type=int, default=22, help="layers of the base; 22 is TinyLlama (1.1B)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default %(default)s)")
    parser.add_argument(
        "--big",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also merge a model with three times the layers, to compare the peak memory",
    )
    parser.add_argument("--quantized", action="store_true", help="merge into the base in NF4 instead, into 16 bits")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    if min(args.rounds, args.peer_rounds) < 1:
        parser.error("--rounds and --peer-rounds must be at least 1")

    if args.quantized:
        quantized(args)
        return
    base, adapter = cached_llama(args.layers), cached_adapter(args.layers, args.rank)
    env = child_environment()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        work = Path(directory)
        results = alternate(merge_commands(base, adapter, work, args.peer_rounds), args.rounds, env)
        torch, _, synced, ours, peft = results[:5]
        speedup = peft.wall / ours.wall
        work_per_copy = (ours.wall - torch.wall) / synced.wall
        targets = [
            Target("at least 6 x faster than PEFT", f"{speedup:.2f} x", speedup >= 6),
            Target(
                "beyond `import torch`, at most 1.3 x cp + sync",
                f"{work_per_copy:.2f} x",
                work_per_copy <= 1.3,
            ),
            Target("peak memory under 450 MB", f"{ours.peak_mb:.0f} MB", ours.peak_mb < 450),
        ]
        tables = [table(results, reference=ours)]
        if args.big:
            layers = 3 * args.layers
            base, adapter = cached_llama(layers), cached_adapter(layers, args.rank)
            # The peak hardly varies from run to run, so a few rounds will do.
            command = adapterkit(f"adapterkit, {layers} layers", base, adapter, work)
            [big] = alternate([command], args.peer_rounds, env)
            growth = big.peak_mb / ours.peak_mb - 1
            targets.append(Target("three times the layers, peak within 10%", f"{growth:+.1%}", abs(growth) <= 0.1))
            tables.append(table([ours, big], reference=ours))
        title = f"merge, {args.layers} layers, rank {args.rank}"
        report(title, [*tables, targets_table(targets)], output=work, record=args.record)


def quantized(args: argparse.Namespace) -> None:
    """Time merging into an NF4 base on the CPU, against PEFT's two ways."""
    base, adapter = cached_nf4(args.layers), cached_adapter(args.layers, args.rank)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        work = Path(directory)
        peft = python(PEFT_MERGE, base, adapter, work / "merged", f"{SHARD_MB}MB")
        peers = {"PEFT, requantizing + sync": "requantize", "PEFT, dequantize() first + sync": "dequantize"}
        commands = [
            Command("import torch", [sys.executable, "-c", "import torch"]),
            adapterkit("adapterkit", base, adapter, work),
            *(
                Command(name, and_sync([*peft, how], work / "merged"), partial(clean, work), args.peer_rounds)
                for name, how in peers.items()
            ),
        ]
        results = alternate(commands, args.rounds, child_environment())
        _, ours, *theirs = results
        speedup = min(peer.wall for peer in theirs) / ours.wall
        targets = [
            Target("at least 4 x faster than the faster of PEFT's ways", f"{speedup:.2f} x", speedup >= 4),
            Target("peak memory under 500 MB", f"{ours.peak_mb:.0f} MB", ours.peak_mb < 500),
        ]
        title = f"merge into NF4 with nesting, 16-bit output, {args.layers} layers, rank {args.rank}"
        report(title, [table(results, reference=ours), targets_table(targets)], output=work, record=args.record)


def merge_commands(base: Path, adapter: Path, work: Path, peer_rounds: int) -> list[Command]:
    """Return the commands to compare: five that always run, and mergekit if it is installed."""
    output = work / "merged"
    copy = ["cp", "-r", str(base), str(output)]
    peft = python(PEFT_MERGE, base, adapter, output, f"{SHARD_MB}MB")
    commands = [
        Command("import torch", [sys.executable, "-c", "import torch"]),
        Command("cp", copy, before=partial(clean, work)),
        Command("cp + sync", and_sync(copy, output), before=partial(clean, work)),
        adapterkit("adapterkit", base, adapter, work),
        Command("PEFT + sync", and_sync(peft, output), before=partial(clean, work), rounds=peer_rounds),
    ]
    if find_spec("mergekit") is None:
        print("mergekit is skipped: it is not installed in this environment", file=sys.stderr)
        return commands
    config = work / "mergekit.yaml"
    model = f"{base}+{adapter}"  # mergekit's notation for a base with a LoRA adapter merged into it
    config.write_text(f"merge_method: passthrough\nmodels:\n  - model: {model}\ndtype: bfloat16\n")
    mergekit = python("mergekit.scripts.run_yaml", config, output)
    # It first merges with PEFT into this cache, which must be empty for that to be timed.
    mergekit += ["--lora-merge-cache", str(work / "cache"), "--lora-merge-dtype", "bfloat16"]
    mergekit += ["--out-shard-size", f"{SHARD_MB}M", "--no-copy-tokenizer"]  # the base has no tokenizer
    synced = and_sync(mergekit, output)
    return [*commands, Command("mergekit + sync", synced, before=partial(clean, work), rounds=peer_rounds)]


def adapterkit(name: str, base: Path, adapter: Path, work: Path) -> Command:
    """Return the merge by adapterkit, which flushes its output itself."""
    argv = python("adapterkit", "merge", base, adapter, "-o", work / "merged")
    return Command(name, argv, before=partial(clean, work))


if __name__ == "__main__":
    main()
