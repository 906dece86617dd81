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

from adapterkit.cli.command import Command
from adapterkit.cli.data_notes import notes_of
from adapterkit.cli.options import Spelled
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import progress
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import DTYPE_SPELLINGS
from adapterkit.files.staging import Destination, staged
from adapterkit.options import parameters
from adapterkit.text import counted
from adapterkit.train.data.records import Fields
from adapterkit.train.recipe import DTYPES, QUANTIZE, Recipe

if TYPE_CHECKING:
    from adapterkit.train.runs.answer_scores import Prediction
    from adapterkit.train.runs.evaluate import Request, Scored, Started

USAGE = "adapterkit eval BASE [ADAPTER] DATA"
COLUMNS = ["where", "prompt", "expected", "completion", "exact", "f1"]  # of a prediction, in the order written
MAX_ROW_BYTES = 100_000_000


def _field_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the `--…-field` options of `train`."""
    recipe = {one.name: one for one in parameters(Recipe)}
    for field in reversed(fields(Fields)):
        key = recipe[f"{field.name}_field"]
        flag, about = f"--{field.name}-field", key.about.help
        command = click.option(flag, default=key.default, show_default=True, help=about)(command)
    return command


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
@click.option("--max-length", type=int, default=1024, show_default=True,
              help="Truncate records to this many tokens")  # fmt: skip
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records per batch")
@click.option("--limit", type=int, help="Evaluate only the first N records", metavar="N")
@click.option(
    "--dtype",
    type=Spelled(DTYPES, DTYPE_SPELLINGS),
    default="auto",
    help="Compute dtype [auto: the base's stored dtype]",
)
@click.option("--device", default="auto", metavar="DEVICE", help="Compute device: cpu, cuda, cuda:N or auto")
@click.option("--quantize", type=click.Choice(QUANTIZE), default="none",
              help="Load the base's linear layers in 4 bits")  # fmt: skip
@_field_options
@click.option("--skip-bad", is_flag=True, help="Skip empty or malformed records instead of failing")
@click.option("--generate/--no-generate", default=None,
              help="Complete the prompts [default: if records have prompts and completions]")  # fmt: skip
@click.option("--max-new-tokens", type=int,
              help="Maximum length of a completion [default: the longest in DATA, plus a few tokens]")  # fmt: skip
@click.option("--answer", metavar="REGEX",
              help="Score the answer in a completion: the first group of the last match")  # fmt: skip
@click.option("--predictions", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write the completions to FILE as JSON lines")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace FILE")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON")
def eval_command(
    paths: tuple[str, ...], max_length: int, batch_size: int, limit: int | None, dtype: str, device: str,
    quantize: str, skip_bad: bool, generate: bool | None, max_new_tokens: int | None, answer: str | None,
    predictions: str | None, overwrite: bool, as_json: bool, **names: str,
) -> None:  # fmt: skip
    """DATA has the formats of `train`: texts, prompts with completions, or chats.

    Prints the perplexity and the next-token accuracy over the tokens that count in the loss of `train`. Completes the
    prompts and compares with the expected completions: exact match, answer (`--answer '####\\s*(\\S+)'`), and word
    overlap (F1 as in SQuAD).
    """
    if not 2 <= len(paths) <= 3:
        raise UsageError(f"expected two or three arguments, found {len(paths)}: {USAGE}")
    base, *adapters, data = paths
    if os.path.isdir(data):
        raise UsageError(f"{data}: is a directory, expected the records to evaluate on: {USAGE}")
    if predictions is None and overwrite:
        raise UsageError("--overwrite needs --predictions FILE")
    if predictions is not None:
        if generate is False:
            raise UsageError("--predictions and --no-generate cannot be combined")
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
            lines = [json.dumps(_row(prediction), ensure_ascii=False) + "\n" for prediction in scored.predictions]
            new.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    facts = _facts(request, started, scored, time.perf_counter() - began) | {"output": predictions}
    if as_json:
        say_result(facts)
    else:
        say(*_lines(facts))


def _destination(out: Path, paths: Sequence[str], overwrite: bool) -> Destination:
    """The checked destination of the predictions."""
    from adapterkit.hub import input_path

    *models, data = paths
    inputs = (*map(input_path, models), Path(data).expanduser())
    destination = Destination(out, inputs, directory=False, overwrite=overwrite, is_ours=_are_predictions)
    destination.check()
    return destination


def _are_predictions(file: Path) -> bool:
    """Whether `file` begins with a row of predictions, so that it may be replaced."""
    try:
        with open_regular(file) as stream:
            line = stream.readline(MAX_ROW_BYTES)
        return not line or list(json.loads(line))[: len(COLUMNS)] == COLUMNS
    except (ValueError, TypeError, FormatError):
        return False


def _run(request: Request) -> tuple[Started, Scored]:
    """Evaluate with a progress bar, and print notes."""
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


# --- output ----------------------------------------------------------------------------------------------------------


def _note(event: Started) -> None:
    note(*event.notes, *notes_of(event.data))


def _row(prediction: Prediction) -> dict[str, Any]:
    row = {name: getattr(prediction, name) for name in COLUMNS}
    return row if prediction.right is None else row | {"right": prediction.right}


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
        "left_out": [{"where": bad.where, "why": bad.why} for bad in data.bad],
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
    truncated, skipped, perplexity = len(facts["truncated"]), len(facts["left_out"]), facts["perplexity"]
    details = [counted(facts["tokens"], "token"), f"{facts['counted']:,} counted"]
    details += [f"{truncated:,} truncated to {counted(facts['max_length'], 'token')}"] * bool(truncated)
    details += [f"{skipped:,} skipped"] * bool(skipped)
    per_token, per_sequence = _digits(perplexity["by_token"]), _digits(perplexity["by_sequence"])
    lines = [
        f"records    {facts['records']:,} ({', '.join(details)})",
        f"perplexity (per token) {per_token}, (per sequence) {per_sequence}",
        f"next-token accuracy {facts['next_token']:.1%}",
    ]
    if completed := facts["completed"]:
        lines += [
            f"completed  {counted(completed['prompts'], 'prompt')}, "
            f"up to {counted(completed['max_new_tokens'], 'token')} each",
            f"exact      {completed['exact']:.1%}",
            f"F1         {completed['f1']:.1%}",
        ]
        if completed["accuracy"] is not None:
            lines.append(f"answer     accuracy {completed['accuracy']:.1%}")
    lines.append(f"took       {facts['seconds']:.1f} s on {facts['device']} in {facts['dtype']}")
    return lines + ([f"wrote      {facts['output']}"] if facts["output"] else [])


def _digits(value: float) -> str:
    """`value` with four significant digits."""
    return f"{value:#.4g}".rstrip(".")
