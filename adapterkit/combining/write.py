"""Write a new adapter, all or nothing, with a record of its inputs and a card."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adapterkit import __version__
from adapterkit.adapter.formats import save
from adapterkit.adapter.formats.table import get_format
from adapterkit.adapter.weights import Adapter
from adapterkit.base.fingerprint import compare_rows, fingerprint
from adapterkit.combining.plan import AdapterMade, AdapterPlan, ModuleDone
from adapterkit.files.hub_cache import check_blob_hash, check_cached
from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import ADAPTER_RECORD, staged
from adapterkit.files.stamps import check_unchanged
from adapterkit.files.writing import write_json, write_text
from adapterkit.hub.names import public_name
from adapterkit.text import file_rows, markdown


def make_adapter(plan: AdapterPlan) -> Generator[ModuleDone | AdapterMade, None, None]:
    """Compute the adapter of `plan` and write it in the plan's format: an event per module, then the result.

    Raises ChangedError if an input has changed since it was opened, OutputExistsError if the output exists and was not
    written by adapterkit, NoSpaceError if the disk is full.
    """
    plan.destination.check()
    for event in plan.work.steps():
        if isinstance(event, AdapterMade):
            adapter, notes = _with_fingerprint(event.adapter, plan)
            event = replace(event, adapter=adapter, notes=(*plan.notes, *event.notes, *notes), out=plan.destination.out)
            _write(plan, event)
        yield event


def _with_fingerprint(adapter: Adapter, plan: AdapterPlan) -> tuple[Adapter, list[str]]:
    """The adapter with the fingerprint of its base, and a note if it was made for another than that of the plan."""
    if not plan.models:
        return adapter, []
    base = plan.models[0]
    if not adapter.base_fingerprint:
        return replace(adapter, base_fingerprint=fingerprint(base)), []
    note = compare_rows(adapter.base_fingerprint, base).note(base.name)
    return adapter, [note] if note else []


def _write(plan: AdapterPlan, made: AdapterMade) -> None:
    check_cached(shard.file for model in plan.models for shard in model.shards)
    hashes = [{file.name: _digest(file) for file in one.adapter.files} for one in plan.given]
    sources = [
        {"name": one.label, **one.weight_facts(), "files": files} for one, files in zip(plan.given, hashes, strict=True)
    ]
    record = {
        "adapterkit": __version__, "made": plan.made, "from": sources, "relative_error": made.error,
        "modules": {row.name: {"rank": row.rank, "error": row.error} for row in made.modules},
        "notes": list(made.notes),
    }  # fmt: skip
    with staged(plan.destination) as folder:
        save(made.adapter, folder, format=plan.format)
        write_json(folder / ADAPTER_RECORD, record)
        write_text(folder / "README.md", _card(made.adapter, plan, hashes, made.notes))
        for stamps in (*(model.stamps for model in plan.models), *(one.adapter.stamps for one in plan.given)):
            check_unchanged(stamps)


def _card(
    adapter: Adapter,
    plan: AdapterPlan,
    hashes: Sequence[Mapping[str, str]],
    notes: Sequence[str],
) -> str:
    """The adapter's card: metadata for the Hub, then the table of inputs."""
    base, given = public_name(adapter.base_model), plan.given
    lines = ["---", *([f"base_model: {base}"] if base else [])]
    lines += [f"library_name: {get_format(plan.format).LIBRARY}", "tags:", "- adapterkit", "- lora"]
    title = " + ".join(one.label for one in given) or "Extracted adapter"
    lines += ["---", "", f"# {markdown(title)}", "", f"Made by adapterkit {__version__}: {markdown(plan.made)}."]
    if given:
        lines += ["", "| from | weight | file | SHA-256 |", "| --- | --- | --- | --- |"]
    for one, files in zip(given, hashes, strict=True):
        lines += file_rows(one.label, markdown(one.weight_text), files)
    if notes:
        lines += ["", "Notes:", "", *(f"- {markdown(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _digest(file: Path) -> str:
    found = sha256_of(file)
    check_blob_hash(file, found)
    return found
