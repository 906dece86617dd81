"""Gather the details of an adapter, independent of widgets; these functions run in threads."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from adapterkit.adapter.formats import load
from adapterkit.adapter.formats.table import find_weights, read_config
from adapterkit.adapter.summary import Summary
from adapterkit.errors import AdapterkitError
from adapterkit.files.opening import open_regular
from adapterkit.hub.adapter_listing import AdapterEntry, adapter_folders, describe
from adapterkit.hub.locate import locate
from adapterkit.inspection.module_rows import ModuleRow
from adapterkit.text import counted, size, span, visible_lines

TEXT_BYTES = 200_000  # maximum shown of a card or config


@dataclass(frozen=True)
class Details:
    """An adapter's headers, config and card; `problem` if it cannot be read."""

    row: AdapterEntry
    summary: Summary | None = None
    fit: str = ""
    other_base: str | None = None  # a warning if it was made for other weights
    config: dict[str, Any] = field(default_factory=dict)
    card: str = ""
    fetched: str = ""
    problem: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """The rows of the overview."""
        row, summary = self.row, self.summary
        facts = {"adapter": row.name}
        if summary is not None:
            layers = summary.layers
            facts |= {
                "kind": f"{summary.format}, {summary.kind}", "base": summary.base_model or "unknown",
                "fits": self.fit, "rank": span(summary.ranks), "alpha": span(summary.alphas),
                "scaling": span(summary.scalings) or "unknown (no alpha in the config)",
                "targets": ", ".join(summary.targets),
                "layers": f"{layers[0]}–{layers[-1]} ({len(layers)})" if layers else "",
                "modules": str(summary.modules), "parameters": f"{summary.parameters:,}",
                "size": f"{size(summary.bytes)}, {', '.join(summary.dtypes)}",
                "replaced": ", ".join(summary.replaced),
            }  # fmt: skip
        else:
            facts |= {"base": row.base_model or ""}
        facts |= {
            "downloads": "" if row.downloads is None else f"{row.downloads:,}",
            "likes": "" if row.likes is None else str(row.likes), "fetched": self.fetched,
        }  # fmt: skip
        return {name: text for name, text in facts.items() if text}

    @property
    def warnings(self) -> list[str]:
        """The problems of the adapter."""
        problems = [self.problem] if self.problem else []
        if self.summary is not None:
            found = ((f"{one['where']}: {one['what']}", one["remedy"]) for one in self.summary.problems)
            problems += ["; ".join(filter(None, lines)) for lines in found]
        if self.other_base:
            problems.append(self.other_base)
        return problems


def details_of(row: AdapterEntry, base: str) -> Details:
    """Read an adapter from this disk, or its headers from the Hub, and match it with `base` if given."""
    if row.path is not None and not row.path.is_dir():
        return Details(row, problem=row.problem or "no longer there; press r to refresh")
    try:
        if row.path is not None:
            return _read(row, row.path, base, "")
        with ExitStack() as outlines:
            place = locate(row.name, outlines)
            some = "" if place.fetched is None else f"{size(place.fetched)} of {size(place.size)}: headers and config"
            return _read(row, place.path, base, some)
    except (AdapterkitError, OSError) as error:
        return Details(row, problem=str(error))


def row_of(details: Details) -> AdapterEntry:
    """The table row, updated from the details."""
    row, summary = details.row, details.summary
    if summary is None:
        return row
    return replace(
        row, kind=summary.kind, ranks=summary.ranks, alphas=summary.alphas, targets=summary.targets,
        size=row.size or summary.bytes, base_model=row.base_model or summary.base_model,
    )  # fmt: skip


def rows_of(row: AdapterEntry, stop: Callable[[], bool]) -> list[ModuleRow] | str:
    """The measured modules of an adapter on this disk, or the reason why there are none."""
    from adapterkit.inspection.cache import measured

    if row.path is None:
        return "The weights are on the Hub; download the adapter (d) to see them."
    try:
        return measured(load(row.path), stop)
    except (AdapterkitError, OSError) as error:
        return str(error)


def _read(row: AdapterEntry, path: Path, base: str, fetched: str) -> Details:
    card = _text(path / "README.md") if row.path is not None else ""
    config = read_config(path)
    if row.state == "partial":
        return Details(row, config=config, card=card, problem=row.problem or "some weights are missing")
    adapter = load(path)
    return Details(row, adapter.summary(), *_fit(adapter, base), config, card, fetched)


def _fit(adapter: Any, base: str) -> tuple[str, str | None]:
    """How many modules match the base, and a warning if the adapter was made for other weights."""
    if not base:
        return "", None
    from adapterkit.base.checkpoint import open_checkpoint
    from adapterkit.inspection.match import match, with_rows

    try:
        with ExitStack() as outlines:
            place = locate(base, outlines)
            checkpoint = open_checkpoint(place.path)
            found, _ = match(adapter, checkpoint, base)
            found = found if place.headers_only else with_rows(found, adapter, checkpoint)
    except (AdapterkitError, OSError) as error:
        return f"cannot read {base}: {error}", None
    hint = f"; {found.hint}" if found.missing else ""
    rows = f", {found.rows}" if found.rows else ""
    other = found.rows.note(base) if found.rows else None
    return f"{found.found} of {counted(found.total, 'target')} found in {base}{hint}{rows}", other


def _text(file: Path) -> str:
    try:
        with TextIOWrapper(open_regular(file), "utf-8", "replace") as stream:
            return stream.read(TEXT_BYTES)
    except (AdapterkitError, OSError):
        return ""


def config_text(config: dict[str, Any]) -> str:
    """A config as indented JSON; an empty string if there is none."""
    return "" if not config else visible_lines(json.dumps(config, indent=2, ensure_ascii=False)[:TEXT_BYTES])


def changes(folder: Path, known: dict[str, float | None]) -> tuple[list[AdapterEntry], list[str]]:
    """The adapters below `folder` that are new or changed since `known`, and the names of those removed."""
    present: dict[str, float | None] = {}
    for path in adapter_folders(folder):
        if isinstance(path, AdapterEntry):  # a folder that cannot be read
            present[path.name] = path.modified
        else:
            weights = find_weights(path)
            present[str(path)] = weights.stat().st_mtime if weights else None
    new = [describe(Path(name)) for name, modified in present.items() if known.get(name, -1.0) != modified]
    return new, [name for name in known if name not in present]
