"""Delete an adapter from this disk, exactly the files that the plan shows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter.formats import table as formats
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.files.staging import ADAPTER_RECORD, TRAINING_RECORD
from adapterkit.hub.adapter_listing import AdapterEntry, adapter_folders
from adapterkit.hub.names import hub_cache
from adapterkit.text import counted, size, visible

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

# Files that tools write next to an adapter's weights and config.
COMPANIONS = (
    ADAPTER_RECORD, TRAINING_RECORD, "adapterkit_recipe.yaml", "metrics.jsonl",
    "README.md",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth",
)  # fmt: skip
MODEL = re.compile(r"config\.json|(model|pytorch_model|consolidated).*\.(safetensors|bin|pth|json)|.*\.gguf")


def owned_names() -> tuple[str, ...]:
    """The names of the files that belong to an adapter, weights and config first."""
    return *formats.file_names(), *COMPANIONS


@dataclass(frozen=True)
class Removal:
    """The files to delete with an adapter, and their sizes; the folder too unless it contains others."""

    name: str
    path: Path  # of the adapter
    folder: Path
    files: tuple[tuple[Path, int], ...]
    remaining: tuple[str, ...] = ()
    revision: str | None = None  # of a repository in the Hub cache, whose folder is then `folder`
    whole_repo: bool = False  # the whole repository is deleted: this is its only cached revision

    @property
    def bytes(self) -> int:
        """Bytes freed."""
        return sum(size for _, size in self.files)

    @property
    def lines(self) -> Iterator[str]:
        """The plan as text."""
        where, total = visible(str(self.folder)), f"{counted(len(self.files), 'file')}, {size(self.bytes)}"
        if self.revision is not None:
            scope = "whole repository" if self.whole_repo else f"revision {self.revision[:10]}"
            yield f"{where}: {scope} in the Hub cache, {total}"
            return
        yield f"{where}: {total}"
        yield from (f"  {file.name}  {size(count)}" for file, count in self.files)
        if self.remaining:
            yield f"The folder stays: it also contains {visible(_abbreviated(self.remaining))}."
        else:
            yield "The folder is deleted too: it contains nothing else."


def plan_removal(entry: AdapterEntry) -> Removal:
    """Plan the deletion of the adapter `entry`: its own files in its folder, or its revision in the Hub cache.

    Raises UsageError if it is not on this disk, or if deleting it would affect something else: a link, a model or a git
    repository in the same folder, other adapters below it or in the same revision.
    """
    path = entry.path
    if path is None or not any((path / name).is_file() for name in formats.file_names()):
        raise UsageError(f"{entry.name}: not an adapter on this disk; nothing deleted")
    if (cached := _cached_revision(path)) is not None:
        return _plan_revision(entry.name, path, *cached)
    if path.is_symlink():
        raise UsageError(f"{path}: a link to {os.path.realpath(path)}; delete the adapter there")
    _refuse_others(path)
    names = sorted(os.listdir(path))
    if (path / ".git").exists():
        raise UsageError(f"{path}: a git repository; delete it manually")
    if model := next((name for name in names if MODEL.fullmatch(name) and name not in owned_names()), None):
        raise UsageError(f"{path}: contains a model as well ({model}); delete the adapter's files manually")
    own = [name for name in owned_names() if name in names]
    for name in own:
        if (path / name).is_symlink() or not (path / name).is_file():
            raise UsageError(f"{path / name}: a link, or not a regular file; nothing deleted, delete it manually")
    files = tuple((path / name, (path / name).stat().st_size) for name in own)
    return Removal(entry.name, path, path, files, tuple(name for name in names if name not in own))


def remove(plan: Removal) -> Removal:
    """Delete exactly the files in `plan`; returns the plan as carried out.

    Raises AdapterkitError if the folder has changed since it was planned, or if a file cannot be deleted.
    """
    if plan_removal(AdapterEntry(plan.name, plan.path, "here")) != plan:
        raise AdapterkitError(f"{plan.path}: changed since the deletion was planned; nothing deleted, try again")
    if plan.revision is not None:
        return _remove_revision(plan, plan.folder / "snapshots" / plan.revision)
    for done, (file, _) in enumerate(plan.files):
        try:
            file.unlink()
        except OSError as error:
            raise AdapterkitError(
                f"{file}: cannot be deleted ({error.strerror}); {done} of {len(plan.files)} files deleted"
            ) from error
    if plan.remaining:
        return plan
    try:
        plan.folder.rmdir()
    except OSError as error:  # the parent is read-only, or a file was added
        return replace(plan, remaining=(f"the folder ({error.strerror})",))
    return plan


# --- parts -----------------------------------------------------------------------------------------------------------


def _refuse_others(path: Path) -> None:
    """Raise UsageError if there are other adapters below `path`."""
    folders = [folder for folder in adapter_folders(path) if isinstance(folder, Path) and folder != path]
    if folders:
        others = _abbreviated([str(folder.relative_to(path)) for folder in folders])
        raise UsageError(f"{path}: contains other adapters ({others}); delete those first")


def _abbreviated(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cached_revision(path: Path) -> tuple[Path, str] | None:
    """The repository's folder and the commit, if `path` is in the Hub cache."""
    cache, real = Path(os.path.realpath(hub_cache())), Path(os.path.realpath(path))
    if not real.is_relative_to(cache):
        return None
    parts = real.relative_to(cache).parts
    if len(parts) < 3 or not parts[0].startswith("models--") or parts[1] != "snapshots":
        return None
    return cache / parts[0], parts[2]


def _plan_revision(name: str, path: Path, repo: Path, commit: str) -> Removal:
    """Plan the deletion of a cached revision, with the blobs that no other revision uses."""
    snapshot = repo / "snapshots" / commit
    adapters = [str(folder.relative_to(snapshot)) for folder in adapter_folders(snapshot) if isinstance(folder, Path)]
    if len(adapters) > 1:
        raise UsageError(f"{name}: its revision contains several adapters ({_abbreviated(adapters)}); nothing deleted")
    strategy = _strategy(repo, commit)
    all_files = (file for file in repo.rglob("*") if file.is_file() and not file.is_symlink())
    files = tuple((file, file.stat().st_size) for file in sorted(all_files if strategy.repos else strategy.blobs))
    return Removal(name, path, repo, files, revision=commit, whole_repo=bool(strategy.repos))


def _strategy(repo: Path, commit: str) -> DeleteCacheStrategy:
    """The client's plan to delete a revision of this repository only: another may have the same commit."""
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(repo.parent)
    repos = frozenset(found for found in cache.repos if Path(os.path.realpath(found.repo_path)) == repo)
    if not any(revision.commit_hash == commit for found in repos for revision in found.revisions):
        raise AdapterkitError(f"{repo}: the Hub client cannot find revision {commit}; nothing deleted")
    return replace(cache, repos=repos).delete_revisions(commit)


def _remove_revision(plan: Removal, snapshot: Path) -> Removal:
    """Let the client delete a revision, and check that it did: it only warns where it cannot delete."""
    _strategy(plan.folder, snapshot.name).execute()
    left = [file for file in (snapshot, *(file for file, _ in plan.files)) if os.path.lexists(file)]
    if left:
        raise AdapterkitError(f"{left[0]}: could not be deleted; {len(left)} of {len(plan.files) + 1} files left")
    return plan
