"""Checkpoints that are not what the run wrote: one clear error each, before anything of them is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from handmade import interrupted_run
from safetensors.torch import load_file, save_file
from tiny import WORDS, save_tiny_model

from adapterkit.errors import AdapterkitError, FitError, FormatError
from adapterkit.files.opening import sha256_of
from adapterkit.train.loop import Loop
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs import checkpoints, train
from adapterkit.train.runs.checkpoints import STATE, SUMS, TENSORS

A = "model.layers.0.self_attn.q_proj.A"
STEP = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def began(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and its run that was stopped at `STEP`, while that of step 2 was the best state."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(WORDS[n : n + 6])}) + "\n" for n in range(16)))
    base, asked, told = save_tiny_model(folder / "base"), iter(range(1, STEP + 1)), iter([5.0, 3.0, 4.0])
    recipe = Recipe(base=str(base), data=str(data), batch_size=2, lr=1e-2, eval_share=0.25, eval_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "evaluate", lambda *_: next(told))
        list(train(recipe, folder / "out", stop=lambda: next(asked) == STEP))
    return recipe, interrupted_run(folder / "out")


@pytest.fixture
def stopped(began: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """A copy of it, to be broken."""
    recipe, run = began
    return recipe, shutil.copytree(run.parent, tmp_path / run.parent.name) / run.name


def resumed(recipe: Recipe, run: Path) -> None:
    list(train(recipe, run.parent.with_name("out"), resume=True))


def sealed(folder: Path) -> None:
    """Give a checkpoint the hashes of what is in it now, as one who means harm would."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in (TENSORS, STATE)]
    (folder / SUMS).write_text("".join(lines))


def test_what_was_stopped_is_resumed(stopped: tuple[Recipe, Path]) -> None:
    assert [checkpoints.number(folder) for folder in checkpoints.steps(stopped[1])] == [2, STEP]
    resumed(*stopped)
    assert (stopped[1].parent.with_name("out") / "adapter_model.safetensors").is_file()


# --- damage: SHA256SUMS finds it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TENSORS, STATE, SUMS])
def test_a_flipped_bit_is_found_wherever_it_is(stopped: tuple[Recipe, Path], name: str) -> None:
    folder = checkpoints.at(stopped[1], STEP)
    raw, random = (folder / name).read_bytes(), Random(name)
    for place in {0, len(raw) - 1, *(random.randrange(len(raw)) for _ in range(60))}:
        changed = bytearray(raw)
        changed[place] ^= 1 << random.randrange(8)
        (folder / name).write_bytes(changed)
        with pytest.raises(FormatError, match=r"does not match its SHA-256 in SHA256SUMS|has more than the hashes"):
            checkpoints.read(folder)
    (folder / name).write_bytes(raw)
    checkpoints.read(folder)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a moment": (lambda run: flip(run / f"checkpoints/step-00000{STEP}" / TENSORS), "does not match its SHA-256"),
    "a bit of the best state": (lambda run: flip(run / "checkpoints/step-000002" / TENSORS), "step-000002.*does not match its SHA-256"),
    "the best state is gone": (lambda run: shutil.rmtree(run / "checkpoints/step-000002"), "step-000002.*cannot be read"),
    "a bit of the log": (lambda run: flip(run / "metrics.jsonl"), "metrics.jsonl: has changed since the run wrote it"),
    "no log": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read: No such file"),
    "a short log": (lambda run: os.truncate(run / "metrics.jsonl", 90), "metrics.jsonl: has changed since the run wrote it"),
    "a FIFO for a log": (lambda run: fifo(run / "metrics.jsonl"), "metrics.jsonl: cannot be read: a named pipe"),
    "no tensors": (lambda run: (checkpoints.at(run, STEP) / TENSORS).unlink(), "cannot be read: No such file"),
    "a FIFO for tensors": (lambda run: fifo(checkpoints.at(run, STEP) / TENSORS), "cannot be read: a named pipe"),
    "a FIFO for a state": (lambda run: fifo(checkpoints.at(run, STEP) / STATE), "cannot be read: a named pipe"),
    "no sums": (lambda run: (checkpoints.at(run, STEP) / SUMS).unlink(), "SHA256SUMS: cannot be read: No such file"),
    "long sums": (lambda run: os.truncate(checkpoints.at(run, STEP) / SUMS, 1 << 30), "is too large, expected at most 1,000 bytes"),
    "truncated": (lambda run: os.truncate(checkpoints.at(run, STEP) / TENSORS, 99), "does not match its SHA-256"),
    "empty": (lambda run: shutil.rmtree(checkpoints.at(run, STEP)) or checkpoints.at(run, STEP).mkdir(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_one_error_that_says_what_to_do(stopped: tuple[Recipe, Path], kind: str) -> None:
    recipe, run = stopped
    damage, said = DAMAGED[kind]
    damage(run)
    with pytest.raises(FormatError, match=rf"{said}.*To resume from an older checkpoint, remove \S+step-00000{STEP}"):
        resumed(recipe, run)
    assert run.is_dir() and not (run.parent / "out").exists()


# --- a checkpoint of another run, which agrees with its hashes -------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS)

    return changed


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        found = json.loads((folder / STATE).read_text())
        change(found)
        (folder / STATE).write_text(json.dumps(found))

    return changed


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / STATE).write_text(content)


OTHER: dict[str, tuple[Callable[[Path], object], str]] = {
    "a moment of another shape": (tensors(lambda t: t.update({f"exp_avg.{A}": torch.zeros(8, 31)})), rf"exp_avg.{A} is float32 \(8, 31\), this run has float32 \(8, 32\)"),
    "a moment of one number": (tensors(lambda t: t.update({f"exp_avg_sq.{A}": torch.zeros(())})), rf"exp_avg_sq.{A} is float32 \(\)"),
    "a transposed moment": (tensors(lambda t: t.update({f"exp_avg.{A}": torch.zeros(32, 8)})), r"is float32 \(32, 8\)"),
    "an empty moment": (tensors(lambda t: t.update({f"exp_avg.{A}": torch.zeros(0, 32)})), r"is float32 \(0, 32\)"),
    "a moment in float64": (tensors(lambda t: t.update({f"exp_avg.{A}": torch.zeros(8, 32, dtype=torch.float64)})), "is float64"),
    "a moment of whole numbers": (tensors(lambda t: t.update({f"exp_avg.{A}": torch.zeros(8, 32, dtype=torch.int32)})), "is int32"),
    "no moment": (tensors(lambda t: t.pop(f"exp_avg.{A}")), rf"exp_avg.{A} is missing"),
    "no moments at all": (tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("exp")]), "is missing"),
    "factors of another rank": (tensors(lambda t: t.update({f"trained.{A}": torch.zeros(4, 32)})), rf"trained.{A} is float32 \(4, 32\)"),
    "no factor": (tensors(lambda t: t.pop(f"trained.{A}")), rf"trained.{A} is missing"),
    "another name": (tensors(lambda t: t.update({"trained.x": t.pop(f"trained.{A}")})), r"trained.\S+ is (missing|not a tensor of this run)"),
    "one more tensor": (tensors(lambda t: t.update({"zzz": torch.zeros(1)})), "zzz is not a tensor of this run"),
    "no tensor": (tensors(lambda t: t.clear()), "is missing"),
    "a step of many numbers": (tensors(lambda t: t.update({f"step.{A}": torch.zeros(8)})), rf"step.{A} is float32 \(8,\)"),
    "a step of 10⁹": (tensors(lambda t: t[f"step.{A}"].fill_(1e9)), rf"{A}: the optimizer has done 1e\+09 steps, the run {STEP}"),
    "a step below 0": (tensors(lambda t: t[f"step.{A}"].fill_(-1)), "the optimizer has done -1 steps"),
    "half a step": (tensors(lambda t: t[f"step.{A}"].fill_(0.5)), "the optimizer has done 0.5 steps"),
    "a step that is no number": (tensors(lambda t: t[f"step.{A}"].fill_(torch.nan)), "the optimizer has done nan steps"),
    "no loss scale": (tensors(lambda t: t.pop("scale")), "scale is missing"),
    "another loss scale": (tensors(lambda t: t.update(scale=torch.zeros(3))), r"scale is float32 \(3,\)"),
    "no safetensors": (lambda folder: (folder / TENSORS).write_bytes(b"PK"), "too short for a safetensors file"),
    "step 10⁹": (state(lambda s: s["progress"].update(step=10**9)), "step is 1,000,000,000, its folder is step-000004"),
    "step below 0": (state(lambda s: s["progress"].update(step=-1)), "step is -1, its folder is"),
    "step as text": (state(lambda s: s["progress"].update(step="4")), "progress.step is '4': Input should be a valid integer"),
    "step true": (state(lambda s: s["progress"].update(step=True)), "progress.step is True: Input should be a valid integer"),
    "no step number": (state(lambda s: s["progress"].update(step=float("nan"))), "progress.step is nan"),
    "step null": (state(lambda s: s["progress"].update(step=None)), "progress.step is None"),
    "tokens in a list": (state(lambda s: s["progress"].update(tokens=[9])), r"progress.tokens is \[9\]"),
    "tokens below 0": (state(lambda s: s["progress"].update(tokens=-9)), "expected 0 or more"),
    "a best step to come": (state(lambda s: s["progress"].update(best_step=5)), "best_step is 5, expected 1 to 4"),
    "a best step without its loss": (state(lambda s: s["progress"].update(best_loss=None)), "has only one of best_step and best_loss"),
    "one more number": (state(lambda s: s["progress"].update(momentum=0.9)), "progress.momentum is 0.9: Unexpected keyword argument"),
    "progress as a list": (state(lambda s: s.update(progress=[4])), r"progress is \[4\]: Input should be an object"),
    "no progress": (state(lambda s: s.pop("progress")), "progress is"),
    "no origin": (state(lambda s: s.pop("origin")), "origin is"),
    "a log of 10¹⁸ bytes": (state(lambda s: s["log"].update(size=10**18)), "metrics.jsonl: has changed since the run wrote it"),
    "a log below 0": (state(lambda s: s["log"].update(size=-1)), "metrics.jsonl: has changed since the run wrote it"),
    "a list": (text("[4]"), "expected a JSON object, found list"),
    "no JSON": (text("{"), "is not valid JSON"),
    "a name twice": (text('{"log": {}, "log": {}}'), "the JSON has the duplicate key 'log'"),
    "JSON without end": (text('{"a":' * 50_000), "is not valid JSON"),
    "a long number": (state(lambda s: s["progress"].update(seconds=10**400)), "seconds is inf, expected 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_in_a_checkpoint_is_checked_beyond_its_hashes(stopped: tuple[Recipe, Path], kind: str) -> None:
    recipe, run = stopped
    change, said = OTHER[kind]
    change(folder := checkpoints.at(run, STEP))
    sealed(folder)
    with pytest.raises(FormatError, match=rf"{said}.*To resume from an older checkpoint, remove "):
        resumed(recipe, run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["origin"]["recipe"].update(lr=1e-3), "lr is 0.01, the run began with 0.001"),
        (
            lambda s: s["origin"]["recipe"].update(rank_pattern={"q_proj": 4}),
            "rank_pattern is None, the run began with",
        ),
        (lambda s: s["origin"].update(data="0" * 64), "train.jsonl has changed since the run began"),
        (lambda s: s["origin"].update(held_back="0" * 64), "train.jsonl has changed since the run began"),
        (lambda s: s["origin"]["base"].update({"model.safetensors": "0" * 64}), "base has changed since the run began"),
        (lambda s: s["origin"]["recipe"].update(momentum=1), "unknown key 'momentum'"),
        (lambda s: s["origin"]["recipe"].update(rank="many"), "rank is 'many'"),
        (lambda s: s["origin"]["recipe"].update(rank=-1), "`rank` -1: expected 1 or more"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    stopped: tuple[Recipe, Path], change: Callable[[dict[str, Any]], object], said: str
) -> None:
    recipe, run = stopped
    state(change)(folder := checkpoints.at(run, STEP))
    sealed(folder)
    with pytest.raises(AdapterkitError, match=said):
        resumed(recipe, run)


def test_another_base_or_first_adapter_is_not_resumed(began: tuple[Recipe, Path], tmp_path: Path) -> None:
    base, first, out = tmp_path / "base", tmp_path / "first", tmp_path / "out"
    shutil.copytree(began[0].base, base)
    list(train(replace(began[0], max_steps=1), first))
    recipe = replace(began[0], base=str(base), init_from=str(first))
    list(train(recipe, out, stop=lambda: True))
    raw = (first / "adapter_config.json").read_text()
    (first / "adapter_config.json").write_text(raw.replace('"lora_alpha": 16', '"lora_alpha": 17'))
    with pytest.raises(FitError, match=rf"`resume=True`: {first} has changed since the run began"):
        resumed(recipe, interrupted_run(out))
    (first / "adapter_config.json").write_text(raw)
    flip(base / "model.safetensors")
    with pytest.raises(FitError, match=rf"`resume=True`: {base} has changed since the run began"):
        resumed(recipe, interrupted_run(out))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000", "step-000100", "step-x", "step-²²²²²²", ".step-000200.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [checkpoints.number(folder) for folder in checkpoints.steps(tmp_path)] == [100, 999_999, 1_000_000]
