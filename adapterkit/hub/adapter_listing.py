"""List adapters in folders, the Hub cache and the Hub, from headers and configs alone."""

from __future__ import annotations

import heapq
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterkit.adapter.formats import load
from adapterkit.adapter.formats import table as formats
from adapterkit.errors import AdapterkitError
from adapterkit.files.opening import read_whole
from adapterkit.hub.client.call import RETRY_WAITS, call_hub
from adapterkit.hub.client.parallel import parallel_map
from adapterkit.hub.download import cached_folder
from adapterkit.hub.names import HubId, hub_cache, parse_hub_id
from adapterkit.hub.remote import fetch_headers, find_remote
from adapterkit.reprs import Displayed
from adapterkit.text import span

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

THREADS = 1  # beside the one that walks folders: parsing holds the GIL, so that more of them would only wait
READ_AHEAD = 16  # adapters
PARALLEL_REQUESTS = 8  # in parallel
PAGE = 50  # results
BITS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}

State = Literal["here", "partial", "remote"]


@dataclass(frozen=True, slots=True, repr=False)
class AdapterEntry(Displayed):
    """An adapter in a listing. Unknown facts are None or empty; `problem` is the error for a broken one."""

    name: str  # a path, or a Hub id
    path: Path | None  # its folder on this disk
    state: State
    kind: str | None = None
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    size: int | None = None  # bytes of the tensors, or of a file that is not opened
    base_model: str | None = None
    modified: float | None = None  # seconds since 1970
    downloads: int | None = None
    likes: int | None = None
    gated: bool = False
    problem: str | None = None

    def brief(self) -> str:
        facts = (self.kind, f"rank {span(self.ranks)}" if self.ranks else "", ", ".join(self.targets), self.problem)
        return f"{self.name}: {', '.join(filter(None, facts)) or self.state}"

    def matches(self, base: str | None, words: str) -> bool:
        """Whether the adapter is for `base`, and its name, base or targets contain all `words`."""
        text = " ".join([self.name, self.base_model or "", *self.targets]).lower()
        return (base is None or _same_base(base, self.base_model)) and all(
            word in text for word in words.lower().split()
        )


# Sort keys: names ascending, numbers descending, unknown ones last.
SORTS: dict[str, Callable[[AdapterEntry], Any]] = {
    "name": lambda entry: entry.name.lower(),
    "rank": lambda entry: (not entry.ranks, -max(entry.ranks, default=0)),
    "size": lambda entry: -(entry.size or -1),
    "modified": lambda entry: -(entry.modified or 0),
    "downloads": lambda entry: -(-1 if entry.downloads is None else entry.downloads),
    "likes": lambda entry: -(-1 if entry.likes is None else entry.likes),
}
# The Hub's own sort keys, which lack the rank.
HUB_SORTS = {"modified": "last_modified", "downloads": "downloads", "likes": "likes", "trending": "trending_score"}


def list_folders(folders: Iterable[str | os.PathLike[str]]) -> Iterator[AdapterEntry]:
    """Yield the adapters at and below `folders`, by name; unreadable folders are entries with a problem."""
    for folder in folders:
        yield from _describe_all(adapter_folders(Path(folder)))


def list_cache() -> Iterator[AdapterEntry]:
    """Yield the adapters in the Hub cache, in all cached revisions and folders of every repository."""
    for repo in sorted(hub_cache().glob("models--*--*")):
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        revisions = {
            read_whole(file, 1000).decode(errors="replace").strip(): file.name
            for file in sorted(repo.glob("refs/*"))
            if os.path.isfile(file)
        }
        for snapshot in sorted(repo.glob("snapshots/*")):
            revision = revisions.get(snapshot.name, snapshot.name)
            for entry in _describe_all(adapter_folders(snapshot)):
                inner = "" if entry.path in (None, snapshot) else str(Path(entry.name).relative_to(snapshot))
                id = HubId(name, None if revision == "main" else revision, inner)
                yield replace(entry, name=str(id))


def list_hub(base: str | None, search: str, sort: str = "trending") -> Iterator[AdapterEntry]:
    """Yield the adapters on the Hub, optionally for `base`, requesting pages as needed.

    Raises OfflineError and the other errors of `call_hub`.
    """
    libraries = dict.fromkeys(format.LIBRARY for format in formats.FORMATS)
    lists = [_list_library(library, base, search, sort) for library in libraries]
    known: set[str] = set()
    for entry in heapq.merge(*lists, key=partial(_hub_sort_key, sort)):
        if entry.id not in known:
            known.add(entry.id)
            yield _hub_entry(entry)


def _list_library(library: str, base: str | None, search: str, sort: str) -> Iterator[ModelInfo]:
    """Yield the adapters of one library, in the Hub's order."""
    tags = [library, *([f"base_model:adapter:{base}"] if base else [])]
    shown: Any = ["downloads", "likes", "tags", "lastModified", "gated", "cardData", "safetensors", "trendingScore"]
    subject = base or "adapters"
    known: set[str] = set()

    def first_page(api: HfApi) -> tuple[list[ModelInfo], Iterator[ModelInfo]]:
        entries = iter(api.list_models(filter=tags, search=search or None, sort=HUB_SORTS[sort], expand=shown))  # type: ignore[arg-type]
        return list(itertools.islice(entries, PAGE)), entries

    entries, rest = call_hub(subject, first_page, RETRY_WAITS[:1])  # newer clients retry pages themselves
    while entries:
        new = {entry.id: entry for entry in entries if entry.id not in known}
        if not new:
            raise AdapterkitError(f"{subject}: the Hub keeps returning the same page of results")
        yield from new.values()
        known.update(new)
        entries = call_hub(subject, lambda _: list(itertools.islice(rest, PAGE)), ())


def describe(path: Path) -> AdapterEntry:
    """The entry of the adapter in the folder `path`."""
    entry = AdapterEntry(str(path), path, "here")
    try:
        weights = formats.find_weights(path)
        if weights is not None:
            facts = weights.stat()
            entry = replace(entry, size=facts.st_size, modified=facts.st_mtime)
        if weights is None or weights.name in formats.pickled_names():  # pickles are not opened for a listing
            return _add_config(entry, path, weights)
        summary = load(path).summary()
    except (AdapterkitError, OSError) as error:
        return replace(entry, problem=str(error).removeprefix(f"{path}/").removeprefix(f"{path}: "))
    problem = next((str(problem["what"]) for problem in summary.problems if problem["fatal"]), None)
    return replace(
        entry, kind=summary.kind, ranks=summary.ranks, alphas=summary.alphas, targets=summary.targets,
        size=summary.bytes, base_model=summary.base_model, problem=problem,
    )  # fmt: skip


def add_details(entries: Sequence[AdapterEntry]) -> list[AdapterEntry]:
    """Add details from the headers to entries on the Hub, with a few requests each; errors become their problem."""

    def detailed(entry: AdapterEntry) -> AdapterEntry:
        id = parse_hub_id(entry.name)
        if entry.path is not None or id is None:
            return entry
        try:
            with fetch_headers(find_remote(id)) as headers:
                found = describe(headers.path)
        except AdapterkitError as error:
            return replace(entry, problem=str(error).removeprefix(f"{entry.name}: "))
        return replace(
            entry, kind=found.kind, ranks=found.ranks, alphas=found.alphas, targets=found.targets, size=found.size,
            problem=found.problem,
        )  # fmt: skip

    return parallel_map(detailed, entries, PARALLEL_REQUESTS)


def sorted_entries(entries: Iterable[AdapterEntry], sort: str) -> list[AdapterEntry]:
    """Sort entries by `sort`, then by name."""
    return sorted(sorted(entries, key=SORTS["name"]), key=SORTS.get(sort, SORTS["name"]))


# --- parts -----------------------------------------------------------------------------------------------------------


def adapter_folders(folder: Path) -> Iterator[Path | AdapterEntry]:
    """Yield the folders with an adapter at and below `folder`, and entries for folders that cannot be read."""
    unread: list[OSError] = []
    if not os.path.isdir(folder):
        yield AdapterEntry(str(folder), folder, "here", problem="no such folder")
        return
    for at, inner, names in os.walk(folder, onerror=unread.append):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        while unread:
            error = unread.pop()
            yield AdapterEntry(
                str(error.filename), Path(error.filename), "here", problem=f"cannot be read: {error.strerror}"
            )
        if formats.has_adapter_file(names):
            yield Path(at)
    for error in unread:
        yield AdapterEntry(
            str(error.filename), Path(error.filename), "here", problem=f"cannot be read: {error.strerror}"
        )


def _describe_all(found: Iterable[Path | AdapterEntry]) -> Iterator[AdapterEntry]:
    """Yield the entries of folders in order, reading some ahead to hide the disk's latency."""
    ahead: deque[AdapterEntry | Future[AdapterEntry]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for folder in found:
            ahead.append(folder if isinstance(folder, AdapterEntry) else threads.submit(describe, folder))
            if len(ahead) > READ_AHEAD:
                yield _result(ahead.popleft())
        while ahead:
            yield _result(ahead.popleft())


def _result(entry: AdapterEntry | Future[AdapterEntry]) -> AdapterEntry:
    return entry.result() if isinstance(entry, Future) else entry


def _add_config(entry: AdapterEntry, path: Path, weights: Path | None) -> AdapterEntry:
    """Add facts from the config alone, for missing and for pickled weights."""
    facts = formats.describe_config(path)
    return replace(
        entry, state="here" if weights else "partial", kind=facts.kind, ranks=facts.ranks, alphas=facts.alphas,
        targets=facts.targets, base_model=facts.base_model, problem=None if weights else "weights are missing",
    )  # fmt: skip


def _hub_entry(info: ModelInfo) -> AdapterEntry:
    tags = info.tags or []
    base = next((tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:adapter:")), None)
    parameters = info.safetensors.parameters if info.safetensors else {}
    id = parse_hub_id(info.id)
    path = cached_folder(id) if id is not None else None
    entry = describe(path) if path else AdapterEntry("", None, "remote", kind="DoRA" if "dora" in tags else None)
    size = sum(BITS.get(dtype, 4) * count for dtype, count in parameters.items()) or None
    return replace(
        entry, name=info.id, base_model=base or entry.base_model, size=entry.size or size,
        modified=info.last_modified.timestamp() if info.last_modified else None,
        downloads=_count(info.downloads), likes=_count(info.likes), gated=bool(info.gated),
    )  # fmt: skip


def _hub_sort_key(sort: str, info: ModelInfo) -> float:
    """The value that the Hub sorts by, negated, to sort it in descending order."""
    value = getattr(info, HUB_SORTS[sort])
    return -(value.timestamp() if isinstance(value, datetime) else _count(value) or 0)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _same_base(asked: str, base: str | None) -> bool:
    """Whether an adapter's base is the given one, compared by its last part where either is a path."""
    if base is None:
        return False
    asked, base = asked.rstrip("/").lower(), base.rstrip("/").lower()
    local = base.count("/") != 1 or asked.count("/") != 1
    return asked == base or (local and asked.rpartition("/")[2] == base.rpartition("/")[2])
