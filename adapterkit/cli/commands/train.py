"""`adapterkit train BASE DATA -o OUT`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.training import TrainRunOptions
from adapterkit.cli.command import Command
from adapterkit.cli.data_notes import notes_of
from adapterkit.cli.next_commands import merge_command, next_lines, push_command
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import is_shown, progress
from adapterkit.cli.views.braille_plot import curve
from adapterkit.errors import UsageError
from adapterkit.files.staging import Destination
from adapterkit.options import Options, option, plotted
from adapterkit.text import command, counted, size
from adapterkit.train.recipe import Recipe, checked, read_recipe

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyPath
    from adapterkit.train.runs.run import Event, Started, Trained

ARGUMENTS = ("base", "data")
CURVE = (60, 8)


@dataclass(frozen=True)
class ViewOptions(Options):
    """What is shown of a run"""

    _: KW_ONLY
    memory: bool = option(False, "Print the memory that the run needs, and exit")
    plot: AnyPath | None = plotted("the losses")


@click.command(
    "train",
    cls=Command,
    docs="train.md",
    examples=[
        "adapterkit train base data.jsonl -o trained",
        "adapterkit train base data.jsonl -o all --targets all-linear --epochs 2",
        "adapterkit train base data.jsonl --memory",
    ],
)
@options_of(TrainRunOptions, "run")
@options_of(ViewOptions, "view")
@as_json("Print the result as JSON")
@options_of(Recipe, negatable=True)
def train_command(given: dict[str, Any], run: dict[str, Any], view: dict[str, Any], as_json: bool) -> None:
    """DATA is JSONL, JSON, CSV, Parquet or text.

    Its records have `text`, or `prompt` and `completion` (only the completion counts in the loss), or `messages` (only
    the assistant's turns count). Ctrl-C saves a checkpoint for --resume. Under torchrun, each step is divided among all
    processes.
    """
    o, shown = TrainRunOptions(**run), ViewOptions(**view)
    recipe, plot = _recipe(given, o.recipe), shown.plot
    if shown.memory:
        _print_memory(recipe, as_json)
        return
    if o.out is None:
        raise UsageError("no output given: -o OUT")
    if o.recipe is not None and not o.resume:  # a resumed run has its own recipe in its folder
        Destination(Path(o.out), (Path(o.recipe),)).check_disjoint()
    if plot is not None:
        from adapterkit.cli.views.plots import check_plot

        check_plot(Path(plot))
    from adapterkit.train.runs.run import RECIPE, Started, Stopped, Trained, read_metrics, train

    events: list[Event] = []
    with _stop_requested() as stop, _display() as show:
        argv = command(["adapterkit", *sys.argv[1:]])
        for event in train(recipe, o.out, resume=o.resume, overwrite=o.overwrite, command=argv, stop=stop):
            show(event)
            if isinstance(event, Started | Stopped | Trained):
                events.append(event)
    match events:
        case [Started() as started, Trained() as trained]:
            if started.first_process:
                metrics = read_metrics(trained.out)
                _print_result(recipe, started, trained, metrics, as_json)
                if plot is not None:
                    from adapterkit.cli.views.plots import draw_losses

                    draw_losses(metrics, Path(plot), trained.out.name)
                    if not as_json:
                        validation = ", validation loss" * bool(started.held_back)
                        say(f"plot       {plot}: training loss{validation}, learning rate")
        case [*_, Stopped(step=step, folder=folder)]:
            again = command(["adapterkit", "train", "--recipe", str(folder / RECIPE), "-o", str(o.out), "--resume"])
            raise KeyboardInterrupt(f"saved step {step}; resume with: {again}")


def _recipe(given: dict[str, Any], file: AnyPath | None) -> Recipe:
    """The recipe of a file, overridden by the command line."""
    recipe = checked(given, "options") if file is None else read_recipe(Path(file), given)
    for name in ARGUMENTS:
        if not getattr(recipe, name):
            raise UsageError(f"no {name.upper()} given: adapterkit train BASE DATA -o OUT, or --recipe FILE")
    return recipe


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C or SIGTERM arrived; a second one stops at once."""
    signals: list[int] = []

    def handle(number: int, _: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say("", "finishing this step; press Ctrl-C again to stop now", err=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- output ----------------------------------------------------------------------------------------------------------


@contextmanager
def _display() -> Iterator[Callable[[Event], None]]:
    """A function that shows events on stderr: in a progress bar, or where none is shown, in occasional lines."""
    from adapterkit.train.loop import Stepped
    from adapterkit.train.runs.run import Evaluated, Sampled, Started

    began, tokens, quiet = 0.0, 0, False

    def show(event: Event) -> None:
        nonlocal began, tokens, quiet
        if quiet:
            return
        if isinstance(event, Started):
            quiet, began = not event.first_process, time.monotonic()
            if not quiet:
                _print_start(event)
                show_step(event.first_step, event.steps)
        elif isinstance(event, Stepped):
            tokens += event.tokens
            speed = tokens / max(1e-9, time.monotonic() - began)
            show_step(event.step, event.steps, loss=event.loss, tokens_per_second=speed, memory=_memory())
            if not is_shown() and event.step % max(1, event.steps // 10) == 0:
                say(f"step {event.step}/{event.steps}  loss {event.loss:.4f}  {speed:,.0f} tokens/s", err=True)
        elif isinstance(event, Evaluated):
            worse = "" if event.step == 0 or event.best else " (not the best)"
            say(f"step {event.step}: validation loss {event.loss:.4f}{worse}", err=True)
        elif isinstance(event, Sampled):
            say(f"sample {event.when} training: {event.prompt!r} → {event.completion!r}", err=True)

    with progress("training", note=_bar_note) as show_step:
        yield show


def _bar_note(facts: dict[str, Any]) -> str:
    """The text beside the progress bar."""
    if not facts:
        return ""
    return f"loss {facts['loss']:.3f}  {facts['tokens_per_second']:,.0f} tokens/s  {size(facts['memory'])}"


def _print_start(event: Started) -> None:
    data, held_back = event.data, event.held_back
    for part in filter(None, (data, held_back)):
        note(*notes_of(part))
    if not event.unpadded:
        note("this model does not support packed sequences; batches are padded")
    held = f", {counted(len(held_back.examples), 'record')} held out" if held_back else ""
    say(
        f"data       {counted(len(data.examples), 'record')}, {counted(data.tokens, 'token')} "
        f"({data.counted:,} in the loss){held}",
        f"training   {counted(event.trained, 'parameter')} ({event.trained / event.parameters:.2%}), "
        f"{counted(event.steps, 'step')}, {event.dtype} on {event.device}",
        f"memory     about {size(event.memory.total)}",
        err=True,
    )


def _print_result(
    recipe: Recipe, started: Started, trained: Trained, metrics: list[dict[str, Any]], as_json: bool
) -> None:
    from adapterkit.train.loss import perplexity

    if trained.without_gradient:
        more = f" and {len(trained.without_gradient) - 3} more" if len(trained.without_gradient) > 3 else ""
        note(f"no gradient in any step: {', '.join(trained.without_gradient[:3])}{more}")
    progress, losses = trained.progress, [line["loss"] for line in metrics if "loss" in line]
    if as_json:
        facts = {"output": str(trained.out), "trained_parameters": started.trained, "kept_step": trained.saved_step}
        facts |= {"stopped_early": trained.stopped_early, "peak_memory": trained.peak_memory}
        say_result({**facts, **asdict(progress)})
        return
    if sys.stdout.isatty() and len(losses) > 1:
        say(*curve(losses, *CURVE))
    early = ", stopped early" if trained.stopped_early else ""
    seconds = progress.seconds
    say(
        f"trained    {counted(progress.step, 'step')}, {counted(progress.tokens, 'token')} in {seconds:,.1f} s "
        f"({progress.tokens / max(1e-9, seconds):,.0f} tokens/s), peak memory {size(trained.peak_memory)}{early}",
        f"loss       {losses[0]:.4f} → {losses[-1]:.4f} (first → last step)",
    )
    first, best = progress.first_eval_loss, progress.best_loss
    if first is not None and best is not None:
        say(
            f"validation loss {first:.4f} → {best:.4f} (best at step {trained.saved_step}, kept), "
            f"perplexity {perplexity(first):.2f} → {perplexity(best):.2f}"
        )
    say(f"wrote      {trained.out}")
    if recipe.method != "full":
        say(*next_lines("merge", merge_command(recipe.base, trained.out), 11))
    say(*next_lines("push", push_command(trained.out), 11))


def _print_memory(recipe: Recipe, as_json: bool) -> None:
    from adapterkit.train.runs.run import estimated

    estimate, free, fits = estimated(recipe)
    if as_json:
        say_result({**asdict(estimate), "total": estimate.total, "free": free, "would_fit": fits})
        return
    for name, value in asdict(estimate).items():
        say(f"{name:13}{size(value):>10}")
    say(f"{'total':13}{size(estimate.total):>10}, {size(free)} free" + ("" if fits is None else f": {fits}"))


def _memory() -> int:
    """Bytes in use: the GPU's peak, or the current size of this process."""
    import torch

    if used := torch.cuda.max_memory_allocated():
        return used
    import psutil

    return int(psutil.Process().memory_info().rss)
