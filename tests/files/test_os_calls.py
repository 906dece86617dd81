"""Platform differences: the same bytes without the missing calls, and no use of them in other modules."""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from handmade import adapterkit, contents, factors, write_adapter, write_base
from standins import failing, nth_call

from adapterkit.cli.main import COMMANDS
from adapterkit.errors import AdapterkitError, FormatError
from adapterkit.files import os_calls, sandbox
from adapterkit.files.opening import open_inside
from adapterkit.files.outfile import OutputFile
from adapterkit.files.sandbox import Sandbox
from adapterkit.files.staging import Destination, staged
from adapterkit.files.workspace import Mark, Workspace

ROOT = Path(__file__).parents[2]
PACKAGE = Path(os_calls.__file__).parents[1]
# Names that macOS lacks or may lack, and those that Windows lacks too.
MACOS = """posix_fallocate posix_fadvise POSIX_FADV_DONTNEED sched_getaffinity O_DIRECT O_PATH preadv pwritev"""
WINDOWS = f"""{MACOS} pread pwrite geteuid getuid killpg fork O_NOFOLLOW O_NONBLOCK O_NOCTTY O_DIRECTORY
O_CLOEXEC getpgid setsid sysconf fchmod"""
SIGNALS = "SIGHUP SIGKILL SIGALRM SIGXCPU setitimer siginterrupt ITIMER_REAL"
MODULES = ("fcntl", "resource", "termios", "tty", "pty", "grp", "pwd")


class MacLibrary:
    """macOS's calls implemented with Linux's; the constants are from Apple's headers."""

    def __init__(self) -> None:
        self.real: Any = ctypes.CDLL(None, use_errno=True)

    def renamex_np(self, old: bytes, new: bytes, flags: Any) -> int:
        return int(self.real.renameat2(-100, old, -100, new, ctypes.c_uint({2: 2, 4: 1}[flags.value])))

    def fclonefileat(self, source: int, at: int, target: bytes, flags: int) -> int:
        assert (at, flags) == (-2, 0)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, os.fstat(source).st_mode & 0o777)
        os.write(fd, os.pread(source, os.fstat(source).st_size, 0)) if hasattr(os, "pread") else os.sendfile(
            fd, source, 0, os.fstat(source).st_size
        )
        os.close(fd)
        return 0


@pytest.fixture(params=["macos", "macos without", "windows"])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This machine as another platform: names removed, calls replaced, or unsupported by the file system."""
    mkdir = os.mkdir

    def controlled(fd: int, number: int, *_: Any) -> int:
        if request.param == "macos without":
            raise OSError(errno.ENOTTY if number == 51 else errno.ENOTSUP, "no")
        assert number in (os_calls.F_PREALLOCATE, os_calls.F_NOCACHE, os_calls.F_FULLFSYNC)
        return 0

    for name in (WINDOWS if request.param == "windows" else MACOS).split():
        monkeypatch.delattr(os, name, raising=False)
    if request.param == "windows":
        for name in SIGNALS.split():
            monkeypatch.delattr(signal, name)
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(os, "supports_dir_fd", set())
        monkeypatch.setattr(sys, "platform", "win32")
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777, **how: mkdir(path, mode & 0o777, **how))
        monkeypatch.setattr(fcntl, "fcntl", controlled)
    importlib.reload(os_calls)
    library = MacLibrary() if request.param == "macos" else None
    monkeypatch.setattr(os_calls, "_libc", lambda: library)
    yield request.param
    monkeypatch.undo()
    importlib.reload(os_calls)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a full and a partial adapter, and the outputs of each command on this platform."""
    tmp_path = tmp_path_factory.mktemp("made")
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    half = {"r": 4, "lora_alpha": 6, "target_modules": r".*layers\.0\..*q_proj"}
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
    write_adapter(tmp_path / "half", {name: factors()[name] for name in names}, half)
    assert run_all(tmp_path, tmp_path / "here") == [0] * 5
    return tmp_path


def run_all(inputs: Path, out: Path) -> list[int]:
    """Return the exit codes of a merge, one that overwrites it, one with links, an unmerge, and an inspect."""
    base, common = inputs / "base", ("-o", out / "merged", "--threads", "2")
    commands: list[tuple[str | Path, ...]] = [
        ("merge", base, inputs / "half", *common),
        ("merge", base, inputs / "adapter", *common, "--overwrite"),
        ("merge", base, inputs / "half", "-o", out / "linked", "--link"),
        ("unmerge", out / "merged", "-o", out / "base", "--adapter", inputs / "adapter"),
        ("inspect", inputs / "adapter", "--against", base),
    ]
    return [adapterkit(*command).code for command in commands]


def test_every_platform_writes_the_same_bytes(made: Path, elsewhere: str) -> None:
    """Except sidecars and receipts, whose entries are in the order of the threads."""
    inputs = contents(made / "base")
    out = made / elsewhere
    assert run_all(made, out) == [0] * 5
    assert contents(out / "base") == inputs == contents(made / "base")
    here, there = contents(made / "here"), contents(out)
    skip = re.compile(r"residuals$|receipt\.json$")
    assert {name: data for name, data in there.items() if not skip.search(name)} == {
        name: data for name, data in here.items() if not skip.search(name)
    }
    assert not list(out.rglob(".adapterkit-*"))


def test_the_workspace_of_a_killed_run_is_found(made: Path, tmp_path: Path, elsewhere: str) -> None:
    """By its mode, set in a second step on macOS; without locks it stays, since its run may be alive."""
    work = Workspace.create(tmp_path, Mark("out"))
    work.new.mkdir()
    work.close()
    assert adapterkit("merge", made / "base", made / "adapter", "-o", tmp_path / "out").code == 0
    assert work.path.exists() is (elsewhere == "windows")


@pytest.mark.parametrize("call", ["rename", "replace", "unlink", "rmdir", "mkdir"])
@pytest.mark.parametrize("nth", [1, 2])
def test_ctrl_c_at_any_step_leaves_the_old_output_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str, call: str, nth: int
) -> None:
    out = tmp_path / "out"

    def make(text: str) -> None:
        with staged(Destination(out, overwrite=True, is_ours=lambda _: True)) as new:
            (new / "file").write_text(text)

    make("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, nth_call(getattr(os, call), nth, failing(KeyboardInterrupt())))
        try:
            make("new")
        except KeyboardInterrupt:
            assert (out / "file").read_text() in ("old", "new")
    make("newer")
    assert (out / "file").read_text() == "newer"
    assert elsewhere == "windows" or os.listdir(tmp_path) == ["out"]


def test_a_full_disk_fails_before_writing(tmp_path: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By F_PREALLOCATE, which reserves the bytes before truncate; without it the file is sparse."""
    asked: list[Any] = []
    if elsewhere == "macos":
        monkeypatch.setattr(fcntl, "fcntl", lambda fd, number, how: asked.append((number, how)))
    OutputFile(tmp_path / "file", 12345)
    assert (tmp_path / "file").stat().st_size == 12345
    assert asked == [(42, b"\4\0\0\0\3\0\0\0" + bytes(8) + (12345).to_bytes(16, "little") )] * (elsewhere == "macos")  # fmt: skip
    if elsewhere == "macos":
        monkeypatch.setattr(fcntl, "fcntl", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            OutputFile(tmp_path / "full", 12345)
        monkeypatch.undo()


def test_a_link_in_a_folder_is_refused(tmp_path: Path, elsewhere: str) -> None:
    (tmp_path / "secret").mkdir(), (tmp_path / "secret" / "file").write_text("secret"), (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "secret"), (tmp_path / "in" / "link").symlink_to("../secret/file")  # fmt: skip
    for name in ("folder/file", "link"):
        with pytest.raises(FormatError):
            open_inside(tmp_path / "in", name)
    with open_inside(tmp_path, "secret/file") as stream:
        assert stream.read() == b"secret"


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    monkeypatch.setattr(os_calls, "MACOS", platform == "darwin")
    usage = SimpleNamespace(ru_maxrss=1000)
    monkeypatch.setattr("resource.getrusage", lambda _: usage)
    assert os_calls.peak_memory() == 1000 * unit


def test_usable_cpus_without_an_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert os_calls.usable_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert os_calls.usable_cpus() == 6


# --- programs on untrusted data --------------------------------------------------------------------------------------

GREEDY = """
def main(limits, seconds):
    held = []
    def answer(request):
        while True:
            held.append(bytearray(1 << 20))
    limits.serve(answer, int(seconds))
"""


def test_memory_without_a_system_limit_is_monitored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: the parent monitors it."""
    monkeypatch.setattr(os_calls, "LIMITS_MEMORY", False)
    monkeypatch.setattr(sandbox, "BASELINE_BYTES", 1 << 26)
    (tmp_path / "greedy.py").write_text(GREEDY)
    with (
        Sandbox(tmp_path / "greedy.py", 60, 1 << 20, "the program") as process,
        pytest.raises(FormatError, match="the program crashed its sandbox process, possibly out of memory"),
    ):
        process.ask("{}", 100)


def test_a_sandbox_without_limits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(
        AdapterkitError, match="the program needs limits on time and memory, which Python supports on Linux"
    ):
        Sandbox(tmp_path / "greedy.py", 60, 1 << 20, "the program").ask("{}", 100)


# --- names that platforms may lack -----------------------------------------------------------------------------------


def platform_names(file: Path) -> list[str]:
    """Return the uses in a module of names that a platform may lack."""
    lacking = {*WINDOWS.split(), *SIGNALS.split(), "ru_maxrss", "MAP_PRIVATE", "PAGESIZE"}
    modules = {*MODULES, "ctypes", "msvcrt"}
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and node.attr in lacking:
            names = [node.attr] if ast.unparse(node.value) != "system" else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in modules]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "/proc/" in node.value:
            names = ["/proc"]
        found += [f"{file.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in names]  # type: ignore[attr-defined]
    return found


def test_platform_specific_names_are_used_in_one_module() -> None:
    """Except in a standalone program, and where a check precedes the use."""
    timer = ("SIGALRM", "setitimer", "siginterrupt", "ITIMER_REAL")
    known = {
        "files/os_calls.py": "",
        "files/sandbox_subprocess.py": "",
        "files/outfile.py": "pwrite",
        "cli/signals.py": timer,
    }
    found = [line for file in sorted(PACKAGE.rglob("*.py")) for line in platform_names(file)]
    assert [line for line in found if not line.endswith(known.get(line.partition(":")[0], "nothing"))] == []
    assert len(platform_names(Path(os_calls.__file__))) > 10


HELP = f"""
import os, signal, sys
for name in {WINDOWS.split()!r}:
    vars(os).pop(name, None)
for name in {SIGNALS.split()!r}:
    vars(signal).pop(name, None)
for name in {MODULES!r}:
    sys.modules[name] = None
os.supports_dir_fd = set()
import adapterkit
from adapterkit.cli.main import COMMANDS, group
from adapterkit.cli import signals
signals.end_at_once(), signals.end_cleanly(), signals.ignore()
for command in ("", *COMMANDS):
    try:
        group.main([command, "--help"][not command:], prog_name="adapterkit")
    except SystemExit as end:
        assert not end.code, command
"""


def test_every_command_shows_its_help_on_windows() -> None:
    ended = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Usage: adapterkit") == 1 + len(COMMANDS)
