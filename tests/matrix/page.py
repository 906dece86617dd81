"""The page of the matrix: a row for each model type, a column for each recipe."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from .models import LEFT_OUT
from .recipes import RECIPES, UNSAVED

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "classification": "Sequence classification",
    "vision": "Vision and language",
}
INTRODUCTION = """# Architectures

Made by `make matrix`, from tiny random models of transformers {transformers} and adapters that PEFT {peft} saved.

✓ means: the model that transformers loads from the output of `adapterkit merge` has the logits of PEFT's unmerged
model, within 1e-5 in fp32 (in float64, where the model itself rounds by more), and `adapterkit unmerge` restores the base's SHA-256. A number is a reason
[below](#reasons); `a / b` stand for tied and untied embeddings; an empty cell: the recipe does not apply.
A new classifier has `modules_to_save` for what PEFT doesn't save by itself: {unsaved}.
"""

Line = dict[str, Any]


def record(lines: list[Line], versions: dict[str, str]) -> None:
    """Write the results, a line for each model, and the page."""
    models = ",\n".join(json.dumps(line) for line in lines)
    RESULTS.write_text(f'{{"versions": {json.dumps(versions)}, "models": [\n{models}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(lines, versions), encoding="utf-8")


def page(lines: list[Line], versions: dict[str, str]) -> str:
    """Return the page for results."""
    reasons: dict[str, int] = {}
    unsaved = [f"`{'`, `'.join(names)}` ({', '.join(of)})" for names, of in groupby(UNSAVED, UNSAVED.__getitem__)]
    parts = [INTRODUCTION.format(**versions, unsaved=", ".join(unsaved))]
    for task, of_task in groupby(lines, lambda line: line["task"]):
        names = [name for name, recipe in RECIPES.items() if task in recipe.tasks]
        rows = ["| Model type | " + " | ".join(RECIPES[name].title for name in names) + " |"]
        rows.append("| --- |" + " :-: |" * len(names))
        for kind, variants in groupby(of_task, lambda line: line["type"]):
            verdicts = [line["verdicts"] for line in variants]
            cells = [cell([verdict[name] for verdict in verdicts if name in verdict], reasons) for name in names]
            rows.append(f"| {kind} | " + " | ".join(cells) + " |")
        parts.append(f"## {TITLES[task]}\n\n" + "\n".join(rows) + "\n")
    parts.append("## Reasons\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n")
    left_out = [f"{why}: {', '.join(names)}." for why, names in groupby(LEFT_OUT, LEFT_OUT.__getitem__)]
    parts.append("## Left out\n\n" + "\n".join(f"- {line[0].upper()}{line[1:]}" for line in left_out) + "\n")
    return "\n".join(parts)


def cell(verdicts: list[str], reasons: dict[str, int]) -> str:
    """Return ✓, the number of a reason, or two of these; a new reason gets the next number."""
    marks = []
    for verdict in verdicts:
        if verdict in ("ok", "none"):
            marks.append({"ok": "✓", "none": ""}[verdict])
        else:
            marks.append(str(reasons.setdefault(reason(verdict), len(reasons) + 1)))
    return marks[0] if len(set(marks)) == 1 else " / ".join(marks)


def reason(verdict: str) -> str:
    """Return why something is not merged, without the names of one model."""
    for pattern, text in REASONS.items():
        if re.search(pattern, verdict):
            return text
    return re.sub(r"(\w+\.)+\w+", "…", verdict).replace("|", "\\|")[:200]


# What is found in verdicts -> what the page says.
REASONS = {
    "^not run$": "Not run yet.",
    "initialized when the base was resized": "Refused: the vocabulary grew, and the new rows of a bias or an embedding "
    "are random ones, which PEFT doesn't save. Merge into the resized base.",
    "shared by an encoder and a decoder": "Refused: an encoder and a decoder share the embedding, of which PEFT trains "
    "a copy that neither of them calls, except for trained tokens.",
    "modules_to_save cannot be applied to modules of type": "PEFT fails: it saves modules whose names end in "
    "`classifier`, and cannot train them by LoRA as well.",
    "PEFT leaves out the norm": "PEFT leaves out the norm that the model applies to its embeddings.",
    "normalizes the rows of its embedding": "Refused: the model normalizes its embeddings, to which PEFT adds afterwards.",
    "embed_norm.weight": "Refused: the embedding has a norm of its own, which PEFT saves with it.",
    "peft: IndexError: index 96 is out of bounds": "transformers cannot resize this vocabulary.",
    "stores its rows in another order": "Refused: the base stores the rows in another order than the model.",
    "share (the weights of )?one": "Refused: several modules share their weights, and the adapter changes each by itself.",
    "makes one embedding when": "Refused: an encoder and a decoder have different embeddings, which transformers makes one "
    "when it resizes them. Merge into the resized base.",
    "peft: NotImplementedError: .*resiz": "transformers cannot resize this vocabulary.",
}
