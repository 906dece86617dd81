"""Measure whole processes: wall time, CPU time and peak memory, in alternating rounds."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.common.paths import ROOT

# Variables that would make the BLAS behave unlike on users' machines, or have every run compile the package.
KEPT_OUT = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Run:
    """The resources used by one process and the children it waited for."""

    wall: float
    cpu: float
    peak_mb: float


@dataclass(frozen=True)
class Command:
    """A named command, its preparation before each run, and the number of rounds it takes part in."""

    name: str
    argv: Sequence[str]
    before: Callable[[], None] = lambda: None
    rounds: int | None = None

    def takes_part(self, number: int, rounds: int) -> bool:
        """Return whether this command runs in a round; its rounds are spread evenly."""
        own = rounds if self.rounds is None else min(self.rounds, rounds)
        return number in {turn * rounds // own for turn in range(own)}


@dataclass
class Result:
    """The counted runs of one command."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def walls(self) -> list[float]:
        """The wall times, in seconds, in the order of the runs."""
        return [run.wall for run in self.runs]

    @property
    def wall(self) -> float:
        """The median wall time in seconds."""
        return median(self.walls)

    @property
    def cpu(self) -> float:
        """The median CPU time, user and system, in seconds."""
        return median(run.cpu for run in self.runs)

    @property
    def peak_mb(self) -> float:
        """The highest peak of all runs, in MB of 10^6 bytes."""
        return max(run.peak_mb for run in self.runs)


def child_environment() -> dict[str, str]:
    """Return the environment that every measured command gets."""
    return {key: value for key, value in os.environ.items() if key not in KEPT_OUT} | {"HF_HUB_OFFLINE": "1"}


def python(module: str, *words: object) -> list[str]:
    """Return the command that runs a module from the repository root."""
    return [sys.executable, "-m", module, *map(str, words)]


def and_sync(argv: Sequence[str], output: Path) -> list[str]:
    """Return a command that runs another and then flushes its output to the disk."""
    return ["sh", "-c", 'output=$1; shift; "$@" && sync -f "$output"', "sh", str(output), *argv]


def clean(work: Path) -> None:
    """Delete every directory that a command made in the work directory."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def measure(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command from the repository root and measure it; if it fails, so does the benchmark.

    The peak is that of the largest single process, not a sum. On Linux a process inherits the RSS of the process that
    starts it, so that no peak is below this one's 30 MB or so: keep big imports and buffers out of this module.

    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped above: Popen must not wait again
        if process.returncode != 0:
            log.seek(0)
            output = log.read().decode(errors="replace")
            raise SystemExit(f"{output}\nexit status {process.returncode}: {shlex.join(command)}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def alternate(commands: Sequence[Command], rounds: int, env: Mapping[str, str] | None = None) -> list[Result]:
    """Run the commands in turn, round after round, so that drift of the machine affects all of them."""
    results = [Result(command.name) for command in commands]
    for number in range(-1, rounds):  # round -1 warms the page cache and is not counted
        for command, result in zip(commands, results, strict=True):
            if number >= 0 and not command.takes_part(number, rounds):
                continue
            command.before()
            os.sync()  # so that unwritten data of earlier commands does not slow this one down
            run = measure(command.argv, env)
            label = "warm-up" if number < 0 else f"round {number + 1}/{rounds}"
            print(f"{label:10} {command.name:36} {run.wall:8.2f} s {run.peak_mb:8.0f} MB", file=sys.stderr)
            if number >= 0:
                result.runs.append(run)
    return results


def table(results: Iterable[Result], reference: Result) -> str:
    """Return the results as a Markdown table, with wall times relative to the reference's."""
    lines = [
        f"| command | runs | wall s, median [min-max] | CPU s | peak MB | wall / {reference.name} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        wall = f"{result.wall:.2f} [{min(result.walls):.2f}-{max(result.walls):.2f}]"
        rest = f"{result.cpu:.2f} | {result.peak_mb:.0f} | {result.wall / reference.wall:.2f}"
        lines.append(f"| {result.name} | {len(result.runs)} | {wall} | {rest} |")
    return "\n".join(lines)
