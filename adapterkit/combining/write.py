"""A new adapter on disk: all or nothing, with a record of what it was made from and a card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.adapter.formats import save
from adapterkit.adapter.formats.table import DEFAULT, format_named
from adapterkit.adapter.weights import Adapter, WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.files.hub_cache import check_cached, check_name
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import ADAPTER_RECORD, Destination, staged
from adapterkit.files.stamps import check_unchanged
from adapterkit.files.writing import write_json, write_text
from adapterkit.hub.names import public_name
from adapterkit.text import file_rows, markdown


def write_adapter(
    adapter: Adapter,
    out: Destination,
    made: str,
    given: Sequence[WeightedAdapter],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    models: Sequence[Checkpoint] = (),
) -> None:
    """Write `adapter` to the new directory `out` as PEFT reads it; `made` says how, `facts` are for programs.

    It is made from those `given` and from `models`. Raises ChangedError where one of them has changed since it was
    opened, OutputExistsError where there is something already that is not ours, NoSpaceError where the disk is full.
    """
    check_cached(shard.file for model in models for shard in model.shards)
    hashes = [{file.name: _digest(file) for file in one.adapter.files} for one in given]
    with staged(out) as folder:
        save(adapter, folder)
        sources = [
            {"name": one.label, "weight": one.weight, "files": files} for one, files in zip(given, hashes, strict=True)
        ]
        record = {"adapterkit": __version__, "made": made, "from": sources, **facts, "notes": list(notes)}
        write_json(folder / ADAPTER_RECORD, record)
        write_text(folder / "README.md", _card(adapter, made, given, hashes, notes))
        for stamps in (*(model.stamps for model in models), *(one.adapter.stamps for one in given)):
            check_unchanged(stamps)


def _card(
    adapter: Adapter,
    made: str,
    given: Sequence[WeightedAdapter],
    hashes: Sequence[Mapping[str, str]],
    notes: Sequence[str],
) -> str:
    """The adapter's card: YAML that the Hub reads, then what it was made from."""
    base = public_name(adapter.base_model)
    lines = ["---", *([f"base_model: {base}"] if base else [])]
    lines += [f"library_name: {format_named(DEFAULT).LIBRARY}", "tags:", "- adapterkit", "- lora"]
    title = " + ".join(one.label for one in given) or "Extracted adapter"
    lines += ["---", "", f"# {markdown(title)}", "", f"Made by adapterkit {__version__}: {markdown(made)}."]
    if given:
        lines += ["", "| from | weight | file | SHA-256 |", "| --- | --- | --- | --- |"]
    for one, files in zip(given, hashes, strict=True):
        lines += file_rows(one.label, f"{one.weight:g}", files)
    if notes:
        lines += ["", "Notes:", "", *(f"- {markdown(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _digest(file: Path) -> str:
    with open_regular(file) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    check_name(file, found)
    return found
