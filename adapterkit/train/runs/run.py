"""A complete training run: data, model, loop, checkpoints and result.

Until it ends, a run's files are in a workspace beside its output. A resumed run ends with the same bits as one that was
never interrupted.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adapterkit.base.models.loading import load_tokenizer
from adapterkit.base.models.tokenizing import decode_text, encode_text
from adapterkit.errors import FormatError
from adapterkit.files import os_calls
from adapterkit.files.opening import open_regular
from adapterkit.files.writing import write_text
from adapterkit.train.data.order import Order
from adapterkit.train.data.records import Fields, read_records
from adapterkit.train.data.tokenize import Encoded, encode_all, split
from adapterkit.train.loop import Loop, Stepped
from adapterkit.train.recipe import Recipe, as_yaml
from adapterkit.train.runs import checkpoints
from adapterkit.train.runs.checkpoints import Log, Progress, State
from adapterkit.train.runs.checks import check_not_quantized, check_sequences, open_base, open_fitting
from adapterkit.train.runs.distributed import StoppedError, check_run, folder_for, peak_memory, processes
from adapterkit.train.runs.export import write_result
from adapterkit.train.runs.fingerprint import Origin
from adapterkit.train.runs.load_model import choose_device, choose_dtype, load_model
from adapterkit.train.runs.memory import Estimate, available, check, estimate, suggestion
from adapterkit.train.runs.prepare_model import prepare

T = TypeVar("T")

RECIPE, METRICS = "adapterkit_recipe.yaml", "metrics.jsonl"
SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Started:
    """Training begins: parameters, data and estimated memory."""

    trained: int
    parameters: int
    steps: int
    first_step: int
    data: Encoded
    held_back: Encoded | None
    memory: Estimate
    device: str
    dtype: str
    unpadded: bool
    first_process: bool  # the one that writes and prints


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The validation loss after `step` steps, and whether it is the best so far."""

    step: int
    loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Sampled:
    """The model's completion of a prompt, `when` before or after training."""

    when: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run stopped on request, and saved a checkpoint."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of a run; `out` has the state after `saved_step` steps."""

    out: Path
    progress: Progress
    saved_step: int
    stopped_early: bool
    peak_memory: int
    without_gradient: tuple[str, ...]  # modules that never had a gradient


Event = Started | Stepped | Evaluated | Saved | Sampled | Stopped | Trained


def train(
    recipe: Recipe, out: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False,
    command: str = "", stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:  # fmt: skip
    """Train with `recipe`, and write the adapter, or with method `full` the model, to the new directory `out`.

    Args:
        resume: Continue an interrupted run.
        overwrite: Replace an output that adapterkit wrote.
        command: The command line, for the card.
        stop: Called after every step; when it returns True, the run saves a checkpoint for `resume` and ends.

    Raises:
        UsageError, FormatError, FitError: Before any weight is loaded.
        AdapterkitError: The loss is not finite.
    """
    target = Path(out).expanduser()
    with processes() as (rank, world, local_rank):
        device = choose_device(recipe.device, local_rank)
        place = check_run(recipe, target, rank, resume, overwrite)
        base = open_base(recipe.base)
        dtype = choose_dtype(recipe.dtype, base, device, recipe.method == "full")
        tokenizer = load_tokenizer(base)
        data, held_back = read_data(recipe, tokenizer)
        check_not_quantized(recipe.quantize, base)
        check_sequences(data, base)
        first = open_fitting(recipe.init_from, base, recipe.quantize).adapter if recipe.init_from else None
        memory = check(base, recipe, data.examples, dtype, device)
        origin = Origin.of(recipe, data, held_back, base, first)
        with folder_for(place, rank, resume) as folder:
            model = load_model(base, dtype, device, recipe.quantize)
            prepare(model, recipe, base, first)
            loop = Loop(model, Order.of(data.examples, recipe), recipe, rank, world)
            run = _Run(recipe, folder, loop, tokenizer, held_back, origin)
            run.start(resume)
            parameters = sum(parameter.numel() for parameter in model.model.parameters())
            trained = sum(parameter.numel() for parameter in loop.trained.values())
            yield Started(
                trained, parameters, loop.order.steps, loop.step, data, held_back, memory, str(device),
                str(dtype).removeprefix("torch."), model.unpadded, rank == 0,
            )  # fmt: skip
            yield from run.steps(stop)
            if run.stopped:
                yield Stopped(loop.step, folder)
                raise StoppedError
            run.restore_best()
            yield from run.samples("after")
            if rank == 0:
                write_result(folder, recipe, base, loop, tokenizer, data, held_back, run.progress, origin, command)
        if not run.stopped:
            early = run.progress.step < loop.order.steps
            yield Trained(target, run.progress, loop.step, early, peak_memory(device), tuple(loop.without_gradient()))


def estimated(recipe: Recipe) -> tuple[Estimate, int, str | None]:
    """The memory that a run needs, the free memory, and if that is less, the options that would fit."""
    device = choose_device(recipe.device)
    base = open_base(recipe.base)
    dtype = choose_dtype(recipe.dtype, base, device, recipe.method == "full")
    examples = read_data(recipe, load_tokenizer(base))[0].examples
    memory, free = estimate(base, recipe, examples, dtype, device), available(device)
    return memory, free, None if memory.total <= free else suggestion(base, recipe, examples, dtype, device, free)


def read_data(recipe: Recipe, tokenizer: Any) -> tuple[Encoded, Encoded | None]:
    """The tokenized training data, and validation data if any."""
    fields = Fields(recipe.text_field, recipe.prompt_field, recipe.completion_field, recipe.messages_field)

    def read(source: str) -> Encoded:
        records = read_records(source, fields)
        return encode_all(records, tokenizer, recipe.max_length, recipe.skip_bad)

    data = read(recipe.data)
    if recipe.eval_data:
        return data, read(recipe.eval_data)
    return split(data, recipe.eval_share, recipe.seed) if recipe.eval_share else (data, None)


class _Run:
    """A run in progress and its files; rank 0 writes them and shares what it reads."""

    def __init__(
        self, recipe: Recipe, folder: Path, loop: Loop, tokenizer: Any, held_back: Encoded | None, origin: Origin
    ) -> None:
        self.recipe, self.folder, self.loop, self.tokenizer = recipe, folder, loop, tokenizer
        self.held_back, self.origin, self.progress = held_back, origin, Progress()
        self.stopped, self.began = False, 0.0

    def start(self, resume: bool) -> None:
        """Start, or resume from the last checkpoint; raises FitError if that belongs to another run."""
        if not resume:
            self._write(RECIPE, as_yaml(self.recipe))
            return
        newest = self._shared(lambda: checkpoints.steps(self.folder)[-1])
        try:
            state = self._checked(newest)
            if (best := state.progress.best_step) not in (None, state.progress.step):
                self._checked(checkpoints.at(self.folder, best))  # the run may end with its state
            self._restore(newest)
            if self.loop.rank == 0:
                self._cut_log(state.log)
        except FormatError as error:
            raise FormatError(f"{error}. To resume from an older checkpoint, remove {newest}") from error
        self.progress = state.progress

    def _checked(self, folder: Path) -> State:
        """The state of a checkpoint; raises if it is damaged or belongs to another run."""
        state = self._shared(lambda: checkpoints.read(folder))
        self.origin.check_same(state.origin)  # in each process, since each reads its own data and base
        self._shared(lambda: checkpoints.check(folder, state, self.loop.order.steps, self.loop.layout()))
        return state

    def _restore(self, folder: Path) -> None:
        self.loop.restore(checkpoints.number(folder), self._shared(lambda: checkpoints.load(folder)))

    def _shared(self, read: Callable[[], T]) -> T:
        """The result of `read` in the first process; only its disk needs the checkpoints."""
        results: list[Any] = [read() if self.loop.rank == 0 else None]
        if self.loop.world > 1:
            dist.broadcast_object_list(results)
        shared: T = results[0]
        return shared

    def _cut_log(self, then: Log) -> None:
        """Truncate the log to the checkpoint; raises FormatError if the rest has changed."""
        with open_regular(self.folder / METRICS) as stream:
            data = stream.read()[: then.size]
        if Log.of(data) != then:
            raise FormatError(f"{self.folder / METRICS}: has changed since the run wrote it")
        os.truncate(self.folder / METRICS, then.size)

    def steps(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Run the remaining steps, with validations and checkpoints; sets `stopped` if stopped on request."""
        every = self.recipe.eval_every or self.loop.order.steps_per_epoch
        self.began = time.monotonic() - self.progress.seconds
        if self.progress.step == 0:
            yield from self.samples("before")
            yield from self._measure()
        while self.loop.step < self.loop.order.steps and not self._is_out_of_patience():
            event = self.loop.advance(stop())
            self.progress = replace(
                self.progress, step=event.step, tokens=self.progress.tokens + event.tokens,
                seconds=time.monotonic() - self.began, loss=event.loss,
            )  # fmt: skip
            self._note({**_numbers_of(event), "seconds": round(self.progress.seconds, 3)})
            yield event
            last = event.step == self.loop.order.steps
            if event.step % every == 0 or last:
                yield from self._measure()
            best = self.progress.best_step == event.step
            if event.stop or best or last or event.step % self.recipe.save_every == 0:
                yield self._save()
            if event.stop and not last:
                self.stopped = True
                return

    def restore_best(self) -> None:
        """Restore the state with the best validation loss."""
        best = self.progress.best_step
        if best is not None and best != self.loop.step:
            folder = checkpoints.at(self.folder, best)
            self._checked(folder)
            self._restore(folder)

    def samples(self, when: str) -> Iterator[Sampled]:
        """Complete the recipe's sample prompts."""
        for prompt in self.recipe.sample:
            ids = torch.tensor(encode_text(self.tokenizer, prompt)["input_ids"])
            [completion] = self.loop.model.complete([ids], SAMPLE_TOKENS, self.tokenizer.eos_token_id)
            yield Sampled(when, prompt, decode_text(self.tokenizer, completion))

    def _measure(self) -> Iterator[Evaluated]:
        if self.held_back is None:
            return
        loss, then = self.loop.evaluate(self.held_back.examples), self.progress
        self._note({"step": self.loop.step, "eval_loss": loss})
        best = self.loop.step > 0 and (then.best_loss is None or loss < then.best_loss)
        if self.loop.step == 0:
            self.progress = replace(then, first_eval_loss=loss)
        elif best:
            self.progress = replace(then, best_step=self.loop.step, best_loss=loss, no_better=0)
        else:
            self.progress = replace(then, no_better=then.no_better + 1)
        yield Evaluated(self.loop.step, loss, best)

    def _is_out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.progress.no_better >= self.recipe.patience

    def _save(self) -> Saved:
        folder = checkpoints.at(self.folder, self.loop.step)
        if self.loop.rank == 0:
            os_calls.flush_path(self.folder / METRICS)
            with open_regular(self.folder / METRICS) as stream:
                log = Log.of(stream.read())
            checkpoints.save(self.folder, State(self.progress, self.origin, log), self.loop.state())
        return Saved(self.loop.step, folder)

    def _note(self, facts: dict[str, Any]) -> None:
        if self.loop.rank == 0:
            with open(self.folder / METRICS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.loop.rank == 0:
            write_text(self.folder / name, text)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one mapping per step or validation."""
    with open_regular(folder / METRICS) as stream:
        return [json.loads(line) for line in stream]


def _numbers_of(event: Stepped) -> dict[str, Any]:
    norm = event.norm if math.isfinite(event.norm) else None  # fp16 skips a step whose gradient overflows
    return {"step": event.step, "loss": event.loss, "lr": event.lr, "norm": norm, "tokens": event.tokens}
