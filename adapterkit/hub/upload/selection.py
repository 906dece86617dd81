"""Select the files of a folder to upload: no hidden files, training state, pickles or secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.hub.names import is_safe_path
from adapterkit.hub.upload.content_scan import skip_reason
from adapterkit.hub.upload.redaction import check_no_token

TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|scaler|trainer_state|training_args|events\.out\.tfevents)\b.*"
)
TRAINING_FOLDERS = re.compile(r"checkpoint(s|[-_]\d+)|wandb|mlruns")


def select_files(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to upload, by their names on the Hub, and the skipped ones with the reason."""
    files: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for at, folders, names in os.walk(path, onerror=_unreadable):
        inner = Path(at).relative_to(path)
        unwanted = {folder: why for folder in folders if (why := _skip_folder(Path(at) / folder))}
        skipped |= {f"{inner / folder}/": why for folder, why in sorted(unwanted.items())}
        folders[:] = sorted(set(folders) - set(unwanted))
        for name in sorted(names):
            if why := _skip_name(name):
                skipped[str(inner / name)] = why
            else:
                _check_file(Path(at) / name, path)
                files[str(inner / name)] = Path(at) / name
    return files, skipped


def skip_by_content(files: dict[str, Path]) -> dict[str, str]:
    """Remove pickles from `files`; returns them with the reason. Raises UnsafeFileError for secrets."""
    for name in files:
        check_no_token(files[name], name)
    skipped = {name: why for name, file in files.items() if (why := skip_reason(file)) is not None}
    for name in skipped:
        del files[name]
    return skipped


def _unreadable(error: OSError) -> NoReturn:
    raise FormatError(f"{error.filename}: cannot be read: {error.strerror}")


def _skip_folder(folder: Path) -> str | None:
    if folder.name.startswith("."):
        return "hidden"
    if TRAINING_FOLDERS.fullmatch(folder.name):
        return "training state"
    return "a link to a folder" if folder.is_symlink() else None


def _skip_name(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    return "training state" if TRAINING_STATE.fullmatch(name) else None


def _check_file(file: Path, folder: Path) -> None:
    """Raise UnsafeFileError for a name that the Hub rejects, and for a link out of the folder.

    A link may lead to a file in the same folder or, in the Hub cache, in the same repository.
    """
    if not is_safe_path(str(file.relative_to(folder))):
        raise UnsafeFileError(f"{file}: name is not printable or not portable; rename it")
    if file.is_symlink():
        target, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
        repo = next((at.parent for at in root.parents if at.name == "snapshots"), root)
        if not target.is_relative_to(repo) or not target.is_file():
            raise UnsafeFileError(f"{file}: a link to {target}, outside its folder; remove it or copy the file here")
    elif not file.is_file():
        raise UnsafeFileError(f"{file}: not a regular file; remove it")
