"""What `import adapterkit` offers to evaluate a model, with an adapter or without.

>>> found = adapterkit.evaluate("base", "data.jsonl", "adapter")
>>> found.perplexity, found.next_token, found.exact
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterkit.api.options.training import EvaluateCall
from adapterkit.api.progress import downloads_shown, progress_bar
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import Destination, staged
from adapterkit.hub import input_path
from adapterkit.options import takes
from adapterkit.reprs import Displayed
from adapterkit.text import counted
from adapterkit.train.evaluate_options import EvaluateOptions

if TYPE_CHECKING:
    from adapterkit.train.runs.answer_scores import Prediction
    from adapterkit.train.runs.evaluate import Completed, Read, Scored, Started

Event: TypeAlias = "Started | Read | Completed | Evaluated"
COLUMNS = ["where", "prompt", "expected", "completion", "exact", "f1"]  # of a prediction, in the order written
MAX_ROW_BYTES = 100_000_000


@dataclass(frozen=True, repr=False)
class Evaluated(Displayed):
    """The scores of an evaluation, what was read and how it was computed."""

    options: EvaluateOptions
    started: Started
    scored: Scored
    seconds: float

    @property
    def loss(self) -> float:
        """Mean of −log p over the counted tokens."""
        return self.scored.likelihood.loss

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return self.scored.likelihood.by_token

    @property
    def next_token(self) -> float:
        """Next-token accuracy, from 0 to 1."""
        return self.scored.likelihood.next_token

    @property
    def exact(self) -> float | None:
        """Share of completions that match exactly; None without prompts."""
        return self.scored.exact

    @property
    def f1(self) -> float | None:
        """Mean word F1 of the completions; None without prompts."""
        return self.scored.f1

    @property
    def accuracy(self) -> float | None:
        """Share of completions with the right answer; None if no `answer` was asked for."""
        return self.scored.accuracy

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The completions of the prompts."""
        return self.scored.predictions

    def facts(self) -> dict[str, Any]:
        """The scores as JSON data."""
        o, data, started = self.options, self.started.data, self.started
        completed = {
            "prompts": started.prompts, "max_new_tokens": started.max_new_tokens, "exact": self.exact, "f1": self.f1,
            "answer": o.answer, "accuracy": self.accuracy,
        }  # fmt: skip
        return {
            "base": str(o.base),
            "adapter": None if o.adapter is None else str(o.adapter),
            "data": str(o.data),
            "records": len(data.examples),
            "tokens": data.tokens,
            "counted": data.counted,
            "max_length": o.max_length,
            "truncated": list(data.truncated),
            "left_out": [{"where": bad.where, "why": bad.why} for bad in data.bad],
            "loss": self.loss,
            "perplexity": {"by_token": self.perplexity, "by_sequence": self.scored.likelihood.by_sequence},
            "next_token": self.next_token,
            "completed": completed if started.prompts else None,
            "device": started.device,
            "dtype": started.dtype,
            "quantize": o.quantize,
            "seconds": round(self.seconds, 3),
            "output": None if o.predictions is None else str(o.predictions),
        }

    def brief(self) -> str:
        name = str(self.options.base) + (f" + {self.options.adapter}" if self.options.adapter else "")
        exact = "" if self.exact is None else f", exact match {self.exact:.1%}"
        return f"{name}, perplexity {_digits(self.perplexity)}, next-token accuracy {self.next_token:.1%}{exact}"

    def lines(self) -> list[str]:
        data, started = self.started.data, self.started
        details = [counted(data.tokens, "token"), f"{data.counted:,} counted"]
        if truncated := len(data.truncated):
            details.append(f"{truncated:,} truncated to {counted(self.options.max_length, 'token')}")
        details += [f"{len(data.bad):,} skipped"] * bool(data.bad)
        by_sequence = _digits(self.scored.likelihood.by_sequence)
        lines = [
            f"records    {len(data.examples):,} ({', '.join(details)})",
            f"perplexity (per token) {_digits(self.perplexity)}, (per sequence) {by_sequence}",
            f"next-token accuracy {self.next_token:.1%}",
        ]
        if self.exact is not None:
            limit = counted(started.max_new_tokens, "token")
            lines += [
                f"completed  {counted(started.prompts, 'prompt')}, up to {limit} each",
                f"exact      {self.exact:.1%}",
                f"F1         {self.f1:.1%}",
            ]
        if self.accuracy is not None:
            lines.append(f"answer     accuracy {self.accuracy:.1%}")
        lines.append(f"took       {self.seconds:.1f} s on {started.device} in {started.dtype}")
        return lines + ([f"wrote      {self.options.predictions}"] if self.options.predictions else [])


@takes(EvaluateCall)
def evaluate(o: EvaluateCall) -> Evaluated:
    """Evaluate `base`, with or without `adapter`, on the records of `data`, and complete their prompts.

    Returns:
        Loss, perplexity and next-token accuracy over the tokens that count in the loss of training, the completions of
        prompts, and their exact matches, word F1 and answers.

    Raises:
        UsageError, FormatError, FitError: before any weight is read, where possible.
        OutputExistsError: the file of predictions exists.
        AdapterkitError: a loss is not finite.
    """
    from adapterkit.train.runs.evaluate import Started

    with downloads_shown(o.progress), progress_bar("loading", "records", o.progress) as show:
        for event in evaluating(o):
            if isinstance(event, Evaluated):
                return event
            if not isinstance(event, Started):
                show(event.done, event.total, event.what)
    raise AssertionError("an evaluation ends with its result")


def evaluating(o: EvaluateOptions) -> Generator[Event, None, None]:
    """Evaluate step by step: what was read, how much is scored and completed, and the result last."""
    if os.path.isdir(o.data):
        raise UsageError(f"{o.data}: is a directory, expected the records to evaluate on")
    file = None if o.predictions is None else _destination(o, Path(o.predictions).expanduser())
    from adapterkit.train.runs.evaluate import Scored, Started, evaluate

    began, started = time.perf_counter(), None
    with staged(file) if file else nullcontext() as new:
        for event in evaluate(o):
            if isinstance(event, Scored):
                scored = event
                break
            started = event if isinstance(event, Started) else started
            yield event
        if new is not None:
            lines = [json.dumps(_row(prediction), ensure_ascii=False) + "\n" for prediction in scored.predictions]
            new.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    assert started is not None
    yield Evaluated(o, started, scored, time.perf_counter() - began)


def _destination(o: EvaluateOptions, out: Path) -> Destination:
    """The checked destination of the predictions."""
    models = [input_path(spec) for spec in (o.base, o.adapter) if spec is not None]
    inputs = (*models, Path(o.data).expanduser())
    destination = Destination(out, inputs, directory=False, overwrite=o.overwrite, is_ours=_are_predictions)
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


def _row(prediction: Prediction) -> dict[str, Any]:
    row = {name: getattr(prediction, name) for name in COLUMNS}
    return row if prediction.right is None else row | {"right": prediction.right}


def _digits(value: float) -> str:
    """`value` with four significant digits."""
    return f"{value:#.4g}".rstrip(".")
