"""Measure merging into a 4-bit base: retention of updates, and perplexity on real text; see --help."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.base.quant import ROUNDINGS
from benchmarks.common.paths import BASE, CACHE, ROOT, TEXTS
from benchmarks.common.report import report

ADAPTER = ROOT / "fixtures" / "smollm2-wikisql"
RATIOS = (0.003, 0.01, 0.03, 0.1)  # ‖Δ‖/‖W‖
SIZE, RANK = 1024, 16


def main() -> None:
    """Run both parts, print the tables, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60, help="texts of each kind (default %(default)s)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="a folder with GSM8K's and WikiSQL's test files")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="out-") as directory:
        work = Path(directory)
        tables = [retention_table(work), perplexity_table(work, args.texts, args.samples)]
        report("4-bit bases: retention of updates, and perplexity", tables, output=work, record=args.record)


# --- retention -------------------------------------------------------------------------------------------------------


def retention_table(work: Path) -> str:
    """Merge updates of several sizes into an NF4 weight with every rounding mode; returns retention and error of Δ."""
    rng = torch.Generator().manual_seed(0)
    original = work / "original"
    original.mkdir()
    weight = torch.randn(SIZE, SIZE, generator=rng).mul_(0.02).bfloat16()
    save_file({"m.weight": weight}, original / "model.safetensors")
    (original / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    base = work / "nf4"
    adapterkit.quantize(original, base, to="nf4", nested=True)
    head = ["output", *(f"‖Δ‖/‖W‖ {ratio:.1%}" for ratio in RATIOS)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * len(RATIOS)]
    ways: dict[str, dict[str, Any]] = {"16 bits": {}}
    ways |= {f"NF4 again, {how}": {"quantize": "same", "rounding": how} for how in ROUNDINGS}
    ways |= {f"{name}, onto the original": how | {"original": original} for name, how in ways.items()}
    for name, how in ways.items():
        cells = []
        for ratio in RATIOS:
            adapter = write_adapter(work / "adapter", weight, ratio, rng)
            loss = {"accept_loss": True} if "quantize" in how else {}
            result = adapterkit.merge(base, [adapter], work / "merged", overwrite=True, report=True, **how, **loss)
            retention = result.retention["m.weight"]
            cells.append(f"{retention.retained:.1%}, {retention.error:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Retained share of Δ (100% is perfect), and the error in units of ‖Δ‖."])


def write_adapter(folder: Path, weight: torch.Tensor, ratio: float, rng: torch.Generator) -> Path:
    """Write a LoRA adapter of random factors whose Δ has `ratio` times the norm of `weight`."""
    a = torch.randn(RANK, SIZE, generator=rng)
    b = torch.randn(SIZE, RANK, generator=rng)
    b *= ratio * weight.float().norm() / (b @ a).norm()
    folder.mkdir(exist_ok=True)
    prefix = "base_model.model.m."
    save_file({f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return folder


# --- perplexity ------------------------------------------------------------------------------------------------------


def perplexity_table(work: Path, folder: Path, samples: int) -> str:
    """Return the perplexity of every way to use an adapter trained in 16 bits with a base in NF4."""
    texts = {"WikiSQL, the adapter's own": wikisql(folder, samples), "GSM8K": gsm8k(folder, samples)}
    lines = [f"| SmolLM2-135M + an adapter for WikiSQL | {' | '.join(texts)} |", "|---|" + "--:|" * len(texts)]
    calibration = work / "calibration.txt"  # other texts than the measured ones
    calibration.write_text("\n\n".join(wikisql(folder, 2 * samples)[samples:] + gsm8k(folder, 4 * samples)[samples:]))
    for name, load in ways_to_load(work, calibration):
        model = load()
        cells = [f"{perplexity(model, kind):.3f}" for kind in texts.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        del model
    return "\n".join(
        [*lines, "", f"Perplexity by token over {samples} texts of each kind, computed in bf16 on the CPU."]
    )


def ways_to_load(work: Path, calibration: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return each model's name and a function that loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=False
        ).eval()

    def peft(path: Path, merge: bool) -> Any:
        model = PeftModel.from_pretrained(load(path), ADAPTER)
        return model.merge_and_unload() if merge else model

    base = work / "smollm2-nf4"
    adapterkit.quantize(BASE, base, to="nf4", nested=True)

    def merged(source: Path, **how: Any) -> Path:
        adapterkit.merge(source, [ADAPTER], work / "merged", overwrite=True, **how)
        return work / "merged"

    yield "16-bit base", lambda: load(BASE)
    yield "16-bit base + adapter, merged by adapterkit", lambda: load(merged(BASE))
    yield "NF4 base", lambda: load(base)
    yield "NF4 base + adapter, not merged (PEFT)", lambda: peft(base, merge=False)
    yield "NF4 base + adapter, merged to 16 bits by adapterkit", lambda: load(merged(base))
    yield "the same onto the original", lambda: load(merged(base, original=BASE))
    yield "merged and requantized by PEFT", lambda: peft(base, merge=True)
    roundings: dict[str, dict[str, Any]] = {how: {"rounding": how} for how in ROUNDINGS}
    roundings["calibrated"] = {"rounding": "compensated", "calibration": calibration}
    for name, how in roundings.items():
        again = how | {"quantize": "same", "accept_loss": True}
        yield f"merged and requantized by adapterkit, {name}", lambda again=again: load(merged(base, **again))
        onto = again | {"original": BASE}
        yield f"onto the original and quantized, {name}", lambda onto=onto: load(merged(base, **onto))


def wikisql(folder: Path, samples: int) -> list[str]:
    """Return questions about tables with their queries."""
    lines = (folder / "mlx_wikisql_test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:samples]]


def gsm8k(folder: Path, samples: int) -> list[str]:
    """Return word problems with their worked answers."""
    lines = (folder / "gsm8k_test.jsonl").read_text().splitlines()
    return ["Question: {question}\nAnswer: {answer}".format(**json.loads(line)) for line in lines[:samples]]


@torch.no_grad()
def perplexity(model: Any, texts: list[str]) -> float:
    """Return exp of the mean negative log likelihood of every token but the first of each text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False)
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


if __name__ == "__main__":
    main()
