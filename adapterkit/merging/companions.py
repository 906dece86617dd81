"""What goes beside the merged weights: the base's other files, the config, the index, a record and a model card."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.adapter.weights import WeightedAdapter
from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, Checkpoint
from adapterkit.errors import UnsafeFileError
from adapterkit.files.opening import files_below, unsafe_kind
from adapterkit.files.staging import BEFORE, MERGE_RECORD, RECEIPT, RECEIPT_FOLDER
from adapterkit.files.writing import copy_file, write_bytes, write_json, write_text
from adapterkit.hub.names import public_name
from adapterkit.merging.plan.types import Hashes, MergePlan, total_size
from adapterkit.merging.receipts.receipt import Companions, as_json, encode, find_receipt, folder_of
from adapterkit.text import counted, file_rows, markdown

README = "README.md"
REPLACED = (README, MERGE_RECORD, RECEIPT, CONFIG)  # and the index


def finish_merge(plan: MergePlan, folder: Path, hashes: Hashes, receipt: bool) -> None:
    """Write everything but the weights into `folder`, with a `receipt` or without.

    The index and the config, which make it load, come last.
    """
    base = plan.base
    copied = copy_others(base, folder)
    if receipt:
        left_out = tuple(str(file) for file in base.other_files()[1])
        companions = Companions(copied, keep_replaced(base, folder / BEFORE), left_out)
        write_bytes(folder / RECEIPT, encode(as_json(plan, hashes, companions)))
    if not base.is_directory:
        return
    write_json(folder / MERGE_RECORD, record(plan, hashes))
    write_text(folder / README, card(plan, hashes))
    if base.index is not None:
        index = {"metadata": {"total_size": total_size(plan)}, "weight_map": dict(sorted(plan.weight_map.items()))}
        write_json(folder / base.index.name, index)
    if (base.path / CONFIG).is_file():
        write_json(folder / CONFIG, plan.config)


def others(base: Checkpoint) -> list[str]:
    """List the files beside the weights that a merge copies, without those that it writes itself."""
    return [
        str(file) for file in base.other_files()[0] if str(file) not in REPLACED and file.parts[0] != RECEIPT_FOLDER
    ]


def companions_of(base: Checkpoint) -> list[Path]:
    """List the base's files beside its weights: those that a merge copies, and those that it replaces."""
    folder = _beside(base)
    return [*(base.path / name for name in others(base)), *(folder / name for name in replaced_in(base))]


def _beside(base: Checkpoint) -> Path:
    """The folder with what a merge replaces: of a single file its receipt, which a killed run may have put aside."""
    return find_receipt(base.path) or folder_of(base.path, base.is_directory)


def copy_others(base: Checkpoint, folder: Path, only: Container[str] | None = None) -> dict[str, str]:
    """Copy the files beside the weights, all or `only` some; their SHA-256."""
    names = [name for name in others(base) if only is None or name in only]
    return {name: copy_file(base.path, name, folder / name) for name in names}


def keep_replaced(base: Checkpoint, before: Path) -> dict[str, str]:
    """Keep the base's files that a merge replaces, and any earlier receipt, for `restore_replaced`; their SHA-256."""
    folder = _beside(base)
    return {name: copy_file(folder, name, before / name) for name in replaced_in(base)}


def replaced_in(base: Checkpoint) -> list[str]:
    """List the files that a merge replaces; anything but a regular file is already reported as left out."""
    folder = _beside(base)
    names = [*REPLACED, *([base.index.name] if base.index else [])]
    names = [name for name in names if os.path.lexists(folder / name) and unsafe_kind(folder / name) is None]
    return names + [str(file.relative_to(folder)) for file in _files_below(folder / RECEIPT_FOLDER)]


def restore_replaced(kept: Path, folder: Path) -> dict[str, str]:
    """Put back what `keep_replaced` kept in the receipt's folder `kept`, the config, which makes it load, last.

    Returns the SHA-256 of it all; raises UnsafeFileError for anything else, which could be other weights.
    """
    names = kept_before(kept / BEFORE)
    for name in names:
        inner = Path(name)
        index = len(inner.parts) == 1 and name.endswith(INDEX_SUFFIX)
        if not (index or name in REPLACED or inner.parts[0] == RECEIPT_FOLDER):
            raise UnsafeFileError(f"{kept / BEFORE / name}: is nothing that a merge keeps; remove it")
    names.sort(key=lambda name: name == CONFIG)
    return {name: copy_file(kept, f"{BEFORE}/{name}", folder / name) for name in names}


def kept_before(before: Path) -> list[str]:
    """The files in `before`, by their path in it."""
    return [str(file.relative_to(before)) for file in _files_below(before)]


def _files_below(folder: Path) -> Iterator[Path]:
    """The files that a merge kept; raises UnsafeFileError for what it cannot have kept."""
    for file, kind in files_below(folder) if os.path.isdir(folder) else ():
        if kind is not None:
            raise UnsafeFileError(f"{folder / file}: is {kind}, which no merge leaves there; remove it")
        yield folder / file


def record(plan: MergePlan, hashes: Hashes) -> dict[str, Any]:
    """What was merged into what, for programs: names, weights and SHA-256, never a local path."""
    name = plan.base.name
    return {
        "adapterkit": __version__,
        "base": {"name": name, "files": hashes.base},
        "adapters": [
            {
                "name": one.label,
                "weight": one.weight,
                "base_model": public_name(one.adapter.base_model),
                "files": files,
            }
            for one, files in zip(plan.given, hashes.adapters, strict=True)
        ],
        "dtype": plan.stored_as,
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
    changed = f"{counted(plan.edits, 'weight')} {'changed' if plan.given else 'quantized'}"
    stored = f"quantized to {'; '.join(plan.schemes)}" if plan.schemes else f"dtype {plan.stored_as}"
    lines += [
        "---",
        "",
        f"# {markdown(' + '.join(names))}",
        "",
        f"{'Merged' if plan.given else 'Quantized'} by adapterkit {__version__}: {changed}, rounded once ({stored}).",
        "",
        "| part | weight | file | SHA-256 |",
        "| --- | --- | --- | --- |",
    ]
    lines += file_rows(f"{plan.base.name} (base)", "", hashes.base)
    for one, files in zip(plan.given, hashes.adapters, strict=True):
        lines += file_rows(one.label, f"{one.weight:g}", files)
    if plan.notes or plan.skipped:
        lines += ["", "Notes:", ""]
        lines += [f"- {markdown(note)}" for note in plan.notes]
        lines += [f"- skipped, as asked: {markdown(name)}" for name in plan.skipped]
    return "\n".join(lines) + "\n"


def _weighted(one: WeightedAdapter) -> str:
    return one.label if one.weight == 1 else f"{one.weight:g} · {one.label}"
