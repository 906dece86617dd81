"""Time the terminal app in a pseudoterminal: the first paint, a folder of 1 000 adapters, a 7B adapter's layers.

Each figure is measured in a new process, with an empty cache of the app, by watching its output.

"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from statistics import median

from benchmarks.common.measure import child_environment, python
from benchmarks.common.models import LLAMA2_7B, cached_adapter
from benchmarks.common.paths import CACHE, ROOT
from benchmarks.common.report import Target, report, targets_table

COUNT = 1000
SIZE = (40, 130)  # lines, columns
ESCAPES = re.compile(rb"\x1b\[[0-9;?<=>]*[a-zA-Z]|\x1b[()][A-Z0-9]|\x1b[=>78]")
PATIENCE = 60.0


class Screen:
    """A command in a pseudoterminal, timed by its output."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.began = time.perf_counter()
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.execve(command[0], command, env)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self._text = b""

    def until(self, pattern: str) -> float:
        """Return the seconds from the start, or from the last key, until `pattern` was written."""
        wanted = re.compile(pattern.encode())
        while not wanted.search(ESCAPES.sub(b"", self._text)):
            left = PATIENCE - (time.perf_counter() - self.began)
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise SystemExit(f"{pattern!r} was not seen within {PATIENCE:.0f} s")
            self._text += os.read(self._fd, 1 << 16)
        return time.perf_counter() - self.began

    def press(self, key: str) -> None:
        """Type a key and restart the clock."""
        self._text, self.began = b"", time.perf_counter()
        os.write(self._fd, key.encode())

    def close(self) -> None:
        """Terminate the command."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)


def main() -> None:
    """Run the benchmark, print the table and the targets, and record them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each figure (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the outcome to benchmarks/RESULTS.md")
    args = parser.parse_args()
    many, large = thousand(), cached_adapter(32, 64, LLAMA2_7B, "BF16").resolve()
    figures: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, seconds in one_round(many, large).items():
            figures.setdefault(name, []).append(seconds)
    middle = {name: median(values) for name, values in figures.items()}
    paint = middle["first paint"] - middle["import textual"]
    targets = [
        Target("first paint under 1 s after `import textual`", f"{paint:.2f} s", paint < 1),
        Target(f"{COUNT} adapters listed under 3 s", f"{middle['all listed']:.2f} s", middle["all listed"] < 3),
        Target("layers of a 7B rank-64 adapter within 3 s", f"{middle['layers']:.2f} s", middle["layers"] < 3),
    ]
    lines = ["| figure | seconds, median [min-max] |", "|---|--:|"]
    lines += [f"| {name} | {median(v):.2f} [{min(v):.2f}-{max(v):.2f}] |" for name, v in figures.items()]
    note = (
        f"All listed: {COUNT} adapters of 448 tensors each, from the first paint. Layers: from the key to the picture, "
        "`import torch` included; cached: the same again in another process."
    )
    title = f"the app, {COUNT} adapters, and one of 7B and rank 64"
    report(title, ["\n".join(lines), note, targets_table(targets)], output=CACHE, record=args.record)


def one_round(many: Path, large: Path) -> dict[str, float]:
    """Measure each figure once."""
    figures = {}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import textual.app"], check=True, env=child_environment())
    figures["import textual"] = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as cache:
        env = child_environment() | {"XDG_CACHE_HOME": cache, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        command = python("adapterkit", "tui")
        app = Screen([*command, str(many)], env)
        figures["first paint"] = app.until("sources")
        figures["all listed"] = app.until(f" {COUNT} ") - figures["first paint"]
        app.close()
        for name in ("layers", "layers, cached"):
            app = Screen([*command, str(large)], env)
            app.until("parameters")
            app.press("2")
            figures[name] = app.until("99% rank")
            app.close()
    return figures


def thousand() -> Path:
    """Write a folder of many small adapters with as many tensors as those of a 7B model."""
    folder = CACHE / f"adapters-{COUNT}"
    if not (folder / "done").exists():
        one = cached_adapter(32, 2, LLAMA2_7B, "BF16")
        weights = _narrow(one / "adapter_model.safetensors")
        for number in range(COUNT):
            inner = folder / f"group-{number % 10}" / f"adapter-{number:04}"
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "adapter_model.safetensors").write_bytes(weights)
            shutil.copy(one / "adapter_config.json", inner)
        (folder / "done").touch()
    return folder


def _narrow(file: Path) -> bytes:
    """Return the same tensor names with matrices of 2 × 8 and 8 × 2, so that a thousand adapters fit on the disk."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, at = json.loads(raw[8 : 8 + length]), 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry |= {"shape": [2, 8] if "lora_A" in name else [8, 2], "data_offsets": [at, at + 32]}
            at += 32
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


if __name__ == "__main__":
    main()
