"""An adapter deleted from this disk: what that removes, which is shown before, and nothing else."""

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
from adapterkit.hub.listing import Found, folders_below
from adapterkit.hub.names import hub_cache
from adapterkit.text import counted, size, visible

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

# The files that tools write beside an adapter's weights and config.
BESIDE = (
    ADAPTER_RECORD, TRAINING_RECORD, "adapterkit_recipe.yaml", "metrics.jsonl",
    "README.md",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth",
)  # fmt: skip
MODEL = re.compile(r"config\.json|(model|pytorch_model|consolidated).*\.(safetensors|bin|pth|json)|.*\.gguf")


def own_names() -> tuple[str, ...]:
    """The names of an adapter's files, its weights first, without which it is none."""
    return *formats.file_names(), *BESIDE


@dataclass(frozen=True)
class Removal:
    """What deleting an adapter removes: files with their sizes, the folder too where nothing `stays` in it."""

    name: str
    path: Path  # of the adapter
    folder: Path
    files: tuple[tuple[Path, int], ...]
    stays: tuple[str, ...] = ()
    revision: str | None = None  # of a repository in the Hub cache; `folder` is then that of the repository
    whole: bool = False  # whether it is the only one there, with which the repository goes

    @property
    def bytes(self) -> int:
        """What becomes free."""
        return sum(size for _, size in self.files)

    @property
    def lines(self) -> Iterator[str]:
        """What is removed, for people."""
        where, many = visible(str(self.folder)), f"{counted(len(self.files), 'file')}, {size(self.bytes)}"
        if self.revision is not None:
            what = "the whole repository" if self.whole else f"revision {self.revision[:10]}"
            yield f"{where}: {what} in the Hub cache, {many}"
            return
        yield f"{where}: {many}"
        yield from (f"  {file.name}  {size(count)}" for file, count in self.files)
        if self.stays:
            yield f"The folder stays, with {visible(_few(self.stays))}."
        else:
            yield "The folder goes too: nothing else is in it."


def plan_removal(row: Found) -> Removal:
    """What deleting the adapter `row` removes: its own files in its folder, or its revision in the Hub cache.

    Raises UsageError where it is none on this disk, or where deleting it would reach something else: a link, a model or
    a git repository in the same folder, other adapters below it or in the same revision.
    """
    path = row.path
    if path is None or not any((path / name).is_file() for name in formats.file_names()):
        raise UsageError(f"{row.name}: is no adapter on this disk; nothing was removed")
    if (cached := _in_cache(path)) is not None:
        return _of_revision(row.name, path, *cached)
    if path.is_symlink():
        raise UsageError(f"{path}: is a link to {os.path.realpath(path)}; delete the adapter there")
    _refuse_others(path)
    names = sorted(os.listdir(path))
    if (path / ".git").exists():
        raise UsageError(f"{path}: is a git repository; delete it by hand")
    if model := next((name for name in names if MODEL.fullmatch(name) and name not in own_names()), None):
        raise UsageError(f"{path}: holds a model as well ({model}); delete the adapter's files by hand")
    own = [name for name in own_names() if name in names]
    for name in own:
        if (path / name).is_symlink() or not (path / name).is_file():
            raise UsageError(f"{path / name}: is a link, or no file; nothing was removed, delete it by hand")
    files = tuple((path / name, (path / name).stat().st_size) for name in own)
    return Removal(row.name, path, path, files, tuple(name for name in names if name not in own))


def remove(plan: Removal) -> Removal:
    """Remove just what `plan` says; returns what was removed.

    Raises AdapterkitError where something else is there by now, or where a file cannot be removed.
    """
    if plan_removal(Found(plan.name, plan.path, "here")) != plan:
        raise AdapterkitError(f"{plan.path}: has changed since it was looked at; nothing was removed, look again")
    if plan.revision is not None:
        return _remove_revision(plan, plan.folder / "snapshots" / plan.revision)
    for done, (file, _) in enumerate(plan.files):
        try:
            file.unlink()
        except OSError as error:
            raise AdapterkitError(
                f"{file}: cannot be removed ({error.strerror}); {done} of {len(plan.files)} files were"
            ) from error
    if plan.stays:
        return plan
    try:
        plan.folder.rmdir()
    except OSError as error:  # the folder above may not be written, or something has come
        return replace(plan, stays=(f"the folder ({error.strerror})",))
    return plan


# --- parts -----------------------------------------------------------------------------------------------------------


def _refuse_others(path: Path) -> None:
    """Raise UsageError where other adapters lie below `path`."""
    others = [str(one.relative_to(path)) for one in folders_below(path) if isinstance(one, Path) and one != path]
    if others:
        raise UsageError(f"{path}: holds other adapters ({_few(others)}); delete those first")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_cache(path: Path) -> tuple[Path, str] | None:
    """The folder of the repository and the commit where `path` lies in the Hub cache."""
    cache, real = Path(os.path.realpath(hub_cache())), Path(os.path.realpath(path))
    if not real.is_relative_to(cache):
        return None
    parts = real.relative_to(cache).parts
    if len(parts) < 3 or not parts[0].startswith("models--") or parts[1] != "snapshots":
        return None
    return cache / parts[0], parts[2]


def _of_revision(name: str, path: Path, repo: Path, commit: str) -> Removal:
    """What the client removes of a revision: files that no other revision has, too."""
    snapshot = repo / "snapshots" / commit
    adapters = [str(one.relative_to(snapshot)) for one in folders_below(snapshot) if isinstance(one, Path)]
    if len(adapters) > 1:
        raise UsageError(f"{name}: its revision holds {_few(adapters)}, which would go with it; nothing was removed")
    strategy = _strategy(repo, commit)
    whole = (file for file in repo.rglob("*") if file.is_file() and not file.is_symlink())
    files = tuple((file, file.stat().st_size) for file in sorted(whole if strategy.repos else strategy.blobs))
    return Removal(name, path, repo, files, revision=commit, whole=bool(strategy.repos))


def _strategy(repo: Path, commit: str) -> DeleteCacheStrategy:
    """How the client deletes the revision of this repository: another one may have a commit of the same name."""
    from huggingface_hub import scan_cache_dir

    found = scan_cache_dir(repo.parent)
    here = frozenset(one for one in found.repos if Path(os.path.realpath(one.repo_path)) == repo)
    if not any(revision.commit_hash == commit for one in here for revision in one.revisions):
        raise AdapterkitError(f"{repo}: the Hub client does not know its revision {commit}; nothing was removed")
    return replace(found, repos=here).delete_revisions(commit)


def _remove_revision(plan: Removal, snapshot: Path) -> Removal:
    """Let the client remove a revision, and see whether it did: it only warns of what it cannot remove."""
    _strategy(plan.folder, snapshot.name).execute()
    left = [file for file in (snapshot, *(file for file, _ in plan.files)) if os.path.lexists(file)]
    if left:
        raise AdapterkitError(f"{left[0]}: could not be removed; {len(left)} of {len(plan.files) + 1} are still there")
    return plan
