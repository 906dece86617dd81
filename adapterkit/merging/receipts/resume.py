"""Resume an interrupted merge from the records of its finished files.

A record is written once its file and sidecar are flushed to disk, with the hashes of the adapters. It is valid if all
hashes match: the fingerprint of the plan, the base's file, the adapters, and the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import AdapterkitError
from adapterkit.files import os_calls
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import RECEIPT_FOLDER
from adapterkit.files.workspace import remove_tree
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.finished_file import FileDone, fingerprint_of, sha256_of_json
from adapterkit.merging.receipts.receipt import sidecar_name, with_ending
from adapterkit.merging.run_options import RunOptions

RECORDS = ".adapterkit_progress"  # a folder beside the files, removed at the end
AdapterHashes = Sequence[dict[str, str]]


def job_of(plan: MergePlan, options: RunOptions) -> str:
    """The name of a merge by the sizes of its inputs and outputs, by which `resume` finds its workspace."""
    files = [(file.name, file.size, hashlib.sha256(file.header).hexdigest()) for file in plan.files]
    given = [(one.label, one.weight_facts(), [(file.name, file.stat().st_size) for file in one.adapter.files])
             for one in plan.adapters]  # fmt: skip
    return f"merge {sha256_of_json([__version__, options.receipt, files, given])}"


def resume_hint(building: Path) -> str:
    """Return how to resume an interrupted merge, or "" if none of its shards is finished."""
    finished = any(building.glob(f"{RECORDS}/*.json"))
    return "finished shards are saved: continue with `resume=True`" if finished else ""


def record_done(building: Path, done: FileDone, adapters: AdapterHashes) -> None:
    """Record that a file and its sidecar are finished and flushed to disk."""
    record = _record_of(building, done.name)
    record.parent.mkdir(exist_ok=True)
    os_calls.flush_path(building)
    with open(record, "w", encoding="utf-8") as stream:
        stream.write(json.dumps({"adapters": adapters, "done": done.to_json()}))  # `dump` is several times slower
        stream.flush()
        os_calls.flush(stream.fileno())


def reuse_finished(plan: MergePlan, options: RunOptions, building: Path, adapters: AdapterHashes) -> list[FileDone]:
    """Find the finished files of `plan` in `building`, with every hash checked, and remove everything else."""
    found = [done for file in plan.files if (done := _finished(plan, file, options, building, adapters)) is not None]
    reused = {building / done.name for done in found} | {building / sidecar_name(done.name) for done in found}
    reused |= {_record_of(building, done.name) for done in found}
    for path in building.iterdir():
        if path in (building / RECEIPT_FOLDER, building / RECORDS) and path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                if inner not in reused:
                    remove_tree(inner)
        elif path not in reused:
            remove_tree(path)
    return found


def clear_records(building: Path) -> None:
    """Remove the records of a complete merge."""
    remove_tree(building / RECORDS)


def _finished(
    plan: MergePlan, file: FilePlan, options: RunOptions, building: Path, adapters: AdapterHashes
) -> FileDone | None:
    """The record of a file if it is valid, else None."""
    record = _record_of(building, file.name)
    if not record.is_file():
        return None
    try:
        facts = read_json(record, large=True, allow_surrogates=True)
        done = FileDone.from_json(facts["done"])
    except (AdapterkitError, TypeError, KeyError, AttributeError):  # truncated, or of another version
        return None
    shard, sidecar = building / file.name, building / sidecar_name(file.name)
    valid = (
        facts.get("adapters") == list(adapters)
        and (done.name, done.size) == (file.name, file.size)
        and done.fingerprint == fingerprint_of(plan, file, options)
        and shard.is_file()
        and (done.sidecar is None or (sidecar.is_file() and sidecar.stat().st_size == done.sidecar))
        and done.after == sha256_of(shard)
        and done.before == sha256_of(file.source)
    )
    return done if valid else None


def _record_of(building: Path, name: str) -> Path:
    return building / RECORDS / with_ending(name, ".json")
