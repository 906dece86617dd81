"""What an interrupted merge leaves to go on with: the records of the files that are done.

A record is written when its file and sidecar are on the disk, with the hashes of the adapters. It is believed where
everything hashes as it says: the plan for the file, the base's file, the adapters, and what was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import AdapterkitError
from adapterkit.files import system
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import RECEIPT_FOLDER
from adapterkit.files.workspace import remove_tree
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.done import FileDone, fingerprint, sha256_of_json
from adapterkit.merging.receipts.receipt import sidecar_name, with_ending

RECORDS = ".adapterkit_progress"  # a folder beside the files, which goes when all are done
AdapterHashes = Sequence[dict[str, str]]


def job_of(plan: MergePlan, options: RunOptions) -> str:
    """What names the workspace of a merge, by which a run that resumes it finds it: its inputs and outputs by size."""
    files = [(file.name, file.size, hashlib.sha256(file.header).hexdigest()) for file in plan.files]
    given = [(one.label, one.weight, [(file.name, file.stat().st_size) for file in one.adapter.files])
             for one in plan.given]  # fmt: skip
    return f"merge {sha256_of_json([__version__, options.receipt, files, given])}"


def resume_hint(building: Path) -> str:
    """Return how to resume an interrupted merge, or "" if none of its shards is finished."""
    finished = any(building.glob(f"{RECORDS}/*.json"))
    return "finished shards are saved: continue with `resume=True`" if finished else ""


def record_done(building: Path, done: FileDone, adapters: AdapterHashes) -> None:
    """Record that a file, made with the adapters of these hashes, and its sidecar are complete and on the disk."""
    record = _record_of(building, done.name)
    record.parent.mkdir(exist_ok=True)
    system.flush_path(building)
    with open(record, "w", encoding="utf-8") as stream:
        stream.write(json.dumps({"adapters": adapters, "done": done.to_json()}))  # `dump` is several times slower
        stream.flush()
        system.flush(stream.fileno())


def take_over(plan: MergePlan, options: RunOptions, building: Path, adapters: AdapterHashes) -> list[FileDone]:
    """The files of `plan` that are done in `building`, every hash checked; everything else in it is removed."""
    found = [done for file in plan.files if (done := _done(plan, file, options, building, adapters)) is not None]
    kept = {building / done.name for done in found} | {building / sidecar_name(done.name) for done in found}
    kept |= {_record_of(building, done.name) for done in found}
    for path in building.iterdir():
        if path in (building / RECEIPT_FOLDER, building / RECORDS) and path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                if inner not in kept:
                    remove_tree(inner)
        elif path not in kept:
            remove_tree(path)
    return found


def clear_records(building: Path) -> None:
    """Remove the records, when there is nothing to resume any more."""
    remove_tree(building / RECORDS)


def _done(
    plan: MergePlan, file: FilePlan, options: RunOptions, building: Path, adapters: AdapterHashes
) -> FileDone | None:
    """The record of a file, where everything is as it says."""
    record = _record_of(building, file.name)
    if not record.is_file():
        return None
    try:
        facts = read_json(record, large=True, allow_surrogates=True)
        done = FileDone.from_json(facts["done"])
    except (AdapterkitError, TypeError, KeyError, AttributeError):  # cut short, or another version's
        return None
    shard, sidecar = building / file.name, building / sidecar_name(file.name)
    fits = (
        facts.get("adapters") == list(adapters)
        and (done.name, done.size) == (file.name, file.size)
        and done.made_by == fingerprint(plan, file, options)
        and shard.is_file()
        and (done.sidecar is None or (sidecar.is_file() and sidecar.stat().st_size == done.sidecar))
        and done.after == sha256_of(shard)
        and done.before == sha256_of(file.source)
    )
    return done if fits else None


def _record_of(building: Path, name: str) -> Path:
    return building / RECORDS / with_ending(name, ".json")
