"""Compare results with targets, and report them with the machine's description."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.common.paths import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PACKAGES = ("torch", "safetensors", "transformers", "peft", "mergekit")


@dataclass(frozen=True)
class Target:
    """A target for speed or memory, the measured value, and whether it is met."""

    promise: str
    measured: str
    met: bool


def targets_table(targets: Iterable[Target]) -> str:
    """Return the targets as a Markdown table."""
    rows = [f"| {t.promise} | {t.measured} | {'met' if t.met else '**missed**'} |" for t in targets]
    return "\n".join(["| target | measured | |", "|---|---|---|", *rows])


def report(title: str, tables: Iterable[str], output: Path, record: bool) -> None:
    """Print a dated section: command, machine, tables; append it to RESULTS.md if asked."""
    command = shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    section = "\n\n".join(
        [f"## {datetime.date.today()}: {title}", f"`{command}` at {_revision()}", machine(output), *tables]
    )
    print(f"\n{section}")
    if record:
        with RESULTS.open("a") as file:
            file.write(f"\n{section}\n")


def machine(output: Path) -> str:
    """Describe this machine, the file system that holds the output and the versions in use."""
    cpu = _field("/proc/cpuinfo", "model name", default=platform.machine())
    ram = int(_field("/proc/meminfo", "MemTotal", default="0 kB").split()[0]) / 2**20
    linux = platform.release().partition("-")[0]
    versions = [f"Linux {linux}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {ram:.0f} GiB RAM, output on {_file_system(output)}; "
        f"{', '.join(versions)}."
    )


def _field(path: str, key: str, default: str) -> str:
    """Return the first value of a key in one of the `key : value` files of /proc."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return default


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds a path."""
    kinds: dict[Path, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, device = line.partition(" - ")
        kinds[Path(mount.split()[4])] = device.split()[0]
    path = path.resolve()
    return next(kinds[parent] for parent in (path, *path.parents) if parent in kinds)


def _revision() -> str:
    """Return the measured commit, and whether the package differs from it."""
    commit = _git("rev-parse", "--short", "HEAD") or "no commit"
    return f"{commit}, with changes" if _git("status", "--porcelain", "adapterkit") else commit


def _git(*arguments: str) -> str:
    """Return git's output, empty if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
