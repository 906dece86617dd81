"""A run's state on disk: complete or not there, the newest two and the best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import FormatError
from adapterkit.staging import flush, remove
from adapterkit.tensorfile import read_header, read_json, write_tensors

if TYPE_CHECKING:
    import torch

FOLDER = "checkpoints"
TENSORS, STATE = "state.safetensors", "state.json"
KEPT = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, and how good it was at best."""

    step: int
    data: str  # a hash of what is trained on
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None  # of the last step
    best_step: int | None = None
    best_loss: float | None = None
    no_better: int = 0  # measurements since the best
    first_eval_loss: float | None = None


def save(run: Path, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint into the folder of a run, and remove those that are neither new nor the best."""
    folder = run / FOLDER / f"step-{progress.step:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    write_tensors(partial / TENSORS, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {})
    (partial / STATE).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
    for file in (partial / TENSORS, partial / STATE, partial):
        flush(file)
    remove(folder)
    partial.rename(folder)
    flush(folder.parent)
    best = f"step-{progress.best_step or -1:06d}"
    for old in steps(run)[:-KEPT]:
        if old.name != best:
            remove(old)
    return folder


def steps(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if path.is_dir())


def number(folder: Path) -> int:
    """The step that a checkpoint is of."""
    return int(folder.name.removeprefix("step-"))


def at(run: Path, step: int) -> Path:
    """The checkpoint of one step."""
    return run / FOLDER / f"step-{step:06d}"


def load(folder: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """What `save` wrote; raises FormatError where it is damaged."""
    try:
        progress = Progress(**read_json(folder / STATE))
    except (TypeError, OSError) as error:
        raise FormatError(
            f"{folder / STATE}: is not the state of a run; remove {folder} to go on from an older one"
        ) from error
    header = read_header(folder / TENSORS)
    return progress, {name: info.read() for name, info in header.tensors.items()}
