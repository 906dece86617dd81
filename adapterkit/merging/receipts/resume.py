"""What an interrupted merge leaves to go on with: the shards that are finished, each with a note of what it is.

A note is written when its shard and sidecar are on the disk. It holds a fingerprint of everything that the shard is
made by, so that nothing made by another plan, or from inputs that have changed, is taken over.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import AdapterkitError
from adapterkit.files import system
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import FOLDER
from adapterkit.files.workspace import remove
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.receipt import sidecar_name, with_ending

NOTES = ".adapterkit_progress"  # a folder beside the shards, which goes when all are done


@dataclass(frozen=True, slots=True)
class Done:
    """A finished shard: the SHA-256 of the base's and of its own."""

    before: str
    after: str


def job_of(plan: MergePlan) -> str:
    """What tells the plan from others, by which a run that resumes it finds the workspace."""
    return f"merge {_hash((__version__, plan.receipt, plan.files))}"


def in_words(building: Path) -> str:
    """What of an interrupted merge is worth keeping."""
    return "finished shards are kept: run it again with --resume" if any(building.glob(f"{NOTES}/*.json")) else ""


def note_finished(plan: MergePlan, file: FilePlan, building: Path, done: Done) -> None:
    """Note that a shard of `plan`, and its sidecar, are complete and on the disk."""
    note = _note_of(building, file)
    note.parent.mkdir(exist_ok=True)
    system.flush_path(building)
    facts = {"made_by": _fingerprint(plan, file), "before": done.before, "after": done.after}
    with open(note, "w", encoding="utf-8") as stream:
        json.dump(facts, stream)
        stream.flush()
        system.flush(stream.fileno())


def take_over(plan: MergePlan, building: Path) -> dict[str, Done]:
    """By name the finished shards of `plan` in `building`, their hashes checked; everything else in it is removed."""
    found = {file.name: done for file in plan.files if (done := _finished(plan, file, building)) is not None}
    kept = {building / name for name in found} | {building / sidecar_name(name) for name in found}
    kept |= {_note_of(building, file) for file in plan.files if file.name in found}
    for path in building.iterdir():
        if path in (building / FOLDER, building / NOTES) and path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                if inner not in kept:
                    remove(inner)
        elif path not in kept:
            remove(path)
    return found


def clear_notes(building: Path) -> None:
    """Remove the notes, when there is nothing to resume any more."""
    remove(building / NOTES)


def _finished(plan: MergePlan, file: FilePlan, building: Path) -> Done | None:
    """The note of a shard, where that is what it says."""
    note = _note_of(building, file)
    try:
        facts = read_json(note, large=True) if note.is_file() else {}
    except AdapterkitError:  # cut short
        return None
    shard = building / file.name
    if facts.get("made_by") != _fingerprint(plan, file) or not shard.is_file() or shard.stat().st_size != file.size:
        return None
    with open_regular(shard) as stream:
        after = hashlib.file_digest(stream, "sha256").hexdigest()
    return Done(str(facts.get("before")), after) if facts.get("after") == after else None


def _fingerprint(plan: MergePlan, file: FilePlan) -> str:
    """Of the plan for a shard, and of what its inputs were when the plan was made."""
    stamps, inputs = plan.stamps, [file.source, *(path for one in plan.given for path in one.adapter.files)]
    return _hash((__version__, plan.receipt, [stamps[path] for path in inputs], file))


def _hash(facts: object) -> str:
    told = re.sub(r" at 0x[0-9a-f]+", "", repr(facts))  # where functions lie
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()


def _note_of(building: Path, file: FilePlan) -> Path:
    return building / NOTES / with_ending(file.name, ".json")
