"""A merge killed at every step that changes a name, by a process that has imported torch once and forks.

`killed.py FOLDER SCENARIO…`: in FOLDER are `base` and `adapter`. Asserts after each step: the inputs are what they were,
the old output or the new one is whole and can be unmerged, the next run succeeds, and nothing else is left. Prints how
many steps there were.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handmade import adapterkit, contents

from adapterkit.__main__ import main
from adapterkit.files import os_calls
from adapterkit.files.workspace import PREFIX

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")
State = tuple[Any, Any]


def run(*args: str, nth: int | None = None, which: int = signal.SIGKILL, swaps: bool = True) -> int:
    """Return the exit code of the command line in a fork that gets a signal at its `nth` step."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, count = 201, 0
    try:

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **how: Any) -> Any:
                nonlocal count
                count += threading.current_thread() is threading.main_thread()
                if count == nth:
                    count += 1
                    os.kill(os.getpid(), which)
                return call(*args, **how)

            return counted

        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        os_calls._rename = counting(os_calls._rename) if swaps else lambda *_: False
        err = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 1), os.dup2(err, 2)
        sys.argv = ["adapterkit", *args]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 202
    finally:
        os._exit(200 if nth is not None and count < nth else code)  # 200: it has fewer steps


def succeeds(*args: str) -> None:
    """Run the command line here, which takes half as long as in a fork."""
    ended = adapterkit(*args)
    assert ended.code == 0, (args, ended)


def whole(out: Path) -> Any:
    """The bytes of the file or folder `out`, or None."""
    if not out.is_dir():
        return out.read_bytes() if out.exists() else None
    return contents(out)


def state(out: Path) -> State:
    """Return an output and its receipt."""
    return whole(out), None if out.is_dir() else whole(out.with_name(f"{out.name}.receipt"))


def left() -> list[str]:
    return sorted(name for name in os.listdir() if name not in ("said", "saved", "base", "adapter"))


def remove(*names: str) -> None:
    for name in names:
        shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)


def check(
    *, file: bool, overwrite: bool = False, resume: bool = False, swaps: bool = True, options: tuple[str, ...] = ()
) -> int:
    """Go through all steps of one scenario, and return how many there are; without `swaps` as on an old kernel."""
    signals = (signal.SIGKILL, signal.SIGINT) if swaps and not options else (signal.SIGKILL,)
    inputs = [contents(Path(name)) for name in ("base", "adapter")]
    out, base = (Path("out.safetensors"), "base/model.safetensors") if file else (Path("out"), "base")
    command = ["merge", base, "adapter", "-o", str(out), "--threads", "1", "--scale", "2", *options]
    succeeds(*command)  # here, so that all is imported before anything is forked
    gc.freeze()  # or each fork would copy what it only counts
    new, finished = state(out), left()
    remove(*finished)
    old: State = (None, None)
    if overwrite:
        succeeds("merge", base, "adapter", "-o", str(out), "--threads", "1")
        old, command = state(out), [*command, "--overwrite"]
    if resume:
        assert run(*command, nth=5) == -signal.SIGKILL
        command.append("--resume")
    before = left()
    os.mkdir("saved")
    for name in before:
        os.rename(name, f"saved/{name}")

    for nth in range(1, 200):
        for which in signals:
            for name in before:
                shutil.copytree(f"saved/{name}", name) if os.path.isdir(f"saved/{name}") else shutil.copy2(
                    f"saved/{name}", name
                )
            code = run(*command, nth=nth, which=which, swaps=swaps)
            if code == 200:
                remove("saved", *left())
                return nth - 1
            assert code == (-signal.SIGKILL if which == signal.SIGKILL else 130), (nth, code, Path("said").read_text())
            assert [contents(Path(name)) for name in ("base", "adapter")] == inputs
            after_kill(out, old, new, swaps) if which == signal.SIGKILL else after_ctrl_c(out, old, new)
            assert which == signal.SIGKILL or set(left()) <= {*before, *finished}, left()
            again = [*command, "--overwrite"] if os.path.lexists(out) and "--overwrite" not in command else command
            succeeds(*again)
            assert state(out) == new and left() == finished, (nth, left())
            assert [contents(Path(name)) for name in ("base", "adapter")] == inputs
            remove(*finished)
    raise AssertionError("there is no end to it")


def after_kill(out: Path, old: State, new: State, swaps: bool) -> None:
    found, [*workspaces] = state(out), Path().glob(f"{PREFIX}*")
    if found[0] is None:  # there was none, or it is in the workspace where directories cannot be swapped
        assert old[0] is None or (not swaps and [whole(one / "old") for one in workspaces] == [old[0]])
    elif found not in (old, new):
        assert found[0] in (old[0], new[0])
        merge = ["merge", str(out), "adapter", "-o", "on-top", "--threads", "1"]  # which keeps the receipt that fits
        for command in (["unmerge", str(out), "-o", "again"], merge, ["unmerge", "on-top", "--all", "-o", "all-off"]):
            succeeds(*command)
        assert whole(Path("again")) == whole(Path("all-off")) == whole(Path("base/model.safetensors"))
        remove("again", "on-top", "on-top.receipt", "all-off")


def after_ctrl_c(out: Path, old: State, new: State) -> None:
    said, found = Path("said").read_text().strip(), state(out)
    resumed = "; finished shards are saved: continue with --resume"
    endings = [f"; {out} is complete"] if found == new else ["", "; nothing was written", resumed]
    assert said in [f"error: interrupted{ending}" for ending in endings], said
    assert found in (old, new), said


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    os.fsync = lambda _: None  # what a killed process wrote stays with the kernel, on the disk or not
    for scenario in sys.argv[2:]:
        print(scenario, check(**json.loads(scenario)), flush=True)
