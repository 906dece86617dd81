"""Checkpoints of a run: written atomically and verified by SHA-256; the newest two and the best remain.

A checkpoint has the tensors, the progress, the origin (everything that determines its bits) and a hash of the log so
far. `SHA256SUMS`, written last, has the hashes of its files, in the format of `sha256sum -c`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.errors import FormatError
from adapterkit.files import os_calls
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import read_whole, sha256_of
from adapterkit.files.safetensors import TORCH_NAMES, read_header, write_tensors
from adapterkit.files.workspace import remove_tree
from adapterkit.train.runs.fingerprint import Origin

if TYPE_CHECKING:
    import torch

FOLDER = "checkpoints"
TENSORS, STATE, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
NEWEST = 2  # checkpoints that remain, besides the best
MAX_SUMS_BYTES = 1000
STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, and its best validation loss."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None  # of the last step
    best_step: int | None = None
    best_loss: float | None = None
    no_better: int = 0  # validations since the best
    first_eval_loss: float | None = None

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT


@dataclass(frozen=True, slots=True)
class Log:
    """The log of a run up to a checkpoint: its size in bytes, and their SHA-256."""

    size: int
    sha256: str

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    @classmethod
    def of(cls, data: bytes) -> Log:
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class State:
    """A checkpoint without its tensors."""

    progress: Progress
    origin: Origin
    log: Log

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT


def save(run: Path, state: State, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint into the folder of a run, and remove those that are neither the newest nor the best."""
    folder = at(run, state.progress.step)
    partial = folder.with_name(f".{folder.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    write_tensors(partial / TENSORS, tensors, {})
    (partial / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
    (partial / SUMS).write_text("".join(_sums(partial).values()), encoding="utf-8")
    for file in (partial / STATE, partial / SUMS, partial):
        os_calls.flush_path(file)
    remove_tree(folder)
    partial.rename(folder)
    os_calls.flush_path(folder.parent)
    for old in steps(run)[:-NEWEST]:
        if number(old) != state.progress.best_step:
            remove_tree(old)
    return folder


def steps(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, oldest first."""
    found = [path for path in (run / FOLDER).glob("step-*") if re.fullmatch("step-[0-9]{6,12}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=number)


def number(folder: Path) -> int:
    """The step of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def at(run: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return run / FOLDER / f"step-{step:06d}"


def read(folder: Path) -> State:
    """Read a checkpoint without its tensors; raises FormatError if any bit of it has changed since it was written."""
    from pydantic import TypeAdapter, ValidationError

    sums = _sums(folder)
    written = read_whole(folder / SUMS, MAX_SUMS_BYTES).decode("utf-8", "replace")
    for name, line in sums.items():
        if line not in written:
            raise FormatError(f"{folder / name}: does not match its SHA-256 in {SUMS}; one of them has changed")
    if written != "".join(sums.values()):
        raise FormatError(f"{folder / SUMS}: has more than the hashes of {' and '.join(sums)}")
    try:
        return TypeAdapter(State).validate_json(json.dumps(read_json(folder / STATE)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{folder / STATE}: {place} is {reprlib.repr(first['input'])}: {first['msg']}") from error


def check(folder: Path, state: State, last: int, layout: Mapping[str, torch.Tensor]) -> None:
    """Raise FormatError unless the checkpoint is of a run of `last` steps with tensors like those of `layout`."""
    progress, step, best = state.progress, number(folder), state.progress.best_step
    amounts = {"tokens": progress.tokens, "seconds": progress.seconds, "no_better": progress.no_better}
    for problem, present in {
        f"step is {progress.step:,}, its folder is {folder.name}": progress.step != step,
        f"step is {step:,}, the run has {last:,}": not 1 <= step <= last,
        f"best_step is {best}, expected 1 to {step:,}": best is not None and not 1 <= best <= step,
        "has only one of best_step and best_loss": (best is None) != (progress.best_loss is None),
        **{f"{name} is {value}, expected 0 or more": not 0 <= value < math.inf for name, value in amounts.items()},
    }.items():
        if present:
            raise FormatError(f"{folder / STATE}: {problem}")
    file, tensors = folder / TENSORS, read_header(folder / TENSORS).tensors
    for name in sorted(tensors.keys() ^ layout.keys()):
        raise FormatError(f"{file}: {name} is " + ("not a tensor of this run" if name in tensors else "missing"))
    for name, info in tensors.items():
        stored = TORCH_NAMES.get(info.dtype, info.dtype), info.shape
        expected = str(layout[name].dtype).removeprefix("torch."), tuple(layout[name].shape)
        if stored != expected:
            raise FormatError(f"{file}: {name} is {stored[0]} {stored[1]}, this run has {expected[0]} {expected[1]}")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint that passed `check`."""
    return {name: info.read() for name, info in read_header(folder / TENSORS).tensors.items()}


def _sums(folder: Path) -> dict[str, str]:
    """The lines of `SHA256SUMS` by file."""
    return {name: f"{sha256_of(folder / name)}  {name}\n" for name in (TENSORS, STATE)}
