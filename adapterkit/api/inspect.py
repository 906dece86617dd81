"""What `import adapterkit` offers to look at adapters and bases, and to find them.

>>> adapterkit.inspect("adapter", against="base").match.missing
>>> adapterkit.inspect("org/adapter")  # on the Hub: headers alone, some kilobytes
>>> [found.name for found in adapterkit.list_adapters("adapters", sort="rank")]
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from adapterkit.adapter.formats import load
from adapterkit.adapter.weights import Adapter
from adapterkit.api.inputs import check_strength, open_base
from adapterkit.api.options.inspection import InspectOptions, ListOptions
from adapterkit.api.progress import downloads_shown, progress_bar
from adapterkit.base.checkpoint import is_adapter, is_base, open_checkpoint
from adapterkit.base.quant import shapes_need_values
from adapterkit.errors import AdapterkitError, FormatError, MissingFileError, UnknownStrengthError, UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub.adapter_listing import AdapterEntry, add_details, list_cache, list_folders, list_hub, sorted_entries
from adapterkit.hub.locate import Location, locate
from adapterkit.inspection.base_summary import inventory, unsupported
from adapterkit.inspection.module_rows import header_rows, measure
from adapterkit.inspection.report import AdapterReport, BaseReport, ModuleMeasured, Outlined
from adapterkit.options import takes

if TYPE_CHECKING:
    from adapterkit.inspection.match import Match

Report: TypeAlias = AdapterReport | BaseReport
BaseNorms: TypeAlias = Callable[[], Iterator[tuple[str, float]]]


@takes(InspectOptions)
def inspect(o: InspectOptions) -> Report:
    """Look at an adapter, or a base: what its headers say and, where its weights are here, its norms and ranks.

    What is on the Hub and not in its cache is not downloaded: headers and configs are read, some kilobytes.

    Returns:
        An `AdapterReport`, or of a base a `BaseReport`.

    Raises:
        FormatError: it is neither an adapter nor a base, or broken.
        UsageError: options that do not go together, or that are about adapters where it is a base.
        FitError: a module is found in the base, and has another shape.
    """
    with downloads_shown(o.progress), progress_bar("measuring", "modules", o.progress) as show:
        for event in inspecting(o):
            if isinstance(event, ModuleMeasured):
                show(event.done, event.total, event.what)
            else:
                report = event
    return report


def inspecting(o: InspectOptions) -> Generator[ModuleMeasured | Report, None, None]:
    """Yield what headers tell; then, where weights are read, each module as it is measured, and the whole report."""
    with ExitStack() as outlines:
        name, adapter, place = "adapter", o.adapter, Location(Path(), "local")
        check_strength([adapter], o.alpha, o.scaling)
        if not isinstance(adapter, Adapter):
            name, place = str(adapter), locate(adapter, None if o.full else outlines)
            if is_base(place.path):
                yield _base_report(o, name, place)
                return
        base = None if o.against is None else locate(o.against, None if o.full else outlines)
        opened, unknown = (adapter, None) if isinstance(adapter, Adapter) else _open(place.path, o.alpha, o.scaling)
        found, norms = _match(opened, base, str(o.against)) if base else (None, None)
        known = unknown is None
        summary = opened.summary()
        report = AdapterReport(
            name, summary if known else replace(summary, alphas=(), scalings=()),
            tuple(header_rows(opened, strength_known=known)), False, found, unknown, _outlined(place),
        )  # fmt: skip
        header_only = o.header_only or place.headers_only
        if not header_only:
            check_cached(opened.files)
        yield report
        if header_only:
            return
        base_norms, total, rows = {}, len(report.modules), []
        if norms is not None and found is not None:
            for module, norm in norms():
                base_norms[module] = norm
                yield ModuleMeasured("reading the base", len(base_norms), found.found)
        for row in measure(opened, strength_known=known, base_norms=base_norms):
            rows.append(row)
            yield ModuleMeasured("measuring", len(rows), total)
        yield replace(report, modules=tuple(rows), measured=True)


@takes(ListOptions)
def list_adapters(o: ListOptions) -> list[AdapterEntry]:
    """List the adapters in folders and below, in the Hub cache and, with `hub`, on the Hub, from headers and configs.

    Returns:
        A row for each; `problem` says what is wrong with it.

    Raises:
        MissingFileError: there is no such folder.
        OfflineError: the Hub cannot be reached.
    """
    with downloads_shown(o.progress):
        rows, failed = find_adapters(o)
    if failed is not None:
        raise failed
    return rows


def find_adapters(o: ListOptions) -> tuple[list[AdapterEntry], AdapterkitError | None]:
    """The rows that were found, and why those of the Hub are not among them."""
    folders = [o.folders] if isinstance(o.folders, str | os.PathLike) else list(o.folders)
    for folder in folders:
        if not os.path.isdir(folder):
            raise MissingFileError(f"{folder}: no such folder")
    here = itertools.chain(list_folders(folders or ["."]), list_cache())
    rows = sorted_entries((row for row in here if row.matches(o.base, o.search)), o.sort or "name")
    if not o.hub:
        return rows, None
    try:
        there = list(itertools.islice(list_hub(o.base, o.search, o.sort or "trending"), o.limit))
        return rows + (add_details(there) if o.details else there), None
    except AdapterkitError as error:
        return rows, error


def _base_report(o: InspectOptions, name: str, place: Location) -> BaseReport:
    asked = {"against": o.against, "alpha": o.alpha, "scaling": o.scaling}
    if wrong := next((name for name, value in asked.items() if value), None):
        swapped = o.against is not None and is_adapter(Path(os.path.expanduser(o.against)))
        hint = f"{o.against} is an adapter: swap the two" if swapped else ""
        raise UsageError(f"{name}: is a base model, and `{wrong}` is about adapters", hint=hint)
    checkpoint = open_checkpoint(place.path)
    if place.headers_only and shapes_need_values(checkpoint.tensors):
        raise FormatError(
            f"{name}: how its weights are quantized stands among the weights, not in a header", hint="say `full=True`"
        )
    rows = inventory(checkpoint)
    return BaseReport(
        name, str(checkpoint.config.get("model_type", "not named")), len(checkpoint.shards),
        sum(shard.size for shard in checkpoint.shards), checkpoint.quantization, rows, unsupported(checkpoint, rows),
        _outlined(place),
    )  # fmt: skip


def _outlined(place: Location) -> Outlined | None:
    return None if place.fetched is None else Outlined(place.fetched, place.size)


def _open(where: Path, alpha: float | None, scaling: float | None) -> tuple[Adapter, str | None]:
    """The adapter, and why its strength is unknown, if it is: B·A can be shown without."""
    try:
        return load(where, alpha=alpha, scaling=scaling), None
    except UnknownStrengthError as error:
        return load(where, scaling=1.0), error.reason


def _match(adapter: Adapter, base: Location, name: str) -> tuple[Match, BaseNorms | None]:
    """How `adapter` fits `base`, called `name`, by headers; and what reads ‖W‖_F by module, where weights are there."""
    from adapterkit.inspection.match import base_norms, match, with_rows

    checkpoint = open_base(name, lambda _: base.path)
    found, places = match(adapter, checkpoint, name)
    if not base.headers_only:
        found = with_rows(found, adapter, checkpoint)

    def norms() -> Iterator[tuple[str, float]]:
        check_cached(shard.file for shard in checkpoint.shards)
        return base_norms(places, checkpoint)

    return found, None if base.headers_only else norms
