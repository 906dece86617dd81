"""Whole training runs on a tiny model: their files, and the same bits after any interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from handmade import adapterkit as cli
from handmade import interrupted_run
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny import WORDS, save_tiny_model
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.fingerprint import fingerprint
from adapterkit.cli.main import group
from adapterkit.errors import AdapterkitError, FitError, FormatError, NoSpaceError, OutputExistsError, UsageError
from adapterkit.files.staging import unfinished_work
from adapterkit.train.injection import lora_layers
from adapterkit.train.layers import LoraLinear
from adapterkit.train.loop import Loop, Stepped
from adapterkit.train.loss import perplexity
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs import checkpoints, train
from adapterkit.train.runs.export import base_id
from adapterkit.train.runs.load_model import load_model
from adapterkit.train.runs.prepare_model import prepare
from adapterkit.train.runs.run import Evaluated, Started, Stopped, Trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Increasing sequences of uneven length, which can be learned."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [" ".join(WORDS[n % 50 : n % 50 + 3 + n * 7 % 8]) for n in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def recipe(base: Path, data: Path) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        defaults = {"base": str(base), "data": str(data), "batch_size": 4, "epochs": 2, "lr": 1e-2, "dropout": 0.1}
        return Recipe(**(defaults | changes))

    return make


def finished(events: Iterator[Any]) -> Trained:
    *_, last = events
    assert isinstance(last, Trained)
    return last


def losses(events: Iterator[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Stepped)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = adapterkit.load(folder)
    return {f"{name}.{part}": getattr(adapter[name], part) for name in adapter.modules for part in ("A", "B")}


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "rslora"}, {"method": "dora"}, {"init": "pissa"}, {"init": "olora"}, {"targets": "all-linear"},
     {"targets": r".*\.(gate|up)_proj"}, {"layers": "1"}, {"rank_pattern": {"q_proj": 3}}, {"packing": True, "max_length": 24},
     {"targets": "q_proj,embed_tokens"}, {"grad_accum": 3}, {"gradient_checkpointing": True}, {"dtype": "bf16"}, {"dtype": "fp16"}],
    ids=str,
)  # fmt: skip
def test_a_run_learns_and_peft_loads_its_adapter(
    recipe: Callable[..., Recipe], base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    events = list(train(recipe(eval_share=0.2, epochs=4, **changes), tmp_path / "out"))
    measured = [event.loss for event in events if isinstance(event, Evaluated)]
    assert measured[-1] < measured[0] - 0.05
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.jsonl",
             "adapterkit_recipe.yaml", "adapterkit_training.json"}  # fmt: skip
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert unfinished_work(tmp_path / "out", "train") is None

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids).logits
    peft = PeftModel.from_pretrained(model, tmp_path / "out")
    logits = peft(input_ids=ids).logits
    assert (logits - before).abs().max() > 0.01
    adapterkit.merge(base, [tmp_path / "out"], tmp_path / "merged", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, logits, atol=1e-4, rtol=1e-4)
    assert adapterkit.load(tmp_path / "out").base_fingerprint == fingerprint(open_checkpoint(base)) != {}


def test_full_fine_tuning_writes_a_model(recipe: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    events = list(train(recipe(method="full", dropout=0.0, eval_share=0.2, lr=1e-3), tmp_path / "out"))
    [started] = [event for event in events if isinstance(event, Started)]
    assert started.trained == started.parameters
    measured = [event.loss for event in events if isinstance(event, Evaluated)]
    assert measured[-1] < measured[0] - 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(base)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_model_has_the_same_losses(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    wanted = recipe(method="dora", dropout=0.0)
    plain = losses(train(wanted, tmp_path / "plain"))
    compiled = losses(train(replace(wanted, compile=True), tmp_path / "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_peft_finds_the_base_by_its_name(
    recipe: Callable[..., Recipe], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(train(recipe(max_steps=1), tmp_path / "one"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert model.base_model.model.config.vocab_size == 63
    assert str(base) not in (tmp_path / "one" / "README.md").read_text()
    monkeypatch.chdir(base.parent)
    finished(train(recipe(base=base.name, max_steps=1, rank_pattern={"q_proj": 2}), tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"] == base.name


@pytest.mark.parametrize(
    ("folder", "said", "record", "wanted"),
    [
        ("models--lab--a--b/snapshots/0123abc", None, False, "lab/a--b"), ("base", None, False, None),
        ("models--gpt2/snapshots/0123abc", None, False, None), ("Tiny", "lab/Tiny", False, "lab/Tiny"),
        ("Tiny", "lab/Tiny", True, None), ("mine", "lab/Tiny", False, None), ("Tiny", "/home/me/Tiny", False, None),
        ("Tiny", ["lab/Tiny"], False, None),
    ],
)  # fmt: skip
def test_the_hub_id_of_a_base(
    base: Path, tmp_path: Path, folder: str, said: Any, record: bool, wanted: str | None
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / folder))
    config = json.loads((copy / "config.json").read_text()) | ({"_name_or_path": said} if said else {})
    (copy / "config.json").write_text(json.dumps(config))
    if record:  # what was merged is no longer what the config speaks of
        (copy / "adapterkit_merge.json").write_text("{}")
    (tmp_path / "link").symlink_to(copy)
    assert [base_id(open_checkpoint(path)) for path in (copy, tmp_path / "link")] == [wanted, wanted]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_in_4_bits(recipe: Callable[..., Recipe], tmp_path: Path, kind: str, method: str) -> None:
    events = list(train(recipe(quantize=kind, method=method, eval_share=0.2, epochs=3), tmp_path / "out"))
    measured = [event.loss for event in events if isinstance(event, Evaluated)]
    assert measured[-1] < measured[0] - 0.05


def test_loftq_starts_closer_to_the_base(recipe: Callable[..., Recipe], base: Path) -> None:
    wanted = recipe(quantize="fp4", init="loftq", targets="all-linear", rank=12, alpha=5.0)
    model = load_model(open_checkpoint(base), torch.float32, torch.device("cpu"), "fp4")
    prepare(model, wanted, open_checkpoint(base))
    stored = load_file(base / "model.safetensors")
    layers = lora_layers(model.model)
    assert len(layers) == 14
    for name, layer in layers.items():
        W, A, B = stored[f"{name}.weight"], layer.A.detach(), layer.B.detach()
        assert (layer.dense() + layer.scaling * B @ A - W).norm() < 0.75 * (layer.dense() - W).norm()


def test_the_model_card(recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    finished(train(recipe(eval_share=0.1), tmp_path / "out", command="adapterkit train …"))
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "train.jsonl: 36 records",
        "18 steps of 4 records",
        "lr 0.01, cosine",
        "adapterkit train …",
        "torch",
        "validation loss",
    ):
        assert said in card
    record = json.loads((tmp_path / "out" / "adapterkit_training.json").read_text())
    assert record["recipe"]["rank"] == 8 and record["data"]["records"] == 36 and record["steps"] == 18
    assert str(data.parent) not in card
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 19))


def test_one_is_one(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": " ".join(WORDS)}) + "\n")
    result = invoke("train", base, data, "-o", tmp_path / "out", "--max-length", "8", "--batch-size", "1")
    assert (
        "data       1 record, 8 tokens" in result.stderr and "note: truncated 1 record at one.jsonl:1" in result.stderr
    )
    assert ", 1 step, " in result.stderr and "trained    1 step, 8 tokens" in result.stdout
    assert "1 step of 1 record |" in (tmp_path / "out" / "README.md").read_text()


def test_a_perplexity_that_overflows_is_infinite() -> None:
    assert perplexity(2.0) == pytest.approx(7.389056) and perplexity(1e4) == float("inf")


def test_modules_without_a_gradient_are_reported(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        finished(train(recipe(max_steps=1), tmp_path / "one")).without_gradient == ()
    )  # though A has none in a first step
    real = LoraLinear.forward
    monkeypatch.setattr(  # as a model that reads the weight, and never calls the layer
        LoraLinear, "forward", lambda layer, x: layer.base(x) if layer.B.shape[0] == 16 else real(layer, x)
    )
    done = finished(train(recipe(max_steps=3), tmp_path / "two"))
    assert done.without_gradient == ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")


def test_training_continues_from_an_adapter(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    finished(train(recipe(method="dora", rank=4, alpha=6, dropout=0.0), tmp_path / "one"))
    before = weights(tmp_path / "one")
    events = list(train(recipe(init_from=str(tmp_path / "one"), lr=1e-9, eval_share=0.2), tmp_path / "two"))
    measured = [event.loss for event in events if isinstance(event, Evaluated)]
    assert measured[0] == pytest.approx(measured[-1], abs=1e-4)  # it began where the other ended
    after = weights(tmp_path / "two")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=1e-4)


# --- order, chance and interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "dora", "packing": True, "max_length": 16}, {"init": "pissa"}, {"lora_plus": 4.0}],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(
    recipe: Callable[..., Recipe], tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = recipe(save_every=5, eval_share=0.2, eval_every=3, **changes)
    whole = losses(train(wanted, tmp_path / "whole"))
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count == 3

    seen = list(train(wanted, tmp_path / "parts", stop=stop))
    assert isinstance(seen[-1], Stopped) and seen[-1].step == 3
    assert not (tmp_path / "parts").exists()
    with pytest.raises(OutputExistsError, match="interrupted after step 3"):
        next(train(wanted, tmp_path / "parts"))
    assert losses(iter(seen)) + losses(train(wanted, tmp_path / "parts", resume=True)) == whole
    assert same(tmp_path / "whole", tmp_path / "parts")

    def steps(out: str) -> list[Any]:
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert steps("whole") == steps("parts")


def test_resuming_after_a_crash(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(save_every=4)
    finished(train(wanted, tmp_path / "whole"))
    real = Loop.advance

    def fails(loop: Loop, stop: bool = False) -> Stepped:
        if loop.step == 10:
            raise RuntimeError("the power went")
        return real(loop, stop)

    monkeypatch.setattr(Loop, "advance", fails)
    with pytest.raises(RuntimeError, match="the power went"):
        finished(train(wanted, tmp_path / "out"))
    monkeypatch.undo()
    assert [checkpoints.number(folder) for folder in checkpoints.steps(interrupted_run(tmp_path / "out"))] == [4, 8]
    events = list(train(wanted, tmp_path / "out", resume=True))
    assert next(event.step for event in events if isinstance(event, Stepped)) == 9
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_failure_before_any_checkpoint_leaves_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "advance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finished(train(recipe(), tmp_path / "deep" / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"rank": 4}, {"epochs": 3.0}], ids=str)
def test_another_recipe_is_not_resumed(recipe: Callable[..., Recipe], tmp_path: Path, change: dict[str, Any]) -> None:
    list(train(recipe(), tmp_path / "out", stop=lambda: True))
    with pytest.raises(FitError, match=f"`resume=True`: {next(iter(change))} is"):
        next(train(recipe(**change), tmp_path / "out", resume=True))
    assert checkpoints.steps(interrupted_run(tmp_path / "out"))


def test_other_data_is_not_resumed(recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(data.read_text())
    wanted = recipe(data=str(mine))
    list(train(wanted, tmp_path / "out", stop=lambda: True))
    mine.write_text(data.read_text().replace("w3 ", "w4 "))
    with pytest.raises(FitError, match="has changed since the run began"):
        next(train(wanted, tmp_path / "out", resume=True))


def test_nothing_to_resume(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint beside"):
        next(train(recipe(), tmp_path / "out", resume=True))


def test_killed_while_it_writes(recipe: Callable[..., Recipe], base: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL at a checkpoint's rename: the previous one is intact, and the resumed run ends with the same bits."""
    wanted = recipe(save_every=2, dropout=0.0)
    finished(train(wanted, tmp_path / "whole"))
    script = f"""
import os, signal
from pathlib import Path
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs import train
rename = Path.rename
def killed(path, target):
    if path.name == ".step-000006.partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
Path.rename = killed
list(train(Recipe(base={str(base)!r}, data={str(data)!r}, batch_size=4, epochs=2, lr=1e-2, save_every=2),
           {str(tmp_path / "out")!r}))
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums by two threads have other bits
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, env=env).returncode == -signal.SIGKILL
    events = list(train(wanted, tmp_path / "out", resume=True))
    assert next(event.step for event in events if isinstance(event, Stepped)) == 5
    assert same(tmp_path / "whole", tmp_path / "out")


def test_the_best_state_is_saved(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7])
    monkeypatch.setattr(Loop, "evaluate", lambda *_: next(told))
    done = finished(train(recipe(eval_share=0.2, eval_every=2, patience=2), tmp_path / "out"))
    assert done.saved_step == 4 and done.stopped_early and done.progress.step == 8 and done.progress.best_loss == 3.0
    monkeypatch.undo()
    # the bits are those of step 4
    list(train(recipe(eval_share=0.2, eval_every=100), tmp_path / "four", stop=_after(4)))
    state = checkpoints.load(checkpoints.at(interrupted_run(tmp_path / "four"), 4))
    for name, tensor in weights(tmp_path / "out").items():
        module, _, part = name.rpartition(".")
        assert torch.equal(tensor, state[f"trained.{module}.{part}"])


def _after(steps: int) -> Callable[[], bool]:
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count == steps

    return stop


def test_a_non_finite_loss_stops_the_run_with_its_cause(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(AdapterkitError, match=r"step \d+: the (loss|gradient's norm) is (nan|inf).*`lr`"):
        finished(train(recipe(lr=1e38, clip=0.0, warmup=0.0, schedule="constant"), tmp_path / "out"))


def test_records_are_weighted_by_their_tokens(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """A step in one batch or in several is the same sum over the same tokens."""
    one = losses(train(recipe(batch_size=8, grad_accum=1, dropout=0.0), tmp_path / "one"))
    four = losses(train(recipe(batch_size=2, grad_accum=4, dropout=0.0), tmp_path / "four"))
    assert four == pytest.approx(one, rel=1e-4)


# --- several processes -----------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adapterkit"]


def test_two_processes_compute_the_same_as_one(
    recipe: Callable[..., Recipe], base: Path, data: Path, tmp_path: Path
) -> None:
    words = ["train", str(base), str(data), "--batch-size", "3", "--grad-accum", "2", "--lr", "1e-2", "--eval-share",
             "0.2", "--max-steps", "8", "--epochs", "9", "--eval-every", "4", "--method", "dora"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*TORCHRUN, *words, "-o", str(tmp_path / "two")], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("wrote") == 1
    assert CliRunner().invoke(group, [*words, "-o", str(tmp_path / "one")]).exit_code == 0

    def metrics(out: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    one, two = metrics("one"), metrics("two")
    assert len(one) == len(two) == 8 + 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine.get("loss", mine.get("eval_loss")) == pytest.approx(
            theirs.get("loss", theirs.get("eval_loss")), rel=1e-4
        )
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_two_processes_resume_the_run_of_one(
    recipe: Callable[..., Recipe], base: Path, data: Path, tmp_path: Path
) -> None:
    wanted = recipe(dropout=0.0, max_steps=8, epochs=9.0)
    whole = losses(train(wanted, tmp_path / "whole"))
    list(train(wanted, tmp_path / "out", stop=_after(3)))
    file = interrupted_run(tmp_path / "out") / "adapterkit_recipe.yaml"
    words = ["train", "--recipe", str(file), "-o", str(tmp_path / "out"), "--resume"]
    ran = subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(whole, rel=1e-4)


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Any:
    return CliRunner().invoke(group, [str(word) for word in words])


def test_the_command(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("train", base, data, "-o", out, "--lr", "1e-2", "--eval-share", "0.2", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    assert (
        "trained    4 steps" in result.stdout
        and "validation loss" in result.stdout
        and f"wrote      {out}" in result.stdout
    )
    assert "32 records" in result.stderr and "8 records held out" in result.stderr
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert f"plot       {tmp_path / 'p.svg'}: training loss, validation loss, learning rate" in result.stdout
    again = invoke("train", "--recipe", out / "adapterkit_recipe.yaml", "-o", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["step"] == 4
    assert same(out, tmp_path / "again")


def test_ctrl_c_says_how_to_resume(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-m", "adapterkit", "train", str(base), str(data), "-o", str(out), "--epochs", "100000"]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "memory" not in (line := process.stderr.readline()):
        assert line, "ended before it began"
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert "interrupted; saved step" in said and f"-o {out} --resume" in said
    assert not out.exists() and checkpoints.steps(interrupted_run(out))


@pytest.mark.parametrize("name", ["a b\n\x1b[2J\u202e", "-it's"])
def test_the_printed_command_to_resume_works(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In bash, whatever characters the output's name has."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("adapterkit.cli.commands.train._stop_requested", lambda: nullcontext(lambda: True))
        said = cli("train", base, data, "-o", f"{name}/out", "--max-steps", "2").err.splitlines()[-1]
    assert said.isprintable()
    script = f"adapterkit() {{ printf '%s\\0' \"$@\"; }}; {said.partition('resume with: ')[2]}"
    words = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True).stdout.decode().split("\0")
    assert cli(*words[:-1]).code == 0
    assert (tmp_path / name / "out" / "adapter_model.safetensors").is_file()


def test_memory_is_estimated_before_the_run(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke("train", base, data, "--memory")
    assert result.exit_code == 0 and "activations" in result.stdout and "free" in result.stdout
    monkeypatch.setattr("adapterkit.train.runs.memory.available", lambda _: 1000)
    refused = invoke("train", base, data, "-o", tmp_path / "out")
    assert isinstance(refused.exception, UsageError) and "would fit" in str(refused.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--method", "full", "--rank", "4"], UsageError, "--rank applies to factors"),
        (["--targets", "q_porj"], UsageError, "no module is named 'q_porj'; the model has .*q_proj"),
        (["--layers", "x"], UsageError, "expected numbers and ranges"),
        (["--init", "loftq"], UsageError, "it needs --quantize nf4"),
        (["--eval-share", "2"], UsageError, "--eval-share 2.0: expected at least 0 and less than 1"),
        (["--device", "tpu9"], UsageError, "--device tpu9"),
        (["--rank-pattern", "q_proj"], UsageError, "NAME=VALUE"),
        (["--plot", "p.gif"], UsageError, "a plot is a"),
        (["--init-from", "nowhere/x.safetensors"], FormatError, "nowhere"),
        (["--recipe", "no-such.yaml"], FormatError, "no-such.yaml: cannot be read: No such file"),
        (["--layers", "0-99999999999"], UsageError, "expected numbers and ranges"),
    ],
)
def test_invalid_runs_are_refused(
    base: Path, data: Path, tmp_path: Path, words: list[str], error: type[Exception], said: str
) -> None:
    result = invoke("train", base, data, "-o", tmp_path / "out", *words)
    assert isinstance(result.exception, error), result.output
    with pytest.raises(error, match=said):
        raise result.exception
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_contains_the_recipe_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    """Like any input, since replacing an output removes all of it."""
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(f"base: {base}\ndata: {data}\n")
    refused = invoke("train", "--recipe", recipe, "-o", recipe.parent, "--overwrite")
    assert isinstance(refused.exception, UsageError) and "contains the input" in str(refused.exception)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 tensors that its config requires, such as model\.layers\.2\."),
        ({"intermediate_size": 64}, r"mlp\.\w+\.weight has shape \(\d+, \d+\), but its config expects"),
        ({"model_type": "nonsense"}, "model_type is 'nonsense', which transformers [0-9.]+ does not support"),
    ],
    ids=str,
)
def test_no_weight_is_initialized_at_random(
    base: Path, data: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(base, wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(FormatError, match=said):
        finished(train(Recipe(base=str(wrong), data=str(data)), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [wrong]


def test_a_full_disk_leaves_the_last_checkpoint(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoints.write_tensors

    def full(file: Path, *rest: Any) -> None:
        if "step-000004" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, *rest)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(
        NoSpaceError, match="free some space\nthe last checkpoint is saved: continue with `resume=True`"
    ):
        finished(train(recipe(save_every=2), tmp_path / "out"))
    monkeypatch.undo()
    finished(train(recipe(save_every=2), tmp_path / "out", resume=True))


def test_bad_records_stop_a_run_or_are_skipped(base: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text() + '{"text": ""}\n{"text": \n')
    result = invoke("train", base, broken, "-o", tmp_path / "out")
    assert isinstance(result.exception, FormatError) and "broken.jsonl:41" in str(result.exception)
    result = invoke("train", base, broken, "-o", tmp_path / "out", "--skip-bad")
    assert result.exit_code == 0 and "skipped broken.jsonl:42" in result.stderr
