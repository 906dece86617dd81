"""All-or-nothing outputs: inputs and unrelated files are never changed, and a crash leaves a complete output."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import adapterkit, contents, factors, write_adapter, write_base
from safetensors.torch import load_file
from standins import failing

import adapterkit as package
from adapterkit.cli import run_plan
from adapterkit.errors import OutputExistsError
from adapterkit.files.workspace import MARK, Mark, Workspace
from adapterkit.merging.receipts.resume import job_of
from adapterkit.merging.run_options import RunOptions

ROOT = Path(package.__file__).parents[1]


@pytest.mark.parametrize("file", [True, False], ids=["file", "directory"])
def test_killed_at_every_step(tmp_path: Path, file: bool) -> None:
    write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    scenarios: list[dict[str, Any]] = [{}, {"overwrite": True}, {"overwrite": True, "swaps": False}]
    scenarios += [{"overwrite": True, "options": ["--no-receipt"]}] if file else [{"resume": True}]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    words = [json.dumps({"file": file, **scenario}) for scenario in scenarios]
    killed = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed.py", tmp_path, *words], capture_output=True, text=True, env=env
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr
    steps = [int(line.rpartition(" ")[2]) for line in killed.stdout.splitlines()]
    assert len(steps) == len(scenarios) and min(steps) >= 8, steps


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[Path]:
    """A folder with `base`, `adapter` and a merge of them, `merged`; checks that they don't change."""
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    assert adapterkit("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged").code == 0
    before = contents(tmp_path)
    yield tmp_path
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    "name", [".out.partial", ".out.replaced", ".out.before-1", "out.receipt", ".adapterkit-01234567"]
)
@pytest.mark.parametrize("command", ["merge", "unmerge", "combine", "resize", "convert", "extract", "quantize"])
def test_inputs_of_any_name_are_unchanged(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    """Temporary names were once derived from the output's, and existing files there removed, even inputs."""
    monkeypatch.chdir(inputs)
    for of in ("base", "adapter", "merged"):
        shutil.copytree(of, Path(name) / of)
    shutil.copytree("base", name, dirs_exist_ok=True)  # itself a base, with an adapter below it
    before = contents(Path(name))
    words = {
        "merge": [name, f"{name}/adapter"], "unmerge": [f"{name}/merged", "--all", "--adapter", f"{name}/adapter"],
        "combine": [f"{name}/adapter", "adapter"], "resize": [f"{name}/adapter", "--rank", "2"],
        "convert": [f"{name}/adapter", "--to", "rslora"], "extract": [name, f"{name}/merged", "--rank", "2"],
        "quantize": [name, "--to", "int8"],
    }[command]  # fmt: skip
    result = adapterkit(command, *words, "-o", "out")
    assert result.code == 0, result
    assert contents(Path(name)) == before
    assert sorted(os.listdir()) == sorted({"adapter", "base", "merged", "out", name})


def test_undoing_several_merges_changes_no_other_folder(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint between two levels was once written to, and removed at, `.OUT.before-1`."""
    monkeypatch.chdir(inputs)
    assert adapterkit("merge", "merged", "adapter", "-o", ".again.before-1").code == 0
    before = contents(Path(".again.before-1"))
    assert adapterkit("unmerge", ".again.before-1", "--all", "-o", "again").code == 0
    assert contents(Path(".again.before-1")) == before and contents(Path("again")) == contents(Path("base"))


def test_a_file_at_a_likely_temporary_name_is_not_used(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file longer than the output, whose end was once left in it."""
    monkeypatch.chdir(inputs)
    Path(".out.safetensors.partial").write_bytes(bytes(200_000))
    shard = "base/model-00001-of-00002.safetensors"
    assert adapterkit("merge", shard, "adapter", "-o", "out.safetensors", "--allow-partial").code == 0
    assert load_file("out.safetensors").keys() == load_file(shard).keys()
    assert Path(".out.safetensors.partial").stat().st_size == 200_000


OUTPUTS = {
    "in the base": lambda here: here / "base" / "out",
    "the adapter": lambda here: here / "adapter",
    "in the adapter": lambda here: here / "adapter" / "out",
    "above": lambda here: here,
    "in the base, by a link": lambda here: linked(here / "link", here / "base") / "out",
    "ours, with the base in it": lambda here: moved(here),
    "ours, with what the base links to": lambda here: moved(here, link=True),
}


def linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


def moved(here: Path, link: bool = False) -> Path:
    """An output of ours into which an input was moved, and replaced by a link to it or to its weights."""
    ours = here / "merged"
    shutil.copytree(here / "base", ours / "inner")
    if not link:
        shutil.rmtree(here / "base")
        (here / "base").symlink_to(ours / "inner")
    for file in [*(here / "base").glob("*.safetensors")] if link else []:
        file.unlink()
        file.symlink_to(ours / "inner" / file.name)
    return ours


INPUTS = {
    "merge": "base adapter", "combine": "adapter", "resize": "adapter", "convert": "base adapter", "extract": "base",
    "quantize": "base",
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (command, where)
        for command, read in INPUTS.items()
        for where in OUTPUTS
        if where == "above" or any(one in where for one in read.split())
    ],
)
def test_outputs_that_overlap_the_inputs_are_refused(tmp_path: Path, where: str, command: str) -> None:
    here = tmp_path / "here"
    write_base(here / "base"), write_adapter(here / "adapter"), write_adapter(here / "other")
    assert adapterkit("merge", here / "base", here / "adapter", "-o", here / "merged").code == 0
    shutil.copytree(here / "merged", here / "tuned")
    out = OUTPUTS[where](here)
    words: list[str | Path] = {
        "merge": [here / "base", here / "adapter"], "combine": [here / "adapter", here / "other"],
        "resize": [here / "adapter", "--rank", "2"], "quantize": [here / "base", "--to", "int8"],
        "convert": [here / "adapter", "--to", "dora", "--base", here / "base"],
        "extract": [here / "base", here / "tuned", "--rank", "2"],
    }[command]  # fmt: skip
    before = contents(tmp_path)
    assert "input" in adapterkit(command, *words, "-o", out, "--overwrite").message(2)
    assert contents(tmp_path) == before


def test_a_hard_link_to_an_input_is_not_overwritten(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard link to the base is not overwritten, even if the base is ours."""
    monkeypatch.chdir(inputs)
    shard = "model-00001-of-00002.safetensors"
    assert adapterkit("merge", f"base/{shard}", "adapter", "-o", "one.safetensors", "--allow-partial").code == 0
    for name in (".out.safetensors.partial", "out.safetensors"):
        os.link("one.safetensors", name)
    before = contents(inputs)
    result = adapterkit(
        "merge", "one.safetensors", "adapter", "-o", "out.safetensors", "--overwrite", "--allow-partial"
    )
    assert "is the input" in result.message_of_last(2)
    assert adapterkit("merge", "one.safetensors", "adapter", "-o", "new.safetensors", "--allow-partial").code == 0
    after = contents(inputs)
    assert {name: after[name] for name in before} == before


def test_an_output_that_shares_its_blocks_with_the_base_is_replaced(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --link makes it without reflinks: names are removed, the base's bytes are not."""
    monkeypatch.chdir(inputs)
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
    write_adapter(inputs / "small", {name: factors()[name] for name in names})
    monkeypatch.setattr(fcntl, "ioctl", failing(OSError(errno.EOPNOTSUPP, "no")))
    for more in ((), ("--overwrite",)):
        assert adapterkit("merge", "base", "small", "-o", "out", "--link", *more).code == 0
        assert any(os.path.samefile(file, f"base/{file.name}") for file in Path("out").glob("*.safetensors"))


# --- what is not ours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["unmarked", "another user's", "of another output", "a file", "not a mark", "a link"])
def test_folders_without_our_mark_are_unchanged(inputs: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """Folders and files named like workspaces that are not workspaces for this output."""
    name = inputs / ".adapterkit-0123abcd"
    if left == "a file":
        name.write_text("years of work")
    elif left == "a link":
        name.symlink_to(inputs / "base")
    else:
        work = Workspace.create(inputs, Mark("other" if left == "of another output" else "out"))
        work.new.mkdir()
        (work.new / "thesis.tex").write_text("years of work")
        work.close()
        name = work.path
        if left == "unmarked":
            (name / MARK).unlink()
        elif left == "not a mark":
            (name / MARK).write_text('{"output": 3}')
        elif left == "another user's":
            stranger = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: stranger)
    before = contents(inputs)
    assert adapterkit("merge", inputs / "base", inputs / "adapter", "-o", inputs / "out").code == 0
    after = contents(inputs)
    assert {path: after.get(path) for path in before} == before and os.path.lexists(name)


@pytest.mark.parametrize("how", [[], ["--resume"]])
def test_a_forged_mark(inputs: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]) -> None:
    """An attacker can predict the job; the folder to be emptied and resumed is a link to another."""
    monkeypatch.chdir(inputs)
    Path("precious").mkdir()
    Path("precious/thesis.tex").write_text("years of work")
    work = Workspace.create(Path(), Mark("out", job_of(package.plan_merge("base", "adapter", "out"), RunOptions())))
    (work.path / "new").symlink_to(inputs / "precious")
    work.close()
    assert adapterkit("merge", "base", "adapter", "-o", "out", *how).code == 0
    assert os.listdir("precious") == ["thesis.tex"] and not Path("out").is_symlink()
    assert not work.path.exists()


def test_the_next_run_removes_workspaces_of_dead_runs(inputs: Path) -> None:
    """Workspaces for this output, and those without a complete mark."""
    work = Workspace.create(inputs, Mark("out"))
    work.new.mkdir()
    work.close()
    (inputs / ".adapterkit-00000000").mkdir(0o1700)
    (inputs / ".adapterkit-00000001").mkdir(0o1700)
    (inputs / ".adapterkit-00000001" / MARK).write_text('{"adap')
    assert adapterkit("merge", inputs / "base", inputs / "adapter", "-o", inputs / "out").code == 0
    assert sorted(os.listdir(inputs)) == ["adapter", "base", "merged", "out"]


@pytest.mark.parametrize("what", ["another file", "no safetensors", "a receipt of another's"])
def test_a_file_that_is_not_ours_is_not_replaced(inputs: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(run_plan, "run", failing(AssertionError("began")))
    out, file = inputs / "out.safetensors", inputs / "base" / "model-00001-of-00002.safetensors"
    if what == "a receipt of another's":
        out.with_name("out.safetensors.receipt").mkdir()
        (out.with_name("out.safetensors.receipt") / "thesis.tex").write_text("years of work")
    else:
        out.write_bytes(file.read_bytes() if what == "another file" else b"years of work")
    before = contents(inputs)
    result = adapterkit("merge", file, inputs / "adapter", "-o", out, "--allow-partial", "--overwrite")
    assert "was not made by adapterkit" in result.message_of_last(7)
    assert contents(inputs) == before


@pytest.mark.parametrize("there", ["file", "directory"])
def test_a_file_in_place_of_a_directory_fails_before_computing(inputs: Path, there: str) -> None:
    out, base = inputs / "out", inputs / "base" / ("" if there == "file" else "model-00001-of-00002.safetensors")
    shutil.copytree(inputs / "merged", out) if there == "directory" else out.write_text("years of work")
    before = contents(inputs)
    with pytest.raises(OutputExistsError, match=f"is a {there}, but the output is a"):
        package.plan_merge(base, [inputs / "adapter"], out, overwrite=True, allow_partial=True)
    assert contents(inputs) == before


def test_a_merge_preserves_an_interrupted_training_run(inputs: Path) -> None:
    work = Workspace.create(inputs, Mark("out", "train", precious=True))
    (work.new / "checkpoints").mkdir(parents=True)
    work.close()
    assert adapterkit("merge", inputs / "base", inputs / "adapter", "-o", inputs / "out").code == 0
    assert (work.new / "checkpoints").is_dir()


# --- names, places, file systems -------------------------------------------------------------------------------------


def test_long_names(inputs: Path) -> None:
    """The length of a workspace's name doesn't depend on the output's."""
    long = inputs / ("x" * 255)
    assert adapterkit("merge", inputs / "base", inputs / "adapter", "-o", long).code == 0
    file = inputs / "base" / "model-00001-of-00002.safetensors"
    result = adapterkit("merge", file, inputs / "adapter", "-o", inputs / ("x" * 250), "--allow-partial")
    assert "too long to add a receipt" in result.message_of_last(2)
    bare = adapterkit("merge", file, inputs / "adapter", "-o", inputs / ("x" * 255), "--allow-partial", "--no-receipt")
    assert "already exists" in bare.message_of_last(7)
    shutil.rmtree(long)
    words = ["merge", file, inputs / "adapter", "-o", inputs / ("x" * 255), "--allow-partial", "--no-receipt"]
    assert adapterkit(*words).code == 0 and adapterkit(*words, "--overwrite").code == 0


def test_a_file_system_without_locks(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, whether a run is alive is unknown: its workspace stays, and the next run uses another."""
    work = Workspace.create(inputs, Mark("out"))
    work.close()
    monkeypatch.setattr(fcntl, "flock", failing(OSError(errno.ENOLCK, "no locks")))
    assert adapterkit("merge", inputs / "base", inputs / "adapter", "-o", inputs / "out").code == 0
    assert work.path.is_dir()


def test_a_receipt_that_cannot_be_flushed(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up between the renames of receipt and file: the old file keeps its own receipt."""
    file, out = inputs / "base" / "model-00001-of-00002.safetensors", inputs / "out.safetensors"
    words = ["merge", file, inputs / "adapter", "-o", out, "--allow-partial"]
    assert adapterkit(*words).code == 0
    before = contents(inputs)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing(OSError(errno.ENOSPC, "No space left on device")))
        said = adapterkit(*words, "--scale=2", "--overwrite").message_of_last(6)
    assert said.endswith("free some space; nothing was written")
    assert contents(inputs) == before
    assert adapterkit("unmerge", out, "-o", inputs / "again").code == 0
    assert (inputs / "again").read_bytes() == file.read_bytes()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_before_anything_is_imported(which: str, code: int) -> None:
    """Also while the command's modules are imported: no traceback, and an exit code rather than a signal."""
    script = f"""
import builtins, os, signal, sys
real, count = builtins.__import__, 0
def importing(name, *rest):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.{which})
    return real(name, *rest)
from adapterkit.__main__ import main
builtins.__import__ = importing
main()
"""
    for nth in ("1", "2", "40", "400"):
        ended = subprocess.run([sys.executable, "-c", script, nth], capture_output=True, text=True, cwd=ROOT)
        assert (ended.returncode, ended.stderr.strip()) == (code, "error: interrupted"), (nth, ended)


@pytest.mark.parametrize("step", ["_fill_closed_streams", "fail"])
def test_ctrl_c_just_before_a_command_begins_and_when_it_has_ended(step: str) -> None:
    script = f"""
import os, signal
from adapterkit.__main__ import main
from adapterkit.cli import main as cli
cli.{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
main()
"""
    ended = subprocess.run([sys.executable, "-c", script, "inspect", "gone"], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_in_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """During an import it would be swallowed or leave a partial module; it is raised once imports and deferred blocks end."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\n")
    script = """
from adapterkit.cli import signals
from adapterkit.files.staging import defer_signals
signals.end_cleanly()
try:
    import slow
    with defer_signals():
        print("held")
    while True:
        pass
except KeyboardInterrupt:
    print("interrupted")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:."}
    )  # fmt: skip
    assert ended.stdout.split() in (["imported", "interrupted"], ["imported", "held", "interrupted"]), ended
