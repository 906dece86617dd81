"""Time training steps of adapterkit, of PEFT in a plain loop, and of TRL's SFTTrainer; see --help.

Each measurement is a process of its own; the tools alternate, round after round. All use the same records in the same
batches, AdamW (fused), SDPA, a constant learning rate, and no gradient checkpointing:

- even: records of 256 tokens, cut from concatenated text, so that there is no padding;
- uneven: records of GSM8K, question and answer as one text; PEFT and TRL pad to the longest of a batch;
- packed: the same text in rows of 1024 tokens, one row per batch, compared with PEFT's unpacked batches.

Tokens are counted without padding. A first step warms up: it is not timed, but counts for the peak, which is the memory
above that of the loaded model and factors. All cases take about an hour on two cores. `gpu` runs a model with random
weights of the shape of Llama 3 (8B).

"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common.measure import child_environment, python
from benchmarks.common.models import LLAMA3_8B, TINYLLAMA, Llama
from benchmarks.common.paths import BASE, CACHE, ROOT, TEXTS
from benchmarks.common.report import Target, report, targets_table

if TYPE_CHECKING:
    import torch

    from adapterkit.train.data.order import Order
    from adapterkit.train.data.tokenize import Example
    from adapterkit.train.recipe import Recipe

TEXT = TEXTS / "gsm8k_train.jsonl"
# The folder must be named site-packages: dill, in TRL, treats modules elsewhere as the user's own, and copies them.
TRL = CACHE.parent / "trl" / "site-packages"
TRL_NEEDS = ROOT / "benchmarks" / "peers" / "trl.txt"
SHAPES = {"8b": LLAMA3_8B, "1b": TINYLLAMA, "tiny": Llama(hidden=64, intermediate=160, heads=4, kv_heads=2, vocab=96)}
TOOLS = {"adapterkit": "adapterkit", "peft": "PEFT", "trl": "TRL"}
WORDS = {
    "tool": tuple(TOOLS), "method": ("lora", "dora", "qlora"), "dtype": ("fp32", "bf16"), "data": ("even", "uneven"),
    "packing": ("plain", "packed"),
}  # fmt: skip
RANK, ALPHA, LR, ROW = 8, 16.0, 1e-4, 1024
BATCH = {"even": 4, "uneven": 8, "packed": 8}  # records; packed, the text of so many a step
LENGTH = {"even": 256, "uneven": ROW, "packed": ROW}
KINDS = [("lora", "fp32"), ("lora", "bf16"), ("dora", "fp32"), ("dora", "bf16"), ("qlora", "bf16")]


@dataclass(frozen=True)
class Job:
    """The work of one worker process: its command line words, then its options."""

    tool: str
    method: str
    dtype: str
    data: str
    packing: str
    steps: int = 3
    batch: int = 4
    length: int = 256  # of even records, or of the longest; packed, of rows
    device: str = "cpu"
    shape: str = ""  # of a model with random weights, on random tokens, instead of SmolLM2
    layers: int = 32

    def argv(self) -> list[str]:
        """The command that runs it."""
        words = [getattr(self, name) for name in WORDS]
        options = [f"--{name}={value}" for name, value in asdict(self).items() if name not in WORDS and value != ""]
        return python("benchmarks.train", "worker", *words, *options)


@dataclass(frozen=True)
class Outcome:
    """The measurements of a worker."""

    tokens_per_s: float
    step_s: float
    peak_mb: float
    padding: float  # the share of what was computed
    tokens: int
    trained: int
    losses: list[float]


Outcomes = dict[Job, list[Outcome]]


def main() -> None:
    """Measure, print tables and targets, and record them if asked; or run as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each tool and case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="only try the script: one round, one step, two short records"
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="CASE", help="cases to run, such as lora-fp32-even or 'dora-*'"
    )
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    modes = parser.add_subparsers(dest="mode", metavar="gpu | worker")
    work = modes.add_parser("worker", help="measure one tool and print a line of JSON")
    for word, choices in WORDS.items():
        work.add_argument(word, choices=choices)
    add_options(work, ("steps", "batch", "length", "device", "shape", "layers"))
    gpu = modes.add_parser("gpu", help="LoRA and QLoRA of a large model with random weights")
    add_options(gpu, ("device", "layers"), device="cuda")
    gpu.add_argument("--shape", choices=SHAPES, default="8b")
    gpu.add_argument("--length", type=int, default=ROW, help="tokens per record (default %(default)s)")
    gpu.add_argument("--batch", type=int, default=4, help="records per step (default %(default)s)")
    gpu.add_argument(
        "--peak-tflops", type=float, default=989.0, help="peak of the device, dense bf16 (default: an H100's)"
    )
    args = parser.parse_args()
    if args.mode == "worker":
        job = Job(**{name: value for name, value in vars(args).items() if name in Job.__dataclass_fields__})
        print(json.dumps(asdict(work_on(job))))
    elif args.mode == "gpu":
        on_gpu(args)
    else:
        on_cpu(args)


def add_options(parser: argparse.ArgumentParser, names: Iterable[str], **defaults: object) -> None:
    for name in names:
        default = defaults.get(name, Job.__dataclass_fields__[name].default)
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(default %(default)s)")


# --- rounds and reports ----------------------------------------------------------------------------------------------


def on_cpu(args: argparse.Namespace) -> None:
    """Measure every requested case with SmolLM2 on this machine's cores."""
    cases = {
        name: jobs_of(method, dtype, data, args.steps)
        for data in BATCH
        for method, dtype in KINDS
        if any(fnmatch.fnmatchcase(name := f"{method}-{dtype}-{data}", pattern) for pattern in args.only)
    }
    if args.quick:
        args.rounds = 1
        cases = {
            name: [replace(job, steps=1, batch=2, length=min(200, job.length // 4)) for job in jobs]
            for name, jobs in cases.items()
        }
    found = in_rounds([job for jobs in cases.values() for job in jobs], args.rounds)
    tables = [
        table_of({name: jobs for name, jobs in cases.items() if name.endswith(f"-{data}")}, found, data)
        for data in BATCH
        if any(name.endswith(f"-{data}") for name in cases)
    ]
    judged = [target for name, jobs in cases.items() for target in judge(name, jobs, found)]
    trl = next(line for line in TRL_NEEDS.read_text().splitlines() if line.startswith("trl=="))
    notes = [
        f"The first step's loss, before anything is learned, is the same: {agreement(cases.values(), found)}. "
        f"{trl} packs by itself, into other rows; without flash attention it masks a square of all tokens."
    ]
    title = f"training SmolLM2-135M, rank {RANK} on all linear layers, {args.rounds} rounds"
    report(title, [*tables, targets_table(judged), *notes], output=CACHE.parent, record=args.record)


def jobs_of(method: str, dtype: str, data: str, steps: int) -> list[Job]:
    """Return the jobs of one case, ours first; PEFT's job for a packed case is not packed."""
    words = (method, dtype, "even" if data == "even" else "uneven")
    packing = "packed" if data == "packed" else "plain"
    sizes: dict[str, Any] = {"steps": steps, "batch": BATCH[data], "length": LENGTH[data]}
    return [Job(tool, *words, "plain" if tool == "peft" else packing, **sizes) for tool in TOOLS]


def in_rounds(jobs: Sequence[Job], rounds: int) -> Outcomes:
    """Run every job once per round, alternating, so that drift of the machine affects all of them."""
    found: Outcomes = {job: [] for job in jobs}  # PEFT's uneven job is one that two cases look at
    if any(job.tool == "trl" for job in found):
        install_trl()
    for number in range(rounds):
        for job in found:
            done = subprocess.run(job.argv(), cwd=ROOT, env=child_environment(), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stdout}{done.stderr}\nexit status {done.returncode}: {' '.join(job.argv())}")
            outcome = Outcome(**json.loads(done.stdout.splitlines()[-1]))
            found[job].append(outcome)
            name = " ".join([job.tool, job.method, job.dtype, job.data, job.packing])
            rates = f"{outcome.tokens_per_s:8.1f} tokens/s {outcome.peak_mb:8.0f} MB"
            print(f"round {number + 1}/{rounds} {name:34} {rates}", file=sys.stderr)
    return found


def install_trl() -> None:
    """Install TRL and its missing dependencies in a separate folder, so that torch stays the same."""
    if not (TRL / "trl").is_dir():
        pip = python("pip", "install", "--quiet", "--no-deps", "--target", TRL, "-r", TRL_NEEDS)
        subprocess.run(pip, check=True)


def speed(outcomes: Sequence[Outcome]) -> float:
    return median(one.tokens_per_s for one in outcomes)


def peak(outcomes: Sequence[Outcome]) -> float:
    return max(one.peak_mb for one in outcomes)


def table_of(cases: dict[str, list[Job]], found: Outcomes, data: str) -> str:
    """Return the measurements of some cases as a Markdown table, relative to PEFT's."""
    lines = [
        "| case | tool | tokens/s, median [min-max] | step s | MB beyond the weights | tokens/s / PEFT | MB / PEFT |"
        " padding | loss, first and last |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, jobs in cases.items():
        peer = next(found[job] for job in jobs if job.tool == "peft")
        for job in jobs:
            own, last = found[job], found[job][-1]
            speeds = [one.tokens_per_s for one in own]
            tool = TOOLS[job.tool] + (", not packed" if data == "packed" and job.packing == "plain" else "")
            cells = [
                name.removesuffix(f"-{data}"), tool, f"{speed(own):.1f} [{min(speeds):.1f}-{max(speeds):.1f}]",
                f"{median(one.step_s for one in own):.2f}", f"{peak(own):.0f}", f"{speed(own) / speed(peer):.2f}",
                f"{peak(own) / peak(peer):.2f}", f"{last.padding:.0%}", f"{last.losses[0]:.3f}, {last.losses[-1]:.3f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    what = {
        "even": "batches of 4 × 256 tokens", "uneven": "batches of 8 records",
        "packed": "the same text in rows of 1024 tokens, one a batch",
    }[data]  # fmt: skip
    return "\n".join([f"{data.capitalize()}: {what}.", "", *lines])


def judge(name: str, jobs: Sequence[Job], found: Outcomes) -> Iterator[Target]:
    """Compare one case with the targets, which are for LoRA and DoRA."""
    ours, peer = (found[next(job for job in jobs if job.tool == tool)] for tool in ("adapterkit", "peft"))
    if name.startswith("qlora"):
        return
    ratio, share = speed(ours) / speed(peer), peak(ours) / peak(peer)
    least = 2.5 if name.endswith("-packed") else 1.4
    yield Target(f"{name}: at least {least} x PEFT's tokens/s", f"{ratio:.2f} x", ratio >= least)
    if not name.endswith("-packed"):  # other rows, other tokens at a time
        yield Target(f"{name}: at most 0.6 x its memory beyond the weights", f"{share:.2f} x", share <= 0.6)


def agreement(cases: Iterable[list[Job]], found: Outcomes) -> str:
    """Return the largest difference between the tools' first losses, for each dtype, over equal batches."""
    apart: dict[str, float] = {}
    for jobs in cases:
        if all(job.packing == "plain" for job in jobs):
            first = [found[job][0].losses[0] for job in jobs]
            apart[jobs[0].dtype] = max(apart.get(jobs[0].dtype, 0.0), max(first) / min(first) - 1)
    return ", ".join(f"within {off:.1e} in {dtype}" for dtype, off in apart.items()) or "not compared"


def on_gpu(args: argparse.Namespace) -> None:
    """Measure LoRA and QLoRA on a device, with the installed tools."""
    tools = [tool for tool in TOOLS if tool != "trl" or (TRL / "trl").is_dir() or find_spec("trl")]
    tools = [tool for tool in tools if tool != "peft" or find_spec("peft")]
    options = {name: getattr(args, name) for name in ("batch", "length", "device", "shape", "layers", "steps")}
    methods = ["lora", *(["qlora"] if find_spec("bitsandbytes") else [])]
    jobs = [Job(tool, method, "bf16", "even", "plain", **options) for method in methods for tool in tools]
    found = in_rounds(jobs, args.rounds)
    lines = ["| method | tool | tokens/s, median [min-max] | TFLOP/s | of the peak | MB beyond the weights |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for job, outcomes in found.items():
        speeds = [one.tokens_per_s for one in outcomes]
        flops = speed(outcomes) * flops_per_token(SHAPES[job.shape], job.layers, job.length, outcomes[0].trained)
        rates = f"{flops / 1e12:.1f} | {flops / 1e12 / args.peak_tflops:.1%}"
        spread = f"{speed(outcomes):.0f} [{min(speeds):.0f}-{max(speeds):.0f}]"
        lines.append(f"| {job.method} | {TOOLS[job.tool]} | {spread} | {rates} | {peak(outcomes):.0f} |")
    note = (
        "FLOP of a token: 4 for each frozen weight of a linear layer (2 forward, 2 back to its input), 6 for each "
        "trained one, 6 · layers · length · hidden for causal attention (2 forward, 4 backward). "
        f"Peak: {args.peak_tflops:.0f} TFLOP/s. Not installed: {', '.join(set(TOOLS) - set(tools)) or 'nothing'}."
    )
    title = f"training on {args.device}, {args.shape} shape, {args.layers} layers, {args.batch} × {args.length} tokens"
    report(title, ["\n".join(lines), note], output=CACHE.parent, record=args.record)


def flops_per_token(shape: Llama, layers: int, length: int, trained: int) -> float:
    """Return the FLOPs per token of training factors on a frozen model; see the note that `on_gpu` writes."""
    linear = layers * sum(out * inner for out, inner in shape.linears().values()) + shape.vocab * shape.hidden
    return 4.0 * linear + 6.0 * trained + 6.0 * layers * length * shape.hidden


# --- workers ---------------------------------------------------------------------------------------------------------


class Meter:
    """Times steps, and measures the peak memory from when the model was loaded."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.before, self.ends = device != "cpu", 0, [0.0]
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.trained, self.computed = 0, 0

    def begin(self, model: Any) -> None:
        """Load all pages of the model and factors, release other memory, and reset the peak."""
        import torch

        for parameter in model.parameters():  # those of a file are mapped, and read when they are used
            parameter.detach().sum()
        self.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
            self.before = of_process("VmRSS")
        self.ends = [time.perf_counter()]

    def step(self, loss: float, tokens: int, places: int) -> None:
        """Record a step of so many tokens, and so many positions with padding."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.computed += places

    def outcome(self) -> Outcome:
        """Return the measurements without the first step, which warmed up."""
        import torch

        peak = torch.cuda.max_memory_allocated() if self.on_gpu else of_process("VmHWM")
        seconds = [end - start for start, end in zip(self.ends[1:], self.ends[2:], strict=False)]
        tokens = sum(self.tokens[1:])
        padding = 1.0 - sum(self.tokens) / self.computed
        return Outcome(
            tokens / sum(seconds), median(seconds), (peak - self.before) / 1e6, padding, tokens, self.trained,
            self.losses,
        )  # fmt: skip


def of_process(key: str) -> int:
    """Return a memory size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def work_on(job: Job) -> Outcome:
    """Run a worker's job."""
    if job.tool == "peft" and job.packing == "packed":
        raise SystemExit("PEFT has no packing of its own")
    meter, order = Meter(job.device), order_of(job)
    {"adapterkit": by_adapterkit, "peft": by_peft, "trl": by_trl}[job.tool](job, order, meter)
    return meter.outcome()


def recipe_of(job: Job) -> Recipe:
    """Return the recipe of the run."""
    from adapterkit.train.recipe import Recipe

    packed = job.packing == "packed"
    return Recipe(
        str(BASE), str(TEXT), "dora" if job.method == "dora" else "lora", "nf4" if job.method == "qlora" else "none",
        RANK, ALPHA, "all-linear", batch_size=1 if packed else job.batch, max_length=job.length, packing=packed, lr=LR,
        schedule="constant", warmup=0.0, dtype=job.dtype, device=job.device,
    )  # fmt: skip


def order_of(job: Job) -> Order:
    """Return the batches: one to warm up, then the timed ones; if packed, the rows of their text."""
    from adapterkit.train.data.order import Order

    return Order.of(list(examples_of(job, job.batch * (job.steps + 1))), recipe_of(job))


def examples_of(job: Job, count: int) -> Iterator[Example]:
    """Return the first `count` records as tokens, or as many pieces of all of them concatenated."""
    import numpy as np

    from adapterkit.base.checkpoint import open_checkpoint
    from adapterkit.base.models.loading import load_tokenizer
    from adapterkit.train.data.records import Record
    from adapterkit.train.data.tokenize import Example, encode

    def piece(ids: Any, number: int) -> Example:
        return Example(np.asarray(ids, np.int32), np.arange(len(ids)) > 0, f"piece {number}")

    if job.shape:
        ids = np.random.default_rng(0).integers(1, SHAPES[job.shape].vocab, (count, job.length))
        yield from map(piece, ids, range(count))
        return
    tokenizer = load_tokenizer(open_checkpoint(BASE))
    with TEXT.open(encoding="utf-8") as stream:
        rows = map(json.loads, stream)
        texts = (Record("", text=f"{row['question']}\n{row['answer']}") for row in rows)
        encoded = (
            cast("Example", encode(text, tokenizer, job.length if job.data == "uneven" else ROW)) for text in texts
        )
        if job.data == "uneven":
            yield from (one for one, _ in zip(encoded, range(count), strict=False))
            return
        left = np.empty(0, np.int32)
        for number in range(count):
            while len(left) < job.length:
                left = np.concatenate([left, next(encoded).ids])
            yield piece(left[: job.length], number)
            left = left[job.length :]


def by_adapterkit(job: Job, order: Order, meter: Meter) -> None:
    """Run the steps of `adapterkit train`."""
    from adapterkit.base.checkpoint import open_checkpoint
    from adapterkit.train.causal_lm import CausalModel
    from adapterkit.train.loop import Loop
    from adapterkit.train.runs.load_model import TORCH_DTYPES, choose_device, load_model
    from adapterkit.train.runs.prepare_model import prepare

    recipe = recipe_of(job)
    if job.shape:
        model, base = CausalModel(random_model(job)), cast(Any, None)  # only LoftQ would look at the base
    else:
        device = choose_device(job.device)
        base = open_checkpoint(BASE)
        model = load_model(base, TORCH_DTYPES[job.dtype], device, recipe.quantize)
    prepare(model, recipe, base)
    loop = Loop(model, order, recipe)
    meter.begin(model.model)
    for _ in range(order.steps):
        event = loop.advance()
        meter.step(event.loss, event.tokens, event.tokens)


def by_peft(job: Job, order: Order, meter: Meter) -> None:
    """Run the usual training loop with PEFT."""
    from benchmarks.peers.peft_train import lora, train

    batches = [[row[0].ids.tolist() for row in order.step(number)] for number in range(order.steps)]
    train(peer_model(job), lora(RANK, ALPHA, job.method == "dora"), batches, LR, meter.begin, meter.step)


def by_trl(job: Job, order: Order, meter: Meter) -> None:
    """Run SFTTrainer, from its separate folder; it does its own packing."""
    sys.path.append(str(TRL))
    from benchmarks.peers.peft_train import lora
    from benchmarks.peers.trl_sft import train

    records = [one.ids.tolist() for number in range(order.steps) for row in order.step(number) for one in row]
    batch, room = (1, job.length) if job.packing == "packed" else (job.batch, None)
    config = lora(RANK, ALPHA, job.method == "dora")
    train(peer_model(job), records, config, batch, room, LR, meter.begin, meter.step)


def peer_model(job: Job) -> Any:
    """Load the model as the peers do."""
    from adapterkit.train.runs.load_model import TORCH_DTYPES
    from benchmarks.peers.peft_train import load

    return random_model(job) if job.shape else load(BASE, TORCH_DTYPES[job.dtype], job.device, job.method == "qlora")


def random_model(job: Job) -> Any:
    """Make a Llama model with random weights on the device, with linear layers in NF4 for QLoRA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapterkit.train.runs.load_model import TORCH_DTYPES

    shape, attention = SHAPES[job.shape], cast(Any, {"attn_implementation": "sdpa"})
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=job.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        use_cache=False, tie_word_embeddings=False, **attention,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(TORCH_DTYPES[job.dtype])
    with torch.device(job.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if job.method == "qlora":
        for name, layer in list(model.model.named_modules()):
            if type(layer) is torch.nn.Linear:
                model.model.set_submodule(name, in_nf4(layer))
        model.is_loaded_in_4bit = True  # by which PEFT knows
    return model


def in_nf4(layer: torch.nn.Linear) -> Any:
    """Quantize a layer with bitsandbytes."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    weight = layer.weight.detach()
    made.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(weight.device)
    return made


if __name__ == "__main__":
    main()
