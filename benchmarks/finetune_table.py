"""Compare full fine-tuning, LoRA, QLoRA and DoRA on WikiSQL in one table; see --help.

SmolLM2-135M learns to write queries for questions: each text of WikiSQL is a prompt, up to its last `A:`, and a
completion, on which alone the loss is computed. Every configuration is trained in a process of its own, by
`adapterkit.train.runs.train`, and scored by `adapterkit eval`, with three seeds in the table and one for each varied
setting. The table is for the test records, the varied settings for the validation records. Results are stored as JSON
in .cache/bench, so that an interrupted run continues; remove a file there to measure it again.

--reduced takes about 40 minutes on two idle cores, --full is for a GPU, --quick only tries the script.

"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.measure import child_environment, python
from benchmarks.common.paths import BASE, CACHE, ROOT, TEXTS
from benchmarks.common.report import report

ANSWER = "\nA:"
BATCH, ROOM, EVAL_BATCH = 8, 512, 50
Facts = dict[str, Any]
Varied = dict[str, dict[float | str, Facts]]


@dataclass(frozen=True)
class Scale:
    """The amounts to train and read; the middle of each range is used while others are varied."""

    records: int
    epochs: float
    tests: int
    dtype: str
    seeds: int
    ranks: tuple[int, ...]
    ratios: tuple[float, ...]  # alpha / rank
    sizes: tuple[int, ...]
    rates: tuple[float, ...]
    full_rates: tuple[float, ...]


# A record has 93 tokens, and two idle cores train about 500 a second: 240 records take 45 s, 55 s with startup.
# Generating 100 queries and reading the records takes 45 s, reading alone 12 s. So with --reduced the table takes
# 3 · (4 · 55 s + 4 · 45 s) = 20 min, and the 17 varied settings 17 · (55 s + 12 s) = 19 min.
SCALES = {
    "reduced": Scale(
        240, 1, 100, "fp32", 3, (1, 2, 4, 16, 32, 64), (0.5, 1, 4, 8), (60, 120, 480), (1e-4, 2e-3), (1e-5, 2e-4)
    ),
    "full": Scale(
        1000, 3, 100, "auto", 3, (1, 2, 4, 16, 32, 64), (0.25, 0.5, 1, 4, 8), (125, 250, 500),
        (2e-5, 1e-4, 2e-3, 5e-3), (1e-5, 2e-4),
    ),
    "quick": Scale(2, 1, 2, "fp32", 1, (1,), (1,), (1,), (1e-4,), (1e-5,)),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A training configuration: a row of the table, or one with a varied setting."""

    method: str = "lora"
    rank: int = 8
    ratio: float = 2.0
    targets: str = "all-linear"
    records: int = 0
    lr: float = 5e-4
    seed: int = 0

    @property
    def name(self) -> str:
        """The stem of its file names."""
        factors = "" if self.method == "full" else f"-r{self.rank}-x{self.ratio:g}-{self.targets.replace(',', '+')}"
        return f"{self.method}{factors}-n{self.records}-lr{self.lr:g}-s{self.seed}"

    @property
    def quantize(self) -> str:
        """The storage of the base."""
        return "nf4" if self.method == "qlora" else "none"

    def recipe(self, data: Path, scale: Scale) -> Facts:
        """The options of `adapterkit train`."""
        common = {"base": str(BASE), "data": str(data), "lr": self.lr, "seed": self.seed, "epochs": scale.epochs}
        common |= {"dtype": scale.dtype, "batch_size": BATCH, "max_length": ROOM, "save_every": 10**6}
        if self.method == "full":
            return common | {"method": "full"}
        factors = {"rank": self.rank, "alpha": self.ratio * self.rank, "targets": self.targets}
        return common | factors | {"method": self.method.removeprefix("q"), "quantize": self.quantize}


NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA (NF4)", "dora": "DoRA"}
FULL_RATE = 5e-5  # full fine-tuning needs smaller steps


def main() -> None:
    """Measure what is not stored yet, print the tables and record them if asked; or train as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = Path("/dev/nvidia0").exists()
    parser.set_defaults(scale="full" if on_gpu else "reduced")
    for name in SCALES:
        parser.add_argument(f"--{name}", dest="scale", action="store_const", const=name)
    parser.add_argument(
        "--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md, and draw it"
    )
    parser.add_argument("--worker", nargs=2, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train_one(json.loads(args.worker[0]), Path(args.worker[1]))
        return
    scale, work = SCALES[args.scale], CACHE / f"finetune-{args.scale}"
    bench = Bench(scale, work)
    rows: dict[str, list[Facts]] = {method: [] for method in NAMES}
    for seed in range(scale.seeds):  # methods alternate, so that drift of the machine affects all of them
        for method in NAMES:
            rows[method].append(bench.measured(replace(default_of(method, scale), seed=seed), "test"))
    before = {quantize: bench.score([], quantize, "test") for quantize in ("none", "nf4")}
    varied: Varied = {
        what: {value: bench.measured(one, "valid") for value, one in settings.items()}
        for what, settings in variations(scale).items()
    }
    for left in work.glob("full-*/"):
        shutil.rmtree(left)
    picture = (ROOT / "benchmarks" if args.record else work) / (
        "finetune.svg" if args.scale == "reduced" else f"finetune-{args.scale}.svg"
    )
    draw(varied, picture)
    epochs = f"{scale.epochs:g} epoch{'' if scale.epochs == 1 else 's'}"
    note = (
        f"{scale.records} records, {epochs}, batches of {BATCH}, AdamW, cosine, dtype {scale.dtype}; rank 8, alpha 16, "
        f"all linear layers, lr {Setting().lr:g}, in full fine-tuning {FULL_RATE:g}. Scored on {scale.tests} test "
        f"records; median [min-max] of {scale.seeds} seeds. Memory is the whole process's, or the device's."
    )
    whole = rows["full"][0]["parameters"]
    tables = [table(rows, before, whole), note, varied_table(varied), f"![What settings do]({picture.name})"]
    report(f"fine-tuning SmolLM2-135M on WikiSQL, {args.scale}", tables, output=CACHE, record=args.record)


def default_of(method: str, scale: Scale) -> Setting:
    """Return a row of the table with the first seed."""
    lr = FULL_RATE if method == "full" else Setting().lr
    return Setting(method, records=scale.records, lr=lr)


def variations(scale: Scale) -> dict[str, dict[float | str, Setting]]:
    """Return LoRA settings with one value varied at a time, in order, and learning rates of full fine-tuning."""
    lora, full = default_of("lora", scale), default_of("full", scale)

    def vary(one: Setting, field: str, values: Sequence[float]) -> dict[float | str, Setting]:
        return {value: replace(one, **{field: value}) for value in sorted({*values, getattr(one, field)})}

    return {
        "rank": vary(lora, "rank", scale.ranks),
        "alpha / rank": vary(lora, "ratio", scale.ratios),
        "records": vary(lora, "records", scale.sizes),
        "learning rate": vary(lora, "lr", scale.rates),
        "learning rate, full": vary(full, "lr", scale.full_rates),
        "layers": {"all linear": lora, "q, v": replace(lora, targets="q_proj,v_proj")},
    }


# --- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The measurements at one scale, stored in a folder."""

    def __init__(self, scale: Scale, work: Path) -> None:
        self.scale, self.work = scale, work
        work.mkdir(parents=True, exist_ok=True)
        for name in ("train", "valid", "test"):
            texts = [json.loads(line)["text"] for line in (TEXTS / f"mlx_wikisql_{name}.jsonl").open(encoding="utf-8")]
            random.Random(0).shuffle(texts)  # adjacent texts are about the same table
            write_records(work / f"{name}.jsonl", texts if name == "train" else texts[: scale.tests])

    def measured(self, setting: Setting, data: str) -> Facts:
        """Return the measurements of training, and the scores on `data`."""
        out, stored = self.work / setting.name, self.work / f"{setting.name}.json"
        records = self.work / f"train-{setting.records}.jsonl"
        recipe = setting.recipe(records, self.scale)
        facts: Facts = json.loads(stored.read_text()) if stored.is_file() else {}
        if facts.get("recipe") != recipe or (data not in facts and not out.is_dir()):
            lines = (self.work / "train.jsonl").read_text().splitlines(keepends=True)
            records.write_text("".join(lines[: setting.records]))
            worker = python("benchmarks.finetune_table", "--worker", json.dumps(recipe), out)
            facts = {"recipe": recipe, **run(worker, setting.name)}
            save(stored, facts)
        if data not in facts:
            facts[data] = self.score([setting.name], setting.quantize, data)
            save(stored, facts)
        return facts

    def score(self, names: list[str], quantize: str, data: str) -> Facts:
        """Return the scores of the base or a trained model by `adapterkit eval`; generates text for test records."""
        stored = self.work / f"base-{quantize}-{data}.json"
        if not names and stored.is_file():
            found: Facts = json.loads(stored.read_text())
            return found
        models = [self.work / name for name in names]
        if not names or not names[0].startswith("full-"):
            models.insert(0, BASE)
        argv = python("adapterkit", "eval", *models, self.work / f"{data}.jsonl", "--json")
        argv += ["--dtype", self.scale.dtype, "--quantize", quantize, "--batch-size", str(EVAL_BATCH)]
        argv += ["--max-length", str(ROOM), "--generate" if data == "test" else "--no-generate"]
        found = run(argv, f"{' '.join(names) or 'base'} on {data}")
        if not names:
            save(stored, found)
        return found


def write_records(file: Path, texts: Sequence[str]) -> None:
    """Write texts as prompts with completions."""
    rows = []
    for text in texts:
        prompt, answer, completion = text.rpartition(ANSWER)
        rows.append(json.dumps({"prompt": prompt + answer, "completion": completion}))
    file.write_text("".join(f"{row}\n" for row in rows))


def run(argv: Sequence[str], name: str) -> Facts:
    """Run a process that prints JSON; if it fails, so does the benchmark."""
    start = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nexit status {done.returncode}: {shlex.join(argv)}")
    print(f"{name:48} {time.perf_counter() - start:7.1f} s", file=sys.stderr)
    found: Facts = json.loads(done.stdout)
    return found


def save(file: Path, facts: Facts) -> None:
    """Write a JSON file atomically."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1))
    partial.replace(file)


def train_one(recipe: Facts, out: Path) -> None:
    """Train by `recipe`, and print the measurements as JSON."""
    from adapterkit.train.recipe import Recipe
    from adapterkit.train.runs import train
    from adapterkit.train.runs.run import Started, Trained

    facts: Facts = {}
    for event in train(Recipe(**recipe), out, overwrite=True):
        if isinstance(event, Started):
            facts |= {"trained": event.trained, "parameters": event.parameters}
        elif isinstance(event, Trained):
            facts |= {"peak": event.peak_memory, "seconds": event.progress.seconds, "tokens": event.progress.tokens}
            facts |= {"steps": event.progress.step, "loss": event.progress.loss}
    print(json.dumps(facts))


# --- showing ---------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], form: str) -> str:
    """Format the median and, of several values, the minimum and the maximum."""
    found = sorted(values)
    middle = format(median(found), form)
    return middle if len(found) == 1 else f"{middle} [{found[0]:{form}}-{found[-1]:{form}}]"


def table(rows: dict[str, list[Facts]], before: dict[str, Facts], whole: int) -> str:
    """Return the table, with rows for the untrained bases; shares are of the model's `whole` parameters."""
    lines = [
        "| method | trained | of all | peak MB | time / full | perplexity | exact match | F1 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for quantize, name in {"none": "none: the base", "nf4": "none: the base in NF4"}.items():
        lines.append(f"| {name} | 0 | 0% | | | {' | '.join(scores([before[quantize]]))} |")
    took = median(facts["seconds"] for facts in rows["full"])
    for method, runs in rows.items():
        trained = runs[0]["trained"]
        cells = [
            NAMES[method], f"{trained:,}", f"{trained / whole:.2%}", f"{max(one['peak'] for one in runs) / 1e6:.0f}",
            spread((one["seconds"] / took for one in runs), ".2f"), *scores([one["test"] for one in runs]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scores(found: Sequence[Facts]) -> list[str]:
    """Return perplexity, exact match and F1."""
    return [
        spread((one["perplexity"]["by_token"] for one in found), ".3f"),
        spread((one["completed"]["exact"] for one in found), ".1%"),
        spread((one["completed"]["f1"] for one in found), ".1%"),
    ]


def varied_table(varied: Varied) -> str:
    """Return the table of varied settings and their scores."""
    lines = ["| varied | | trained | perplexity, validation | seconds |", "|---|--:|--:|--:|--:|"]
    for what, found in varied.items():
        for value, facts in found.items():
            shown = value if isinstance(value, str) else f"{value:g}"
            perplexity = facts["valid"]["perplexity"]["by_token"]
            lines.append(f"| {what} | {shown} | {facts['trained']:,} | {perplexity:.3f} | {facts['seconds']:.0f} |")
    return "\n".join(lines)


def draw(varied: Varied, file: Path) -> None:
    """Plot perplexity over each varied number."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "adapterkit"  # makes the file reproducible
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, what in zip(panels, ("rank", "alpha / rank", "records", "learning rate"), strict=True):
        for line, name in ((what, "LoRA"), (f"{what}, full", NAMES["full"])):
            if line in varied:
                losses = [facts["valid"]["perplexity"]["by_token"] for facts in varied[line].values()]
                panel.plot(list(varied[line]), losses, marker="o", label=name)
        panel.set_xscale("log", base=10 if what == "learning rate" else 2)
        if what != "learning rate":
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(what)
        panel.grid(alpha=0.3)
    panels[1].legend(*panels[-1].get_legend_handles_labels(), frameon=False)
    panels[0].set_ylabel("perplexity, validation")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
