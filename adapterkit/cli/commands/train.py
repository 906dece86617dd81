"""`adapterkit train BASE DATA -o OUT`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.data_notes import notes_of
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import is_shown, progress
from adapterkit.cli.views.curve import curve
from adapterkit.errors import UsageError
from adapterkit.files.staging import Destination
from adapterkit.text import command, counted, size
from adapterkit.train.recipe import Recipe, checked, read_recipe

if TYPE_CHECKING:
    from adapterkit.train.runs.run import Event, Started, Trained

ARGUMENTS = ("base", "data")
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}
CURVE = (60, 8)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every key of a recipe; what is not given is left to the recipe."""
    for one in reversed(fields(Recipe)):
        if one.name in ARGUMENTS:
            continue
        kind, flag, about = str(one.type).partition(" |")[0], "--" + one.name.replace("_", "-"), one.metadata["help"]
        shown = "" if one.default in (None, (), False) or "[" in about else f"  [default: {one.default}]"
        settings: dict[str, Any] = {"help": about + shown, "default": None}
        if kind == "bool":
            flag += f"/--no-{flag.removeprefix('--')}"
        elif kind.startswith("tuple"):
            settings |= {"multiple": True, "metavar": "PROMPT"}
        elif kind.startswith("dict"):
            settings |= {"multiple": True, "metavar": "NAME=VALUE"}
        elif one.metadata["choices"]:
            settings |= {"type": click.Choice(one.metadata["choices"])}
        else:
            settings |= {"type": TYPES[kind]}
        command = click.option(flag, **settings)(command)
    return command


@click.command("train")
@click.argument("base", required=False)
@click.argument("data", required=False)
@click.option("-o", "--output", type=click.Path(), help="The directory to write.")
@click.option("--recipe", "recipe_file", type=click.Path(), help="Take what is not given here from this YAML file.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--memory", is_flag=True, help="Print what the run would take, and do nothing.")
@click.option("--plot", type=click.Path(), help="Draw the losses to this PNG or SVG file at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_options
def train_command(
    base: str | None, data: str | None, output: str | None, recipe_file: str | None, resume: bool, overwrite: bool,
    memory: bool, plot: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Train a LoRA adapter for BASE on DATA: texts, prompts with completions, or conversations.

    DATA is JSONL, JSON, CSV, Parquet or text; its records have `text`, or `prompt` and `completion` (the loss is on the
    completion), or `messages` (on the assistant's turns). Ctrl-C keeps what was reached, for --resume. Under torchrun
    the same command shares every step among all processes.
    """
    recipe = _recipe({"base": base, "data": data} | given, recipe_file)
    if memory:
        _print_memory(recipe, as_json)
        return
    if output is None:
        raise UsageError("say where the result is to go: -o OUT")
    if recipe_file is not None and not resume:  # a run that is resumed has its own recipe in it
        Destination(Path(output), (Path(recipe_file),)).check_apart()
    if plot is not None:
        from adapterkit.cli.views.plot import check_plot

        check_plot(Path(plot))
    from adapterkit.train.runs.run import RECIPE, Started, Stopped, Trained, read_metrics, train

    events: list[Event] = []
    with _asked_to_stop() as stop, _shown() as show:
        given_as = command(["adapterkit", *sys.argv[1:]])
        for event in train(recipe, output, resume=resume, overwrite=overwrite, command=given_as, stop=stop):
            show(event)
            if isinstance(event, Started | Stopped | Trained):
                events.append(event)
    match events:
        case [Started() as started, Trained() as trained]:
            if started.first_process:
                metrics = read_metrics(trained.out)
                _print_result(started, trained, metrics, as_json)
                if plot is not None:
                    from adapterkit.cli.views.plot import draw_losses

                    draw_losses(metrics, Path(plot), trained.out.name)
                    if not as_json:
                        held = ", validation loss" * bool(started.held_back)
                        say(f"plot      {plot}: training loss{held}, learning rate")
        case [*_, Stopped(step=step, folder=folder)]:
            again = command(["adapterkit", "train", "--recipe", str(folder / RECIPE), "-o", output, "--resume"])
            raise KeyboardInterrupt(f"kept what was reached after step {step}; go on with: {again}")


def _recipe(given: dict[str, Any], file: str | None) -> Recipe:
    """The recipe of the command line, over that of a file."""
    plain = {name: value for name, value in given.items() if value not in (None, ())}
    for name in ("rank_pattern", "alpha_pattern"):
        if name in plain:
            pairs = [text.partition("=") for text in plain[name]]
            if any(not value for _, _, value in pairs):
                raise UsageError(f"--{name.replace('_', '-')}: expected NAME=VALUE, as in down_proj=16")
            plain[name] = {key: value for key, _, value in pairs}
    recipe = checked(plain, "options") if file is None else read_recipe(Path(file), plain)
    for name in ARGUMENTS:
        if not getattr(recipe, name):
            raise UsageError(f"no {name.upper()} given: adapterkit train BASE DATA -o OUT, or --recipe FILE")
    return recipe


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether ctrl-C or a SIGTERM came; a second one ends at once."""
    asked: list[int] = []

    def heed(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("", "finishing this step; once more to stop at once", err=True)

    before = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what is shown ---------------------------------------------------------------------------------------------------


@contextmanager
def _shown() -> Iterator[Callable[[Event], None]]:
    """What shows events on stderr: as progress, and where nothing shows that, by a line now and then."""
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
            better = "" if event.step == 0 or event.best else "  (was lower)"
            say(f"step {event.step}: validation loss {event.loss:.4f}{better}", err=True)
        elif isinstance(event, Sampled):
            say(f"{event.when}: {event.prompt!r} goes on with {event.completion!r}", err=True)

    with progress("training", note=_beside) as show_step:
        yield show


def _beside(facts: dict[str, Any]) -> str:
    """What stands beside the bar."""
    if not facts:
        return ""
    return f"loss {facts['loss']:.3f}  {facts['tokens_per_second']:,.0f} tokens/s  {size(facts['memory'])}"


def _print_start(event: Started) -> None:
    data, held_back = event.data, event.held_back
    for part in filter(None, (data, held_back)):
        note(*notes_of(part))
    if not event.unpadded:
        note("this model cannot read sequences end to end; they are padded")
    held = f", {len(held_back.examples):,} held back" if held_back else ""
    say(
        f"data      {counted(len(data.examples), 'record')}, {counted(data.tokens, 'token')}, "
        f"{data.counted:,} to learn{held}",
        f"training  {counted(event.trained, 'parameter')} ({event.trained / event.parameters:.2%}) "
        f"in {counted(event.steps, 'step')}, {event.dtype} on {event.device}",
        f"memory    about {size(event.memory.total)}",
        err=True,
    )


def _print_result(started: Started, trained: Trained, metrics: list[dict[str, Any]], as_json: bool) -> None:
    from adapterkit.train.loss import perplexity

    if trained.unmoved:
        more = f" and {len(trained.unmoved) - 3} more" if len(trained.unmoved) > 3 else ""
        note(f"never had a gradient: {', '.join(trained.unmoved[:3])}{more}")
    progress, losses = trained.progress, [line["loss"] for line in metrics if "loss" in line]
    if as_json:
        facts = {"output": str(trained.out), "trained_parameters": started.trained, "kept_step": trained.kept}
        facts |= {"stopped_early": trained.stopped_early, "peak_memory": trained.peak_memory}
        say_result({**facts, **asdict(progress)})
        return
    if sys.stdout.isatty() and len(losses) > 1:
        say(*curve(losses, *CURVE))
    early = ", stopped early" if trained.stopped_early else ""
    say(
        f"trained   {counted(progress.step, 'step')}, {counted(progress.tokens, 'token')} in {progress.seconds:,.1f} s "
        f"({progress.tokens / max(1e-9, progress.seconds):,.0f} tokens/s), {size(trained.peak_memory)}{early}"
    )
    say(f"loss      {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if progress.best_loss is not None and progress.first_eval_loss is not None:
        say(
            f"held out  {progress.first_eval_loss:.4f} before, {progress.best_loss:.4f} at step {trained.kept}, "
            f"which is kept; perplexity {perplexity(progress.first_eval_loss):.2f}, "
            f"{perplexity(progress.best_loss):.2f}"
        )
    say(f"wrote     {trained.out}")


def _print_memory(recipe: Recipe, as_json: bool) -> None:
    from adapterkit.train.runs.run import estimated

    found, room, fits = estimated(recipe)
    if as_json:
        say_result({**asdict(found), "total": found.total, "free": room, "would_fit": fits})
        return
    for name, value in asdict(found).items():
        say(f"{name:13}{size(value):>10}")
    say(f"{'in all':13}{size(found.total):>10}, {size(room)} free" + ("" if fits is None else f": {fits}"))


def _memory() -> int:
    """Bytes in use: the most of the GPU, or those of this process now."""
    import torch

    if used := torch.cuda.max_memory_allocated():
        return used
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
