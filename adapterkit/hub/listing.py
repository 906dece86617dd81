"""Which adapters there are: in folders, in the Hub cache, on the Hub; a row each, from headers and configs alone."""

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
from adapterkit.hub.client.ask import WAITS, ask
from adapterkit.hub.client.parallel import parallel_map
from adapterkit.hub.download import cached
from adapterkit.hub.names import HubId, hub_cache, parsed
from adapterkit.hub.remote import outlined, remote_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

THREADS = 1  # beside the one that walks: parsing holds the interpreter, and more of them only wait for each other
AHEAD = 16  # adapters
REQUESTS = 8  # at a time
PAGE = 50  # rows that the Hub sends at a time
BITS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}

State = Literal["here", "partial", "remote"]


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter that was found; what is not known is None or empty, and `problem` says what is wrong with it."""

    name: str  # a path, or a Hub id
    path: Path | None  # where it lies on this disk
    state: State
    kind: str | None = None
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    size: int | None = None  # bytes of the tensors; of the file where it is not opened
    base_model: str | None = None
    modified: float | None = None  # seconds since 1970
    downloads: int | None = None
    likes: int | None = None
    gated: bool = False
    problem: str | None = None

    def matches(self, base: str | None, words: str) -> bool:
        """Whether it is one of `base`, and all `words` are in what is shown of it."""
        text = " ".join([self.name, self.base_model or "", *self.targets]).lower()
        return (base is None or _same_base(base, self.base_model)) and all(
            word in text for word in words.lower().split()
        )


# What rows are sorted by, and their key: the first is the greatest, names are in order, unknown is last.
SORTS: dict[str, Callable[[Found], Any]] = {
    "name": lambda row: row.name.lower(),
    "rank": lambda row: (not row.ranks, -max(row.ranks, default=0)),
    "size": lambda row: -(row.size or -1),
    "modified": lambda row: -(row.modified or 0),
    "downloads": lambda row: -(-1 if row.downloads is None else row.downloads),
    "likes": lambda row: -(-1 if row.likes is None else row.likes),
}
# The same of the Hub, which sorts itself; it knows no ranks.
HUB_SORTS = {"modified": "last_modified", "downloads": "downloads", "likes": "likes", "trending": "trending_score"}


def in_folders(folders: Iterable[str | os.PathLike[str]]) -> Iterator[Found]:
    """The adapters below `folders`, in the order of their names; unreadable folders are rows with a problem."""
    for folder in folders:
        yield from _described(folders_below(Path(folder)))


def in_cache() -> Iterator[Found]:
    """The adapters in the Hub cache: of every repository all revisions that are there, and their folders."""
    for repo in sorted(hub_cache().glob("models--*--*")):
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        revisions = {
            read_whole(file, 1000).decode(errors="replace").strip(): file.name
            for file in sorted(repo.glob("refs/*"))
            if os.path.isfile(file)
        }
        for snapshot in sorted(repo.glob("snapshots/*")):
            revision = revisions.get(snapshot.name, snapshot.name)
            for row in _described(folders_below(snapshot)):
                inner = "" if row.path in (None, snapshot) else str(Path(row.name).relative_to(snapshot))
                id = HubId(name, None if revision == "main" else revision, inner)
                yield replace(row, name=str(id))


def on_the_hub(base: str | None, search: str, sort: str = "trending") -> Iterator[Found]:
    """The adapters on the Hub, for `base` where it is given, in pages as they are asked for.

    Raises OfflineError and what else `client.ask` does.
    """
    libraries = dict.fromkeys(format.LIBRARY for format in formats.FORMATS)
    lists = [_of_library(library, base, search, sort) for library in libraries]
    known: set[str] = set()
    for row in heapq.merge(*lists, key=partial(_rank_on_hub, sort)):
        if row.id not in known:
            known.add(row.id)
            yield _of_hub(row)


def _of_library(library: str, base: str | None, search: str, sort: str) -> Iterator[ModelInfo]:
    """What the Hub lists of the adapters of one library, in its order."""
    tags = [library, *([f"base_model:adapter:{base}"] if base else [])]
    shown: Any = ["downloads", "likes", "tags", "lastModified", "gated", "cardData", "safetensors", "trendingScore"]
    about = base or "adapters"
    known: set[str] = set()

    def begun(api: HfApi) -> tuple[list[ModelInfo], Iterator[ModelInfo]]:
        rows = iter(api.list_models(filter=tags, search=search or None, sort=HUB_SORTS[sort], expand=shown))  # type: ignore[arg-type]
        return list(itertools.islice(rows, PAGE)), rows

    rows, rest = ask(about, begun, WAITS[:1])  # newer clients ask for pages again and again themselves
    while rows:
        new = {row.id: row for row in rows if row.id not in known}
        if not new:
            raise AdapterkitError(f"{about}: the Hub lists the same adapters again and again")
        yield from new.values()
        known.update(new)
        rows = ask(about, lambda _: list(itertools.islice(rest, PAGE)), ())


def describe(path: Path) -> Found:
    """The row of the adapter in the folder `path`."""
    row = Found(str(path), path, "here")
    try:
        weights = formats.find_weights(path)
        if weights is not None:
            facts = weights.stat()
            row = replace(row, size=facts.st_size, modified=facts.st_mtime)
        if weights is None or weights.name in formats.pickled_names():  # what is pickled is not opened to be listed
            return _by_config(row, path, weights)
        summary = load(path).summary()
    except (AdapterkitError, OSError) as error:
        return replace(row, problem=str(error).removeprefix(f"{path}/").removeprefix(f"{path}: "))
    problem = next((str(one["what"]) for one in summary.problems if one["fatal"]), None)
    return replace(
        row, kind=summary.kind, ranks=summary.ranks, alphas=summary.alphas, targets=summary.targets,
        size=summary.bytes, base_model=summary.base_model, problem=problem,
    )  # fmt: skip


def with_details(rows: Sequence[Found]) -> list[Found]:
    """The rows of the Hub with what their headers tell, some requests for each; what cannot be read has a problem."""

    def detailed(row: Found) -> Found:
        id = parsed(row.name)
        if row.path is not None or id is None:
            return row
        try:
            with outlined(remote_of(id)) as outline:
                found = describe(outline.path)
        except AdapterkitError as error:
            return replace(row, problem=str(error).removeprefix(f"{row.name}: "))
        return replace(
            row, kind=found.kind, ranks=found.ranks, alphas=found.alphas, targets=found.targets, size=found.size,
            problem=found.problem,
        )  # fmt: skip

    return parallel_map(detailed, rows, REQUESTS)


def ordered(rows: Iterable[Found], sort: str) -> list[Found]:
    """The rows in the order of `sort`, then of their names."""
    return sorted(sorted(rows, key=SORTS["name"]), key=SORTS.get(sort, SORTS["name"]))


# --- parts -----------------------------------------------------------------------------------------------------------


def folders_below(folder: Path) -> Iterator[Path | Found]:
    """The folders at and below `folder` that hold an adapter, and rows for what cannot be read."""
    unread: list[OSError] = []
    if not os.path.isdir(folder):
        yield Found(str(folder), folder, "here", problem="there is no such folder")
        return
    for at, inner, names in os.walk(folder, onerror=unread.append):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        while unread:
            error = unread.pop()
            yield Found(str(error.filename), Path(error.filename), "here", problem=f"cannot be read: {error.strerror}")
        if formats.has_adapter_file(names):
            yield Path(at)
    for error in unread:
        yield Found(str(error.filename), Path(error.filename), "here", problem=f"cannot be read: {error.strerror}")


def _described(found: Iterable[Path | Found]) -> Iterator[Found]:
    """The rows of folders in their order, some of which are read ahead: a disk may take its time."""
    ahead: deque[Found | Future[Found]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for one in found:
            ahead.append(one if isinstance(one, Found) else threads.submit(describe, one))
            if len(ahead) > AHEAD:
                yield _waited(ahead.popleft())
        while ahead:
            yield _waited(ahead.popleft())


def _waited(one: Found | Future[Found]) -> Found:
    return one.result() if isinstance(one, Future) else one


def _by_config(row: Found, path: Path, weights: Path | None) -> Found:
    """What the config alone tells, where the weights are not there or are not opened."""
    facts = formats.describe_config(path)
    return replace(
        row, state="here" if weights else "partial", kind=facts.kind, ranks=facts.ranks, alphas=facts.alphas,
        targets=facts.targets, base_model=facts.base_model, problem=None if weights else "its weights are not there",
    )  # fmt: skip


def _of_hub(info: ModelInfo) -> Found:
    tags = info.tags or []
    base = next((tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:adapter:")), None)
    parameters = info.safetensors.parameters if info.safetensors else {}
    id = parsed(info.id)
    path = cached(id) if id is not None else None
    row = describe(path) if path else Found("", None, "remote", kind="DoRA" if "dora" in tags else None)
    size = sum(BITS.get(dtype, 4) * count for dtype, count in parameters.items()) or None
    return replace(
        row, name=info.id, base_model=base or row.base_model, size=row.size or size,
        modified=info.last_modified.timestamp() if info.last_modified else None,
        downloads=_count(info.downloads), likes=_count(info.likes), gated=bool(info.gated),
    )  # fmt: skip


def _rank_on_hub(sort: str, info: ModelInfo) -> float:
    """What the Hub sorts by, the greatest first."""
    value = getattr(info, HUB_SORTS[sort])
    return -(value.timestamp() if isinstance(value, datetime) else _count(value) or 0)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _same_base(asked: str, base: str | None) -> bool:
    """Whether an adapter's base is the one asked for, by its whole name or, where that is a path, its last part."""
    if base is None:
        return False
    asked, base = asked.rstrip("/").lower(), base.rstrip("/").lower()
    local = base.count("/") != 1 or asked.count("/") != 1
    return asked == base or (local and asked.rpartition("/")[2] == base.rpartition("/")[2])
