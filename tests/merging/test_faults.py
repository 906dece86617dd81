"""Kills, Ctrl-C, full disks, failing reads, existing outputs: inputs are unchanged, and an output is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cache, partial
from itertools import count
from pathlib import Path
from tempfile import NamedTemporaryFile

import conftest
import pytest
import torch
from handmade import COLUMNS, Outcome, Terminal, adapterkit, contents, factors, write_adapter, write_base
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from standins import failing, nth_call

import adapterkit as package
from adapterkit.combining import write
from adapterkit.errors import ChangedError, OutputExistsError
from adapterkit.files import os_calls, stamps
from adapterkit.files.outfile import OutputFile
from adapterkit.files.staging import Destination, staged
from adapterkit.files.workspace import PREFIX
from adapterkit.merging import companions, verify
from adapterkit.merging.receipts.sidecar import SidecarWriter
from adapterkit.merging.run import builder, finish, pieces, run, scheduler
from adapterkit.merging.run.builder import FileBuilder
from adapterkit.merging.run.hashing import OutputHash
from adapterkit.merging.run.inputs import Inputs

ROOT = Path(package.__file__).parents[1]
KILLS = os.environ.get("STRESS_KILLS", "20")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[Path]:
    """A folder with only `base` (two shards) and `adapter`, both of which must be unchanged at the end."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    before = contents(tmp_path)
    yield tmp_path
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before


def merge(folder: Path, *options: str | Path, out: str | Path = "out") -> Outcome:
    return adapterkit("merge", folder / "base", folder / "adapter", "-o", folder / out, *options)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def building(folder: Path) -> Path:
    """The unfinished output in the only workspace of a folder."""
    [work] = [name for name in names(folder) if name.startswith(PREFIX)]
    return folder / work / "new"


def nothing_left(folder: Path) -> bool:
    return names(folder) == ["adapter", "base"]


# --- kills and ctrl-C ------------------------------------------------------------------------------------------------

# Run the real command line in forks of a process that has imported torch; the n-th call of one function ends each.
FORKING = """
import gc, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch  # now: parts of its import swallow a KeyboardInterrupt
import adapterkit.merging.blocks.bundle, adapterkit.cli.main
from adapterkit.files import staging, writing
from adapterkit.merging import companions
from adapterkit.merging.run import builder, finish, run, scheduler
from adapterkit.__main__ import main

def run_hooked(place, nth, which, out, err, *argv):
    owner, name = eval(place.rpartition(".")[0]), place.rpartition(".")[2]
    function, calls = getattr(owner, name), []
    def hooked(*args):
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), getattr(signal, which))
        return function(*args)
    setattr(owner, name, hooked)
    os.dup2(os.open(out, os.O_WRONLY), 1), os.dup2(os.open(err, os.O_WRONLY), 2)
    sys.argv[1:] = argv
    main()

gc.freeze()  # or each fork would copy what it only counts
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        sys.exit(run_hooked(*json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# Where a merge of four tensors in two shards may end: function, and which of its calls.
POINTS = [
    ("scheduler.Scheduler._create", 1),
    ("builder.FileBuilder._copy", 1),
    ("builder.FileBuilder.make", 1),
    ("builder.FileBuilder.make", 2),
    ("builder.FileBuilder._part_done", 3),
    ("builder.FileBuilder._part_done", 6),
    ("finish.finish_merge", 1),
    ("companions.copy_file", 1),
    ("writing.write_text", 2),
    ("staging._commit", 1),
]


@cache
def forking() -> subprocess.Popen[str]:
    """A process that forks on demand, and ends when this one closes its stdin."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", FORKING, ROOT], stdin=pipe, stdout=pipe, text=True)


def ended_by(place: tuple[str, int], which: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["merge", f"{folder}/base", f"{folder}/adapter", "-o", f"{folder}/out", "--threads", "2", *options]
    child = forking()
    assert child.stdin is not None and child.stdout is not None
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        child.stdin.write(json.dumps([*place, which, out.name, err.name, *command]) + "\n")
        child.stdin.flush()
        return subprocess.CompletedProcess(command, int(child.stdout.readline()), out.read(), err.read())


def loads(folder: Path) -> bool:
    """Whether a loader would accept `folder` as a model: a config, and shards that open."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                continue
        except SafetensorError:
            return False
    return (folder / "config.json").exists()


@pytest.mark.parametrize("place", POINTS, ids=lambda place: f"{place[0]}-{place[1]}")
def test_killed(inputs: Path, place: tuple[str, int]) -> None:
    assert ended_by(place, "SIGKILL", inputs).returncode == -signal.SIGKILL
    assert names(inputs)[1:] == ["adapter", "base"]
    assert place[0] == "staging._commit" or not loads(building(inputs))
    assert merge(inputs).code == 0
    assert names(inputs) == ["adapter", "base", "out"]
    assert loads(inputs / "out")


def test_an_unfinished_shard_does_not_open(inputs: Path) -> None:
    """Shards load without a config too, so a header must not be written before its tensors."""
    ended_by(("builder.FileBuilder.make", 1), "SIGKILL", inputs)
    shards = sorted(building(inputs).glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        with pytest.raises(SafetensorError):
            safe_open(shard, "pt")


@pytest.mark.parametrize("place", POINTS, ids=lambda place: f"{place[0]}-{place[1]}")
def test_interrupted(inputs: Path, place: tuple[str, int]) -> None:
    result = ended_by(place, "SIGINT", inputs)
    assert (result.returncode, result.stdout) == (130, "")
    if place[0] == "staging._commit":  # by then it is not to be stopped
        assert result.stderr.strip() == f"error: interrupted; {inputs}/out is complete"
        assert loads(inputs / "out") and names(inputs) == ["adapter", "base", "out"]
    else:
        assert result.stderr.strip() == "error: interrupted; nothing was written"
        assert nothing_left(inputs)


def test_interrupted_while_progress_is_drawn(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception does not pass through the merging generator, which must end anyway."""
    monkeypatch.setattr(Terminal, "isatty", lambda _: True)
    monkeypatch.setattr("rich.progress.Progress.update", failing(KeyboardInterrupt()))
    result = merge(inputs)
    assert result.code == 130
    assert nothing_left(inputs)


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
def test_an_interrupted_overwrite_keeps_the_old_output(inputs: Path, which: str) -> None:
    assert merge(inputs).code == 0
    old = contents(inputs / "out")
    assert ended_by(("builder.FileBuilder.make", 2), which, inputs, "--overwrite", "--scale=2").returncode != 0
    assert contents(inputs / "out") == old
    assert merge(inputs, "--overwrite", "--scale=2").code == 0
    assert contents(inputs / "out") != old
    assert names(inputs) == ["adapter", "base", "out"]


def test_a_failing_rename_puts_the_old_output_back(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel call that swaps two directories, the second of two renames may fail."""
    assert merge(inputs).code == 0
    old = contents(inputs / "out")
    monkeypatch.setattr(os_calls, "exchange", lambda *_: False)
    monkeypatch.setattr(os_calls, "rename_new", nth_call(os_calls.rename_new, 1, failing(OSError(errno.EIO, "gone"))))
    assert merge(inputs, "--overwrite").message(1) == f"{inputs}/out: gone"
    assert contents(inputs / "out") == old
    assert names(inputs) == ["adapter", "base", "out"]


# --- resuming --------------------------------------------------------------------------------------------------------


def finished(folder: Path) -> list[str]:
    """The shards that a killed merge recorded as finished; they get an old date."""
    found = sorted(note.stem for note in (building(folder) / ".adapterkit_progress").glob("*.json"))
    for name in found:
        os.utime(building(folder) / name, ns=(1, 1))
    return found


def reused(out: Path) -> list[str]:
    return [file.name for file in sorted(out.glob("*.safetensors")) if file.stat().st_mtime_ns == 1]


HALF = ("run.record_done", 2)  # one shard is finished and noted, the other finished


def test_a_killed_merge_is_resumed(inputs: Path) -> None:
    """A finished shard is not written again, whatever its inputs' dates; the output equals an uninterrupted one."""
    assert merge(inputs, out="fresh").code == 0
    ended_by(HALF, "SIGKILL", inputs)
    [first] = finished(inputs)
    os.utime(inputs / "base" / first, ns=(1, 1))
    os.utime(inputs / "adapter" / "adapter_model.safetensors", ns=(1, 1))
    assert merge(inputs, "--resume").code == 0
    assert reused(inputs / "out") == [first]
    assert contents(inputs / "out") == contents(inputs / "fresh")
    assert adapterkit("unmerge", inputs / "out", "-o", inputs / "again").code == 0
    assert contents(inputs / "again") == contents(inputs / "base")
    assert names(inputs) == ["adapter", "again", "base", "fresh", "out"]


@pytest.mark.parametrize("what", ["shard", "note", "base", "adapter", "plan"])
def test_shards_with_a_wrong_hash_are_merged_again(tmp_path: Path, what: str) -> None:
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    ended_by(HALF, "SIGKILL", tmp_path)
    [name] = finished(tmp_path)
    first, scale = building(tmp_path) / name, "--scale=2" if what == "plan" else "--scale=1"
    if what == "shard":
        raw = first.read_bytes()
        first.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        os.utime(first, ns=(1, 1))
    elif what == "note":
        (first.parent / ".adapterkit_progress" / f"{name}.json").write_text("{")
    elif what != "plan":
        overwritten(tmp_path / what / (name if what == "base" else "adapter_model.safetensors"))
    assert merge(tmp_path, "--resume", scale).code == 0
    assert merge(tmp_path, scale, out="fresh").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert reused(tmp_path / "out") == []


def test_ctrl_c_with_resume_saves_finished_shards(inputs: Path) -> None:
    result = ended_by(HALF, "SIGINT", inputs, "--resume")
    assert result.returncode == 130 and "finished shards are saved: continue with --resume" in result.stderr
    noted = finished(inputs)
    assert noted  # the other one too, where it was faster than the signal
    assert merge(inputs, "--resume").code == 0
    assert reused(inputs / "out") == noted and names(inputs) == ["adapter", "base", "out"]


def test_resume_needs_hashes(inputs: Path) -> None:
    assert "omit --resume" in merge(inputs, "--resume", "--no-receipt").message(2)
    assert "give one of them" in merge(inputs, "--resume", "--dry-run").message(2)


# Fork children that are killed at a random call of the operating system's, from a process that has imported torch.
KILLER = """
import gc, os, random, shutil, signal, sys, threading
from contextlib import redirect_stdout, suppress
sys.path.insert(0, sys.argv[1])
from adapterkit.cli.main import main
CALLS = ["pwrite", "preadv", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "posix_fallocate", "open", "close"]

def run(args, fatal=None):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count, lock = [0], threading.Lock()
    def counting(call):
        def counted(*args, **how):
            with lock:
                count[0] += 1
                if count[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **how)
        return counted
    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    sys.argv = ["adapterkit", *args]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    try:
        main()
    except SystemExit as end:
        if fatal is None:
            os._exit(end.code or 0)
        os._exit(200)  # it ended before
    os._exit(201)

os.chdir(sys.argv[2])
os.fsync = lambda _: None  # what a killed process wrote stays with the kernel, on the disk or not
rng, kills = random.Random(int(sys.argv[4])), 0
command, resume, total = sys.argv[5].split(), sys.argv[6].split(), int(sys.argv[3])
sys.argv = ["adapterkit", *command]
with redirect_stdout(sys.stderr), suppress(SystemExit):
    main()  # here, so that all is imported before anything is forked
shutil.rmtree("out")
gc.freeze()  # or each fork would copy what it only counts
while kills < total:
    status = run(command if rng.random() < 0.5 else [*command, *resume], rng.randrange(1, 120))
    kills += os.WIFSIGNALED(status)
    print(kills, os.path.exists("out"), flush=True)
    check = sys.stdin.readline()  # the other side looks at it
    if check.strip() == "again":
        assert run([*command, *resume] if rng.random() < 0.7 else command) == 0
        print("again", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("command", "resume"),
    [("merge base adapter -o out --threads 2", "--resume"), ("unmerge merged -o out --threads 2", "")],
    ids=["merge", "unmerge"],
)
def test_killed_at_random(inputs: Path, command: str, resume: str) -> None:
    """Killed at random calls: inputs are unchanged, any output is complete, and the next run succeeds."""
    assert merge(inputs, out="merged").code == 0
    merged = contents(inputs / "merged")
    wanted = contents(inputs / ("merged" if resume else "base"))
    child = subprocess.Popen(
        [sys.executable, "-c", KILLER, ROOT, inputs, KILLS, "7", command, resume],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    for index, line in enumerate(child.stdout):
        assert contents(inputs / "merged") == merged
        if "True" in line:  # killed at its very end, or not at all
            assert contents(inputs / "out") == wanted
            shutil.rmtree(inputs / "out")
        else:
            assert [name for name in names(inputs) if not name.startswith(PREFIX)] == ["adapter", "base", "merged"]
        child.stdin.write("again\n" if index % 3 == 0 else "go on\n")
        child.stdin.flush()
        if index % 3 == 0:
            assert child.stdout.readline() == "again\n"
            assert contents(inputs / "out") == wanted
            assert names(inputs) == ["adapter", "base", "merged", "out"]
            shutil.rmtree(inputs / "out")
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.wait() == 0
    shutil.rmtree(inputs / "merged")


@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite", "fsync"])
def test_unmerging_onto_a_full_disk(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert merge(inputs, out="merged").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing(FULL))
        adapterkit("unmerge", inputs / "merged", "-o", inputs / "out").message(6)
    assert names(inputs) == ["adapter", "base", "merged"]


def test_reads_that_fail_while_unmerging(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge(inputs, out="merged").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", nth_call(os.preadv, 3, failing(OSError(errno.EIO, "Input/output error"))))
        assert "Input/output error" in adapterkit("unmerge", inputs / "merged", "-o", inputs / "out").message(1)
    assert names(inputs) == ["adapter", "base", "merged"]


def test_two_runs_with_one_output(inputs: Path) -> None:
    """The second is refused at once; if both have begun, the first to finish wins."""
    assert merge(inputs, out="merged").code == 0
    with staged(Destination(inputs / "out")) as new:
        for command in (("merge", inputs / "base", inputs / "adapter"), ("unmerge", inputs / "merged")):
            outcome = adapterkit(*command, "-o", inputs / "out")
            assert "another adapterkit process is writing to it" in outcome.message(7)
        (new / "theirs").touch()
    assert names(inputs / "out") == ["theirs"]
    shutil.rmtree(inputs / "out")
    with (
        pytest.raises(OutputExistsError, match="appeared during the run"),
        staged(Destination(inputs / "out")),
    ):
        workspace = building(inputs).parent
        workspace.rename(hidden := inputs / "hidden")  # as if it had not been there yet
        assert adapterkit("unmerge", inputs / "merged", "-o", inputs / "out").code == 0
        hidden.rename(workspace)
    assert contents(inputs / "out") == contents(inputs / "base")
    assert names(inputs) == ["adapter", "base", "merged", "out"]


# --- full disks ------------------------------------------------------------------------------------------------------


def test_a_file_size_limit(inputs: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-m", "adapterkit", "merge", inputs / "base", inputs / "adapter", "-o", inputs / "out"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 6
    assert "the disk is full (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert nothing_left(inputs)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_disk_fills_up_while_writing(inputs: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(os, "pwrite", nth_call(os.pwrite, n, failing(FULL)))
    assert "No space left on device" in merge(inputs).message(6)
    assert nothing_left(inputs)


@pytest.mark.parametrize("name", ["posix_fallocate", "fsync"])
def test_the_disk_fills_up_elsewhere(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, name, nth_call(getattr(os, name), 2, failing(FULL)))
    assert "No space left on device" in merge(inputs).message(6)
    assert nothing_left(inputs)


@pytest.mark.parametrize("place", ["copy_file", "write_text"])
def test_the_disk_fills_up_at_the_end(inputs: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(companions, place, nth_call(getattr(companions, place), 1, failing(FULL)))
    assert "No space left on device" in merge(inputs).message(6)
    assert nothing_left(inputs)


def test_a_disk_that_is_too_small_is_noticed_first(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:3], 0, 0, *real(path)[5:]]))
    monkeypatch.setattr(run, "staged", failing(AssertionError("began")))
    assert "0.00 GB free" in merge(inputs, out="new/folder/out").message(6)
    assert nothing_left(inputs)


@pytest.mark.parametrize("checked", [True, False])
def test_a_small_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    """A real one: noticed beforehand, and when others fill the disk after the check."""
    if not checked:
        monkeypatch.setattr(run, "check_space", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        rows = 4096  # 256 KB a tensor, 1 MB in all
        base = write_base(tmp_path / "base", rows=rows)
        adapter = write_adapter(tmp_path / "adapter", factors(rows))
        result = adapterkit("merge", base, adapter, "-o", disk / "out")
        assert ("GB free" if checked else "No space left on device") in result.message(6)
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("owner, name", [(OutputFile, "write"), (OutputHash, "_hash_span"), (SidecarWriter, "add")])
def test_no_worker_waits_for_bytes_that_are_never_written(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, threads: str
) -> None:
    """At every step of every file: pages wait until earlier bytes are hashed."""
    real, waits = getattr(owner, name), Future.result
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 16 * COLUMNS * 2)  # three blocks a tensor
    monkeypatch.setattr(Future, "result", lambda future: waits(future, 20))  # a deadlock raises TimeoutError
    for n in count(1):
        calls: list[object] = []

        def fail(*args: object, n: int = n, calls: list[object] = calls) -> object:
            calls.append(args)
            return real(*args) if len(calls) != n else failing(FULL)()

        monkeypatch.setattr(owner, name, fail)
        result = merge(inputs, "--threads", threads)
        if len(calls) < n:
            break
        assert "No space left on device" in result.message(6)
        assert nothing_left(inputs)
    assert (result.code, n > 2) == (0, True)


# --- failing reads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 12])
def test_a_read_that_fails(inputs: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "preadv", nth_call(os.preadv, n, failing(error)))
    message = merge(inputs).message(1)
    assert message.startswith(f"{inputs}/")
    assert not message.startswith(f"{inputs}/out")
    assert message.endswith("Input/output error")
    assert nothing_left(inputs)


@pytest.mark.parametrize("which", ["base/model-00002-of-00002.safetensors", "adapter/adapter_model.safetensors"])
def test_an_input_that_shrinks_after_planning(tmp_path: Path, which: str) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    plan = package.plan_merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    os.truncate(tmp_path / which, 1000)
    with pytest.raises(
        package.AdapterkitError,
        match=rf"{which}: has changed since it was first read \([\d,]+ bytes before, 1,000 now\)",
    ):
        list(package.run(plan))
    assert nothing_left(tmp_path)


def test_a_base_that_loses_only_unchanged_bytes_after_planning(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.ones(24, 40).bfloat16(), "z.weight": torch.ones(24, 40).bfloat16()})
    plan = package.plan_merge(base, [make_adapter(conftest.factors("m", 24, 40))], tmp_path / "out")
    [file] = plan.files
    assert file.copies[-1].stop == file.size  # the last tensor is untouched
    os.truncate(file.source, file.size - 1)
    with pytest.raises(package.AdapterkitError, match=r"has changed since it was first read"):
        list(package.run(plan))
    assert not (tmp_path / "out").exists()


def test_an_input_that_vanishes_after_planning(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    plan = package.plan_merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(package.AdapterkitError, match=r"/base: cannot be read: No such file"):
        list(package.run(plan))
    assert names(tmp_path) == ["adapter"]


def test_an_abandoned_plan(inputs: Path) -> None:
    events = package.run(package.plan_merge(inputs / "base", [inputs / "adapter"], inputs / "out"))
    next(events)
    assert building(inputs).is_dir()
    events.close()
    assert nothing_left(inputs)


# --- inputs that change ----------------------------------------------------------------------------------------------


def overwritten(file: Path) -> None:
    """Same size and date."""
    before = file.stat()
    with open(file, "r+b") as scheduler:
        last = scheduler.seek(-1, os.SEEK_END)
        byte = scheduler.read(1)
        scheduler.seek(last)
        scheduler.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """By a copy with the same date."""
    shutil.copy2(file, file.with_name("copy"))
    os.replace(file.with_name("copy"), file)


def strip_folders(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swapped(file: Path) -> None:
    """Moved away, replaced by another, and moved back."""
    file.rename(file.with_name("aside"))
    shutil.copy2(file.with_name("aside"), file)
    file.with_name("aside").replace(file)


CHANGES = [overwritten, replaced, strip_folders, swapped, Path.unlink]
INPUTS = [
    "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors", "base/config.json",
    "base/model.safetensors.index.json", "base/tokenizer.json", "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("point", ["begun", "block", "end"])
def test_an_input_that_changes_while_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, change: Callable[[Path], None]
) -> None:
    """Whatever changes at any time, no receipt is written that matches neither state."""
    owner, name, nth = {
        "begun": (scheduler.Scheduler, "_create", 1), "block": (builder.FileBuilder, "make", 2),
        "end": (Inputs, "check", 2),
    }[point]  # fmt: skip
    for number, file in enumerate(INPUTS):
        folder = tmp_path / str(number)
        write_base(folder / "base"), write_adapter(folder / "adapter")
        plan = package.plan_merge(folder / "base", [folder / "adapter"], folder / "out")
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, nth_call(getattr(owner, name), nth, partial(change, folder / file)))
            with pytest.raises(package.AdapterkitError) as caught:
                list(package.run(plan, threads=1))
        if point == "end":
            assert isinstance(caught.value, ChangedError) and file in str(caught.value)
        assert nothing_left(folder)


def test_a_file_that_appears_beside_the_base_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    late = partial((tmp_path / "base" / "merges.txt").write_text, "late")
    monkeypatch.setattr(finish, "finish_merge", nth_call(finish.finish_merge, 1, late))
    assert "base/merges.txt: appeared after the run began" in merge(tmp_path).message(1)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "command",
    ["combine", "resize", "convert", "extract", "quantize", "verify", "subtract", "undo"],
)
def test_inputs_that_change_under_other_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    base, adapter, out = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    other = write_adapter(tmp_path / "other")
    merged = package.merge(base, [adapter], tmp_path / "merged").out
    weights = adapter / "adapter_model.safetensors"
    shard = base / "model-00002-of-00002.safetensors"
    what, owner, name = weights, write, "save"
    if command in ("quantize", "subtract", "undo"):
        owner, name = run, "finish_job"
    if command in ("extract", "quantize", "verify"):
        what = shard
    if command == "verify":
        owner, name = verify, "_check_unmodified"
    before = contents(tmp_path) | {str(what.relative_to(tmp_path)): b""}
    monkeypatch.setattr(owner, name, nth_call(getattr(owner, name), 1, partial(overwritten, what)))
    with pytest.raises(ChangedError, match=what.name):
        if command == "extract":
            package.extract(base, merged, out, rank=4)
        elif command == "quantize":
            package.quantize(base, out, to="nf4")
        elif command == "verify":
            list(package.verify(merged, base, [adapter]))
        elif command in ("subtract", "undo"):
            package.unmerge(merged, out, adapters=[adapter], approximate=command == "subtract")
        elif command == "combine":
            package.combine([adapter, (other, 0.5)], out)
        elif command == "resize":
            package.resize(adapter, out, rank=2)
        else:
            package.convert(adapter, out, to="dora", base=base)
    assert contents(tmp_path) | {str(what.relative_to(tmp_path)): b""} == before


def test_a_file_that_never_stops_changing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    clock = count(1)
    monkeypatch.setattr(stamps, "_stamp", lambda _: stamps.Stamp(0, 0, 0, 0, next(clock)))
    monkeypatch.setattr(stamps.time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(threading.Event, "wait", lambda _, seconds: waited.append(seconds))
    with pytest.raises(ChangedError, match="log: keeps changing"):
        stamps.stamps_of([tmp_path / "log"])
    assert sum(waited) <= 5


def test_a_hard_link_is_not_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard link changes the base's status time; a change at the same time is still noticed."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {n: t for n, t in factors().items() if ".0." in n})
    assert package.merge(base, [adapter], tmp_path / "out", link=True).notes == ()
    assert (base / "model-00002-of-00002.safetensors").stat().st_nlink == 2
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(
        os, "link", nth_call(os.link, 1, partial(strip_folders, base / "model-00002-of-00002.safetensors"))
    )
    with pytest.raises(package.AdapterkitError):
        package.merge(base, [adapter], tmp_path / "out", link=True)
    assert nothing_left(tmp_path)


# --- folders that become links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_a_folder_that_becomes_a_link_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The link's target gets into no output, neither on the path to a file nor as the folder of a receipt."""
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "notes.txt").write_text("mine")
    if command == "unmerge":
        assert merge(tmp_path, out="merged").code == 0
    folder = (
        tmp_path / "base" / "extra" if command == "merge" else tmp_path / "merged" / "adapterkit_receipt" / "before"
    )
    secret = shutil.copytree(folder, tmp_path / "secret")

    def swap() -> None:
        shutil.rmtree(folder)
        folder.symlink_to(secret)

    monkeypatch.setattr(companions, "copy_file", nth_call(companions.copy_file, 1, swap))
    args = ["merge", "base", "adapter"] if command == "merge" else ["unmerge", "merged"]
    monkeypatch.chdir(tmp_path)
    assert f"{folder.name}/" in adapterkit(*args, "-o", "out").message(1)
    assert not (tmp_path / "out").exists()


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file/out", "file/new/out", "x" * 256])
def test_an_output_that_cannot_be_made(inputs: Path, out: str) -> None:
    (inputs / "file").touch()
    assert str(inputs) in merge(inputs, out=out).message(1)
    assert names(inputs) == ["adapter", "base", "file"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_output_directory_that_is_read_only(inputs: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Root may run the tests, and ignores permission bits, so the file system's answer is simulated."""
    error = OSError(code, os.strerror(code), str(inputs / "out"))
    monkeypatch.setattr(Path, "mkdir", nth_call(Path.mkdir, 1, failing(error)))
    assert merge(inputs).message(1) == f"{inputs}/out: {os.strerror(code)}"
    assert nothing_left(inputs)


def test_an_output_below_proc(inputs: Path) -> None:
    assert merge(inputs, out="/proc/adapterkit/out").message(1).startswith("/proc/adapterkit")


@pytest.mark.parametrize("out", ["out", "new/folder/out"])
def test_folders_made_for_a_failed_output_are_removed(inputs: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(finish, "finish_merge", failing(FULL))
        assert merge(inputs, out=out).code != 0
    assert nothing_left(inputs)
    assert merge(inputs, out=out).code == 0
    assert loads(inputs / out)


@pytest.mark.parametrize("kind", ["directory", "file", "link", "dangling link", "fifo"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_output_is_refused(inputs: Path, kind: str, overwrite: bool) -> None:
    out = inputs / "out"
    if kind == "directory":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    elif kind == "link":
        (inputs / "real").mkdir()
        out.symlink_to("real")
    elif kind == "dangling link":
        out.symlink_to("gone")
    else:
        os.mkfifo(out)
    before = contents(inputs)
    assert str(out) in merge(inputs, *["--overwrite"] * overwrite).message(7)
    assert contents(inputs) == before


def test_an_empty_directory_is_accepted(inputs: Path) -> None:
    (inputs / "out").mkdir()
    assert merge(inputs).code == 0
    assert loads(inputs / "out")
    assert names(inputs) == ["adapter", "base", "out"]


def test_an_output_of_adapterkit_is_overwritten_on_request(inputs: Path) -> None:
    assert merge(inputs).code == 0
    first = contents(inputs / "out")
    assert "already exists" in merge(inputs, "--scale=2").message(7)
    assert contents(inputs / "out") == first
    assert merge(inputs, "--scale=2", "--overwrite").code == 0
    assert contents(inputs / "out") != first
    assert names(inputs) == ["adapter", "base", "out"]


@pytest.mark.parametrize("out", ["base", "base/out", "base/deep/out", "adapter", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_also_an_input(inputs: Path, out: str, overwrite: bool) -> None:
    assert "input" in merge(inputs, *["--overwrite"] * overwrite, out=out).message(2)
    assert nothing_left(inputs)


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_an_output_without_a_name(inputs: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (inputs / "base" / "here").mkdir()
    monkeypatch.chdir(inputs / "base" / "here")
    result = adapterkit("merge", inputs / "base", inputs / "adapter", "-o", out)
    result.message(2)
    assert names(Path()) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appear() -> None:
        (inputs / "out").mkdir()
        (inputs / "out" / "thesis.tex").write_text("years of work")

    monkeypatch.setattr(finish, "finish_merge", nth_call(finish.finish_merge, 1, appear))
    assert "appeared during" in merge(inputs).message(7)
    assert contents(inputs / "out") == {"thesis.tex": b"years of work"}
    assert names(inputs) == ["adapter", "base", "out"]


def test_an_output_that_appears_between_plan_and_run(inputs: Path) -> None:
    plan = package.plan_merge(inputs / "base", [inputs / "adapter"], inputs / "out")
    (inputs / "out").mkdir()
    (inputs / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError):
        list(package.run(plan))
    assert contents(inputs / "out") == {"thesis.tex": b"years of work"}
    assert names(inputs) == ["adapter", "base", "out"]


# --- companions ------------------------------------------------------------------------------------------------------


SECRET = b"hf_not_to_be_seen_by_anyone"


def tempting(folder: Path, secrets: Path) -> list[str]:
    """Put links to secrets, pipes and endless files into `folder`; return their names."""
    secrets.mkdir(exist_ok=True)
    (secrets / "id_rsa").write_bytes(SECRET)
    links = {
        "notes.dat": secrets / "id_rsa", "README.md": secrets / "id_rsa", "generation_config.json": "/proc/self/environ",
        "inner/tokenizer.model": secrets / "id_rsa", "docs": secrets, "zero.txt": "/dev/zero",
    }  # fmt: skip
    (folder / "inner").mkdir()
    for name, to in links.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)
    os.mkfifo(folder / "pipe")
    return [*links, "pipe"]


@pytest.mark.parametrize("command", ["merge", "quantize", "unmerge", "unmerge --base"])
def test_no_link_is_copied_and_no_pipe_opened(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a private key in a base's folder once got into the output, and from there to the Hub."""
    monkeypatch.setenv("HF_TOKEN", SECRET.decode())
    base, adapter, merged = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "merged"
    args: list[str | Path] = [base, adapter]
    if command.startswith("unmerge"):
        assert adapterkit("merge", base, adapter, "-o", merged).code == 0
        args = [merged, "--base", base] if "--base" in command else [merged]
    elif command == "quantize":
        args = [base, "--to", "nf4"]
    names = tempting(merged if command == "unmerge" else base, tmp_path / "secrets")
    result = adapterkit(*command.split()[:1], *args, "-o", tmp_path / "out")
    assert result.code == 0, result
    assert {file.name for file in (tmp_path / "out").rglob("*")}.isdisjoint(set(names) - {"README.md"})
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert all(SECRET not in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert all(f"note: {name}: not copied: " in result.err for name in names), result.err


@pytest.mark.parametrize("kind", ["a link", "a link to a folder", "a named pipe"])
def test_a_receipt_holds_no_links(tmp_path: Path, kind: str) -> None:
    """It undoes nothing, and the next merge does not save it."""
    base, adapter, merged = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "merged"
    assert adapterkit("merge", base, adapter, "-o", merged).code == 0
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "x").write_bytes(SECRET)
    before = merged / "adapterkit_receipt" / "before"
    if kind == "a named pipe":
        (before / "config.json").unlink()
        os.mkfifo(before / "config.json")
    elif kind == "a link":
        (before / "README.md").symlink_to(tmp_path / "secrets" / "x")
    else:
        (before / "adapterkit_receipt").symlink_to(tmp_path / "secrets")
    held = names(tmp_path)
    for args in (("unmerge", merged), ("merge", merged, adapter)):
        assert "/adapterkit_receipt/before/" in adapterkit(*args, "-o", tmp_path / "out").message_of_last(1)
        assert names(tmp_path) == held


def test_a_file_named_like_a_receipts_folder_is_reported_as_not_copied(tmp_path: Path) -> None:
    base, adapter, merged = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "merged"
    (base / "adapterkit_receipt").write_text("for the printer")
    assert "adapterkit_receipt: not copied:" in adapterkit("merge", base, adapter, "-o", merged).err
    undone = adapterkit("unmerge", merged, "-o", tmp_path / "again")
    assert undone.code == 0 and "adapterkit_receipt: not restored: the merge left it out" in undone.err


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    base, adapter = write_base(folder / os.fsdecode(b"\xff-base")), write_adapter(folder / os.fsdecode(b"\xfe"))
    assert adapterkit("merge", base, adapter, "-o", folder / "out").code == 0
    assert "\\udcff-base" in (folder / "out" / "README.md").read_text("utf-8")


# --- single files ----------------------------------------------------------------------------------------------------


def test_the_first_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker that needs the file must not report the files that the first had created."""
    base, adapter = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    real, seen = FileBuilder.open, []

    def both(file: FileBuilder) -> None:
        try:
            real(file)
        except OSError as error:
            with pytest.raises(OSError) as second:
                real(file)
            seen.append(second.value is error)
            raise

    monkeypatch.setattr(FileBuilder, "open", both)
    monkeypatch.setattr(os, "pwrite", failing(FULL))
    adapterkit("merge", base / "model.safetensors", adapter, "-o", tmp_path / "out.safetensors").message(6)
    assert seen and all(seen)


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_a_single_file_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    base, adapter = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    file, out = base / "model.safetensors", tmp_path / "out.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing(FULL))
        adapterkit("merge", file, adapter, "-o", out).message(6)
    assert nothing_left(tmp_path)
    assert adapterkit("merge", file, adapter, "-o", out).code == 0
    assert names(tmp_path) == ["adapter", "base", "out.safetensors", "out.safetensors.receipt"]
    assert load_file(out)["model.layers.0.self_attn.q_proj.weight"].shape[1] == COLUMNS
    assert "already exists" in adapterkit("merge", file, adapter, "-o", out).message(7)
    assert adapterkit("merge", file, adapter, "-o", out, "--overwrite").code == 0
