"""`adapterkit eval BASE [ADAPTER] DATA`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.data_notes import notes_of
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import progress
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import Destination, staged
from adapterkit.text import counted
from adapterkit.train.data.records import Fields
from adapterkit.train.recipe import DTYPES, QUANTIZE, Recipe

if TYPE_CHECKING:
    from adapterkit.train.runs.evaluate import Request, Scored, Started
    from adapterkit.train.runs.metrics import Prediction

USAGE = "adapterkit eval BASE [ADAPTER] DATA"
COLUMNS = ["where", "prompt", "expected", "completion", "exact", "f1"]  # of every prediction, in this order
MAX_ROW_BYTES = 100_000_000


def _field_options(command: Callable[..., None]) -> Callable[..., None]:
    """What the data calls its fields, as `train` has it."""
    table = {one.name: one for one in fields(Recipe)}
    for field in reversed(fields(Fields)):
        one = table[f"{field.name}_field"]
        flag, about = f"--{field.name}-field", one.metadata["help"]
        command = click.option(flag, default=one.default, show_default=True, help=about)(command)
    return command


@click.command("eval")
@click.argument("paths", nargs=-1, metavar="BASE [ADAPTER] DATA")
@click.option("--max-length", type=int, default=1024, show_default=True,
              help="Longer records are cut to so many tokens.")  # fmt: skip
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records in memory at a time.")
@click.option("--limit", type=int, help="Only the first so many records.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", help="Compute in this; auto: as the base is stored."
)
@click.option("--device", default="auto", metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:N, or auto.")
@click.option("--quantize", type=click.Choice(QUANTIZE), default="none", help="Hold the base's layers in 4 bits.")
@_field_options
@click.option("--skip-bad", is_flag=True, help="Leave out records that are empty or malformed, rather than stop.")
@click.option("--generate/--no-generate", default=None,
              help="Have prompts completed. Default: where there are prompts with completions.")  # fmt: skip
@click.option("--max-new-tokens", type=int,
              help="How long completions may be. Default: as the longest in DATA, and a few tokens more.")  # fmt: skip
@click.option("--answer", metavar="REGEX",
              help="The part of a completion that has to be right, by the first group of the last match.")  # fmt: skip
@click.option("--predictions", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write what was completed, as JSON lines.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def eval_command(
    paths: tuple[str, ...], max_length: int, batch_size: int, limit: int | None, dtype: str, device: str,
    quantize: str, skip_bad: bool, generate: bool | None, max_new_tokens: int | None, answer: str | None,
    predictions: str | None, overwrite: bool, as_json: bool, **names: str,
) -> None:  # fmt: skip
    """Measure how well BASE, with ADAPTER or without, does on the records of DATA.

    DATA is as for `train`: texts, prompts with completions, or conversations. Of what counts there, the perplexity is
    printed and how often the next token was the likeliest; of prompts, whether the model completes them as expected:
    exactly, by the answer (`--answer '####\\s*(\\S+)'`), and by the words of both (F1 as SQuAD has it).
    """
    if not 2 <= len(paths) <= 3:
        raise UsageError(f"expected two or three arguments, found {len(paths)}: {USAGE}")
    base, *adapters, data = paths
    if os.path.isdir(data):
        raise UsageError(f"{data}: is a directory, expected the records to evaluate on: {USAGE}")
    if predictions is None and overwrite:
        raise UsageError("--overwrite is about the file of --predictions, which is not given")
    if predictions is not None:
        if generate is False:
            raise UsageError("--predictions is about what the model writes, which --no-generate leaves out")
        generate = True
    file = None if predictions is None else _destination(Path(predictions), paths, overwrite)
    from adapterkit.train.runs.evaluate import Request

    request = Request(
        base, data, adapters[0] if adapters else None, max_length, batch_size, limit, dtype, device, quantize,
        Fields(**{name.removesuffix("_field"): value for name, value in names.items()}), skip_bad, generate,
        max_new_tokens, answer,
    )  # fmt: skip
    began = time.perf_counter()
    with staged(file) if file else nullcontext() as new:
        started, scored = _run(request)
        if new is not None:
            lines = [json.dumps(_row(one), ensure_ascii=False) + "\n" for one in scored.predictions]
            new.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    facts = _facts(request, started, scored, time.perf_counter() - began) | {"output": predictions}
    if as_json:
        say_result(facts)
    else:
        say(*_lines(facts))


def _destination(out: Path, paths: Sequence[str], overwrite: bool) -> Destination:
    """Where predictions go, once they may be written."""
    from adapterkit.hub import place_of

    *models, data = paths
    inputs = (*map(place_of, models), Path(data).expanduser())
    destination = Destination(out, inputs, directory=False, overwrite=overwrite, ours=_are_predictions)
    destination.check()
    return destination


def _are_predictions(file: Path) -> bool:
    """Whether a file begins with a row as `--predictions` writes them."""
    try:
        with open_regular(file) as stream:
            line = stream.readline(MAX_ROW_BYTES)
        return not line or list(json.loads(line))[: len(COLUMNS)] == COLUMNS
    except (ValueError, TypeError, FormatError):
        return False


def _run(request: Request) -> tuple[Started, Scored]:
    """Evaluate, show how far it is, and note what is otherwise than expected."""
    from adapterkit.train.runs.evaluate import Completed, Read, Scored, Started, evaluate

    started: Started | None = None
    with progress("loading") as show:
        for event in evaluate(request):
            if isinstance(event, Started):
                started = event
                _note(event)
            elif isinstance(event, Read | Completed):
                show(event.done, event.total, "reading" if isinstance(event, Read) else "completing")
            elif isinstance(event, Scored):
                assert started is not None
                return started, event
    raise AssertionError("an evaluation ends with its result")


# --- what is printed -------------------------------------------------------------------------------------------------


def _note(event: Started) -> None:
    note(*event.notes, *notes_of(event.data))


def _row(one: Prediction) -> dict[str, Any]:
    row = {
        "where": one.where, "prompt": one.prompt, "expected": one.expected, "completion": one.completion,
        "exact": one.exact, "f1": one.f1,
    }  # fmt: skip
    return row if one.right is None else row | {"right": one.right}


def _facts(request: Request, started: Started, scored: Scored, seconds: float) -> dict[str, Any]:
    data, likelihood = started.data, scored.likelihood
    completed = {
        "prompts": started.prompts, "max_new_tokens": started.max_new_tokens, "exact": scored.exact, "f1": scored.f1,
        "answer": request.answer, "accuracy": scored.accuracy,
    }  # fmt: skip
    return {
        "base": request.base,
        "adapter": request.adapter,
        "data": request.data,
        "records": len(data.examples),
        "tokens": data.tokens,
        "counted": data.counted,
        "max_length": request.max_length,
        "truncated": list(data.truncated),
        "left_out": [{"where": one.where, "why": one.why} for one in data.bad],
        "loss": likelihood.loss,
        "perplexity": {"by_token": likelihood.by_token, "by_sequence": likelihood.by_sequence},
        "next_token": likelihood.next_token,
        "completed": completed if started.prompts else None,
        "device": started.device,
        "dtype": started.dtype,
        "quantize": request.quantize,
        "seconds": round(seconds, 3),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    cut, out, perplexity = len(facts["truncated"]), len(facts["left_out"]), facts["perplexity"]
    details = [counted(facts["tokens"], "token"), f"{facts['counted']:,} counted"]
    details += [f"{cut:,} cut to {facts['max_length']:,}"] * bool(cut) + [f"{out:,} left out"] * bool(out)
    lines = [
        f"records    {facts['records']:,} ({', '.join(details)})",
        f"perplexity {_digits(perplexity['by_token'])} by token, {_digits(perplexity['by_sequence'])} by sequence",
        f"next token {facts['next_token']:.1%} right",
    ]
    if completed := facts["completed"]:
        lines += [
            f"completed  {counted(completed['prompts'], 'prompt')}, "
            f"with up to {counted(completed['max_new_tokens'], 'token')}",
            f"exact      {completed['exact']:.1%}",
            f"F1         {completed['f1']:.1%}",
        ]
        if completed["accuracy"] is not None:
            lines.append(f"answer     {completed['accuracy']:.1%} right")
    lines.append(f"took       {facts['seconds']:.1f} s on {facts['device']} in {facts['dtype']}")
    return lines + ([f"wrote      {facts['output']}"] if facts["output"] else [])


def _digits(value: float) -> str:
    """Four of them."""
    return f"{value:#.4g}".rstrip(".")
