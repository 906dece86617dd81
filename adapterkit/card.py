"""What goes beside the merged weights: the base's other files, the config, the index, a record and a model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.checkpoint import CONFIG
from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.plan import Given, MergePlan, total_size
from adapterkit.staging import RECORD, flush
from adapterkit.version import __version__

Hashes = Mapping[str, Mapping[str, str]]


def write_companions(plan: MergePlan, folder: Path, hashes: Hashes) -> None:
    """Write everything but the weights into `folder`; the index and the config, which make it load, come last."""
    keep, _ = plan.base.other_files()
    for file in keep:
        if str(file) not in ("README.md", RECORD):
            _copy_file(plan.base.path, file, folder)
    write_json(folder / RECORD, record(plan, hashes))
    write_text(folder / "README.md", card(plan, hashes))
    if plan.base.index is not None:
        index = {"metadata": {"total_size": total_size(plan)}, "weight_map": dict(sorted(plan.weight_map.items()))}
        write_json(folder / plan.base.index.name, index)
    if (plan.base.path / CONFIG).is_file():
        write_json(folder / CONFIG, plan.config)


def record(plan: MergePlan, hashes: Hashes) -> dict[str, Any]:
    """What was merged into what, for programs: names, weights and SHA-256, never a local path."""
    name = plan.base.name
    return {
        "adapterkit": __version__,
        "base": {"name": name, "files": hashes[name]},
        "adapters": [
            {
                "name": one.label,
                "weight": one.weight,
                "base_model": public_name(one.adapter.base_model),
                "files": hashes[one.label],
            }
            for one in plan.given
        ],
        "dtype": plan.dtype or "as the base",
        "tensors_changed": plan.edits,
        "skipped": list(plan.skipped),
        "notes": list(plan.notes),
    }


def card(plan: MergePlan, hashes: Hashes) -> str:
    """The model card: YAML that the Hub reads, then what was merged into what, with file hashes."""
    known = [public_name(plan.base.name), *(public_name(one.adapter.base_model) for one in plan.given)]
    bases = dict.fromkeys(name for name in known if name)
    lines = ["---"]
    if len(bases) == 1:
        relation = "merge" if plan.given else "quantized"
        lines += [f"base_model: {next(iter(bases))}", f"base_model_relation: {relation}"]
    lines += ["library_name: transformers", "tags:", "- adapterkit", *(["- lora", "- merge"] if plan.given else [])]
    names = [plan.base.name, *(_weighted(one) for one in plan.given)]
    schemes = dict.fromkeys(edit.packing.scheme for file in plan.files for edit in file.edits if edit.packing)
    changed = f"{plan.edits} weights {'changed' if plan.given else 'quantized'}"
    stored = f"quantized to {'; '.join(schemes)}" if schemes else plan.dtype or "dtypes as in the base"
    lines += [
        "---",
        "",
        f"# {' + '.join(names)}",
        "",
        f"{'Merged' if plan.given else 'Quantized'} by adapterkit {__version__}: {changed}, rounded once ({stored}).",
        "",
        "| part | weight | file | SHA-256 |",
        "| --- | --- | --- | --- |",
    ]
    name = plan.base.name
    lines += [f"| {name} (base) | | {file} | `{digest}` |" for file, digest in hashes[name].items()]
    for one in plan.given:
        lines += [f"| {one.label} | {one.weight:g} | {f} | `{digest}` |" for f, digest in hashes[one.label].items()]
    if plan.notes or plan.skipped:
        lines += ["", "Notes:", ""]
        lines += [f"- {note}" for note in plan.notes]
        lines += [f"- skipped, as asked: {name}" for name in plan.skipped]
    return "\n".join(lines) + "\n"


def _weighted(one: Given) -> str:
    return one.label if one.weight == 1 else f"{one.weight:g} · {one.label}"


def public_name(name: str | None) -> str | None:
    """`name` where it is a Hub id; a local path, which would leak directory names, is none."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") else None


def _copy_file(base: Path, file: Path, folder: Path) -> None:
    source, target = base / file, folder / file
    try:
        if not source.is_file():
            raise UnsafeFileError(f"{source}: is neither a file nor a link to one; remove it from the base")
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise FormatError(f"{source}: cannot be followed: {error}") from error
    shutil.copyfile(source, target)
    flush(target)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and flush it to the disk."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` and flush it to the disk."""
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:  # paths need not be UTF-8
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
