"""`adapterkit eval BASE [ADAPTER] DATA`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from adapterkit.cli.command import Command
from adapterkit.cli.data_notes import notes_of
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import progress
from adapterkit.errors import UsageError
from adapterkit.train.evaluate_options import EvaluateOptions

USAGE = "adapterkit eval BASE [ADAPTER] DATA"


@click.command(
    "eval",
    cls=Command,
    docs="train.md",
    examples=[
        "adapterkit eval base data.jsonl",
        "adapterkit eval base adapter data.jsonl --limit 100",
    ],
)
@click.argument("paths", nargs=-1, metavar="BASE [ADAPTER] DATA")
@options_of(EvaluateOptions)
@as_json("Print the result as JSON")
def eval_command(given: dict[str, Any], paths: tuple[str, ...], as_json: bool) -> None:
    """DATA has the formats of `train`: texts, prompts with completions, or chats.

    Prints the perplexity and the next-token accuracy over the tokens that count in the loss of `train`. Completes the
    prompts and compares with the expected completions: exact match, answer (`--answer '####\\s*(\\S+)'`), and word
    overlap (F1 as in SQuAD).
    """
    if not 2 <= len(paths) <= 3:
        raise UsageError(f"expected two or three arguments, found {len(paths)}: {USAGE}")
    from adapterkit.api.evaluate import Evaluated, evaluating
    from adapterkit.train.runs.evaluate import Started

    base, *adapters, data = paths
    options = EvaluateOptions(base, data, *adapters, **given)
    with progress("loading") as show, closing(evaluating(options)) as events:
        for event in events:
            if isinstance(event, Evaluated):
                result = event
            elif isinstance(event, Started):
                note(*event.notes, *notes_of(event.data))
            else:
                show(event.done, event.total, event.what)
    if as_json:
        say_result(result.facts())
    else:
        say(*result.lines())
