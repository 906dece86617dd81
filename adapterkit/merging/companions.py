"""The files beside merged weights: copies of the base's other files, config, index, merge record and model card."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, Checkpoint
from adapterkit.errors import UnsafeFileError
from adapterkit.files.opening import files_below, unsafe_kind
from adapterkit.files.staging import BEFORE, MERGE_RECORD, RECEIPT, RECEIPT_FOLDER
from adapterkit.files.writing import copy_file, write_bytes, write_json, write_text
from adapterkit.hub.names import public_name
from adapterkit.merging.plan.tokenizers import is_tokenizer_file
from adapterkit.merging.plan.types import Hashes, MergePlan, total_size
from adapterkit.merging.receipts.receipt import Companions, as_json, encode, find_receipt, folder_of
from adapterkit.text import counted, file_rows, markdown

README = "README.md"
REPLACED = (README, MERGE_RECORD, RECEIPT, CONFIG)  # and the index


def finish_merge(plan: MergePlan, folder: Path, hashes: Hashes, receipt: bool) -> None:
    """Write everything but the weights into `folder`; index and config last, because they make the model loadable."""
    base, tokenizer = plan.base, plan.tokenizer
    dropped = tokenizer.replaced if tokenizer else ()
    copied = copy_companions(base, folder, [name for name in copied_files(base) if name not in dropped])
    added = {file: copy_file(tokenizer.folder, file, folder / file) for file in tokenizer.files} if tokenizer else {}
    if receipt:
        left_out = tuple(str(file) for file in base.other_files()[1])
        replaced = save_replaced(base, folder / BEFORE) | {
            name: copy_file(base.path, name, folder / BEFORE / name) for name in dropped
        }
        companions = Companions(copied, replaced, left_out, tuple(added))
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


def copied_files(base: Checkpoint) -> list[str]:
    """List the files beside the weights that a merge copies."""
    return [
        str(file) for file in base.other_files()[0] if str(file) not in REPLACED and file.parts[0] != RECEIPT_FOLDER
    ]


def companions_of(plan: MergePlan) -> list[Path]:
    """List the files beside the weights that a merge copies or replaces."""
    base, folder = plan.base, _replaced_folder(plan.base)
    of_base = [*(base.path / name for name in copied_files(base)), *(folder / name for name in replaced_files(base))]
    return [*of_base, *(plan.tokenizer.paths if plan.tokenizer else ())]


def _replaced_folder(base: Checkpoint) -> Path:
    """The folder of the files that a merge replaces: for a single file its receipt, wherever a killed run left it."""
    return find_receipt(base.path) or folder_of(base.path, base.is_directory)


def copy_companions(base: Checkpoint, folder: Path, only: Container[str] | None = None) -> dict[str, str]:
    """Copy the files beside the weights, or `only` some of them, and return their SHA-256."""
    names = [name for name in copied_files(base) if only is None or name in only]
    return {name: copy_file(base.path, name, folder / name) for name in names}


def save_replaced(base: Checkpoint, before: Path) -> dict[str, str]:
    """Copy the base's files that a merge replaces, any earlier receipt included, to `before`; return their SHA-256."""
    folder = _replaced_folder(base)
    return {name: copy_file(folder, name, before / name) for name in replaced_files(base)}


def replaced_files(base: Checkpoint) -> list[str]:
    """List the regular files that a merge replaces; others are already reported as left out."""
    folder = _replaced_folder(base)
    names = [*REPLACED, *([base.index.name] if base.index else [])]
    names = [name for name in names if os.path.lexists(folder / name) and unsafe_kind(folder / name) is None]
    return names + [str(file.relative_to(folder)) for file in _files_below(folder / RECEIPT_FOLDER)]


def restore_replaced(receipt: Path, folder: Path) -> dict[str, str]:
    """Copy the files of `save_replaced` from the `receipt` folder back, the config last, and return their SHA-256.

    Raises UnsafeFileError for any other file there, which could be foreign weights.
    """
    names = saved_files(receipt / BEFORE)
    for name in names:
        inner = Path(name)
        index = len(inner.parts) == 1 and name.endswith(INDEX_SUFFIX)
        if not (index or name in REPLACED or is_tokenizer_file(name) or inner.parts[0] == RECEIPT_FOLDER):
            raise UnsafeFileError(f"{receipt / BEFORE / name}: not a file that a merge saves; remove it")
    names.sort(key=lambda name: name == CONFIG)
    return {name: copy_file(receipt, f"{BEFORE}/{name}", folder / name) for name in names}


def saved_files(before: Path) -> list[str]:
    """List the files in `before` by relative path."""
    return [str(file.relative_to(before)) for file in _files_below(before)]


def _files_below(folder: Path) -> Iterator[Path]:
    """List the files of a receipt folder. Raises UnsafeFileError for anything but a regular file."""
    for file, kind in files_below(folder) if os.path.isdir(folder) else ():
        if kind is not None:
            raise UnsafeFileError(f"{folder / file}: {kind}, expected a regular file; remove it")
        yield folder / file


def record(plan: MergePlan, hashes: Hashes) -> dict[str, Any]:
    """The base and adapters as JSON facts: names, weights and SHA-256, no local paths."""
    return {
        "adapterkit": __version__,
        "base": {"name": plan.base.name, "files": hashes.base},
        "adapters": [
            {
                "name": one.label,
                **one.weight_facts(),
                "base_model": public_name(one.adapter.base_model),
                "files": files,
            }
            for one, files in zip(plan.adapters, hashes.adapters, strict=True)
        ],
        "dtype": plan.stored_as,
        "as_trained": plan.trained_as,
        "tensors_changed": plan.edits,
        "skipped": list(plan.skipped),
        "notes": list(plan.notes),
    }


def card(plan: MergePlan, hashes: Hashes) -> str:
    """The model card: the Hub's YAML header, then base and adapters with the SHA-256 of every file."""
    known = [public_name(plan.base.name), *(public_name(one.adapter.base_model) for one in plan.adapters)]
    bases = dict.fromkeys(name for name in known if name)
    lines = ["---"]
    if len(bases) == 1:
        relation = "merge" if plan.adapters else "quantized"
        lines += [f"base_model: {next(iter(bases))}", f"base_model_relation: {relation}"]
    lines += ["library_name: transformers", "tags:", "- adapterkit", *(["- lora", "- merge"] if plan.adapters else [])]
    names = [plan.base.name, *(_weighted(one) for one in plan.adapters)]
    done, changed = ("Merged", "changed") if plan.adapters else ("Quantized", "quantized")
    stored = f"quantized to {'; '.join(plan.schemes)}" if plan.schemes else f"dtype {plan.stored_as}"
    lines += [
        "---",
        "",
        f"# {markdown(' + '.join(names))}",
        "",
        f"{done} by adapterkit {__version__}: {counted(plan.edits, 'weight')} {changed}, rounded once ({stored}).",
        "",
        "| part | weight | file | SHA-256 |",
        "| --- | --- | --- | --- |",
    ]
    lines += file_rows(f"{plan.base.name} (base)", "", hashes.base)
    for one, files in zip(plan.adapters, hashes.adapters, strict=True):
        lines += file_rows(one.label, markdown(one.weight_text), files)
    if plan.notes or plan.skipped:
        lines += ["", "Notes:", ""]
        lines += [f"- {markdown(note)}" for note in plan.notes]
        lines += [f"- skipped (allow_partial): {markdown(name)}" for name in plan.skipped]
    return "\n".join(lines) + "\n"


def _weighted(given: WeightedAdapter) -> str:
    return given.label if given.weight_text == "1" else f"{given.weight:g} · {given.label}"
