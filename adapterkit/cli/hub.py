"""`adapterkit list`, `adapterkit pull ID…` and `adapterkit push PATH REPO`."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.output import notes_about, say, say_json, say_result
from adapterkit.cli.progress import progress
from adapterkit.cli.tables import padded, width
from adapterkit.errors import AdapterkitError, FormatError, UsageError
from adapterkit.finding import HUB_SORTS, SORTS, Found, in_cache, in_folders, on_the_hub, ordered, with_details
from adapterkit.words import counted, short, size, span, visible

if TYPE_CHECKING:
    from adapterkit.hub.publishing import Push
    from adapterkit.staging import Destination

LIMIT = 30  # rows of the Hub
NAME = "adapter"
CUT, LEAST = ("base", "targets"), 8  # the columns that give way on a narrow terminal, and what is left of them
ON_THE_LEFT = (NAME, "kind", "targets", "base")


@click.command("list")
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path())
@click.option("--hub", is_flag=True, help="What is on the Hub, too.")
@click.option("--base", help="Only adapters of this base: its Hub id, or the last part of its path.")
@click.option("--search", default="", metavar="WORDS", help="Only what has all these words in names or targets.")
@click.option("--sort", type=click.Choice([*SORTS, "trending"]), help="Default: by name, on the Hub what is trending.")
@click.option("--limit", type=click.IntRange(1), default=LIMIT, show_default=True, help="Rows of the Hub.")
@click.option("--details", is_flag=True, help="Read the headers of those on the Hub too: ranks, targets, sizes. Some "
              "requests each, which the Hub counts as downloads.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(
    folders: tuple[str, ...], hub: bool, base: str | None, search: str, sort: str | None, limit: int, details: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show the adapters in the folders DIR and below and in the Hub cache, and with --hub those on the Hub.

    Without DIR, of the current folder. What is read are headers and configs.
    """
    if sort == "trending" and not hub:
        raise UsageError("--sort trending is of the Hub: say --hub")
    if details and not hub:
        raise UsageError("--details is of what is on the Hub: say --hub")
    if hub and sort is not None and sort not in HUB_SORTS:
        raise UsageError(f"the Hub does not sort by {sort}: expected one of {', '.join(HUB_SORTS)}")
    for folder in folders:
        if not os.path.isdir(folder):
            raise FormatError(f"{folder}: there is no such folder")
    here = [one for one in itertools.chain(in_folders(folders or ["."]), in_cache()) if one.matches(base, search)]
    rows, failed = ordered(here, sort or "name"), None
    if hub:
        try:
            there = list(itertools.islice(on_the_hub(base, search, sort or "trending"), limit))
            rows += with_details(there) if details else there
        except AdapterkitError as error:  # told once what is on this disk was shown
            failed = error
    if as_json:
        say_json([asdict(row) | {"path": str(row.path) if row.path else None} for row in rows])
    elif rows:
        _print_rows(_columns(rows), rows)
        for row in rows:
            if row.problem:
                say(f"⚠ {row.name}: {row.problem}")
    elif failed is None:
        say("no adapters found" + ("" if hub else "; --hub looks on the Hub"))
    if failed is not None:
        raise failed


def _print_rows(columns: dict[str, Callable[[Found], str]], rows: list[Found]) -> None:
    """A line for every row: into a pipe as wide as it is, on a terminal with less of what is least asked for.

    Names are whole in any case, to be copied from there; long ones have a line of their own on a terminal.
    """
    from rich.cells import cell_len

    lines = [{name: name for name in columns}]
    lines += [{name: visible(cell(row)) for name, cell in columns.items()} for row in rows]
    widths = {name: max(cell_len(line[name]) for line in lines) for name in columns}
    if sys.stdout.isatty():
        short = (cell_len(line[NAME]) for line in lines if cell_len(line[NAME]) <= width() // 2)
        widths = _fitted(widths | {NAME: max(short)}, width())
    for line in lines:
        if cell_len(line[NAME]) > widths[NAME]:
            say(line[NAME])
            line[NAME] = ""
        texts = (padded(line[name], wide, right=name not in ON_THE_LEFT) for name, wide in widths.items())
        say("  ".join(texts).rstrip())


def _fitted(widths: dict[str, int], room: int) -> dict[str, int]:
    """The widths of columns two spaces apart in `room`: some are cut for that, and left out where it is not enough."""
    for leave_out in (False, True):
        for name in CUT:
            over = sum(widths.values()) + 2 * len(widths) - 2 - room
            if over > 0 and name in widths:
                less = widths[name] - min(over, max(0, widths[name] - LEAST))
                widths = {key: less if key == name else wide for key, wide in widths.items()}
                if leave_out:
                    del widths[name]
    return widths


def _columns(rows: list[Found]) -> dict[str, Callable[[Found], str]]:
    columns: dict[str, Callable[[Found], str]] = {
        NAME: lambda row: f"{'●◐○'[('here', 'partial', 'remote').index(row.state)]} {row.name}",
        "kind": lambda row: "" if row.kind in (None, "LoRA") else str(row.kind),
        "rank": lambda row: span(row.ranks),
        "alpha": lambda row: span(row.alphas),
        "targets": lambda row: short(row.targets),
        "size": lambda row: "" if row.size is None else size(row.size),
        "downloads": lambda row: "" if row.downloads is None else f"{row.downloads:,}",
        "base": lambda row: (row.base_model or "").rpartition("/")[2],
    }
    return {name: cell for name, cell in columns.items() if name == NAME or any(cell(row) for row in rows)}


@click.command("pull")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("-o", "--output", type=click.Path(), help="Copy it to this new folder, besides keeping it in the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_command(ids: tuple[str, ...], output: str | None, dry_run: bool, as_json: bool) -> None:
    """Download adapters or bases: org/name, org/name@revision, org/name:folder.

    Every byte is checked against the Hub's hashes, in the cache too. What was interrupted goes on where it was.
    """
    from adapterkit.hub.fetching import download_of, fetch
    from adapterkit.hub.names import cache_folder, parsed
    from adapterkit.hub.remote import look
    from adapterkit.staging import Destination

    if output is not None and len(ids) != 1:
        raise UsageError("--output is one folder: pull one ID at a time")
    names = [id for text in ids if (id := parsed(text)) is not None]
    if len(names) < len(ids):
        wrong = next(text for text in ids if parsed(text) is None)
        raise FormatError(f"{wrong}: is no name that the Hub allows, expected org/name, with @revision or :folder")
    place = None if output is None else Destination(Path(output), (cache_folder(names[0]),))
    if place is not None:
        place.check()
    downloads = [download_of(look(id), every_byte=True) for id in names]
    facts: list[dict[str, Any]] = []
    for download in downloads:
        remote, count = download.remote, len(download.missing)
        facts.append({"id": str(remote.id), "commit": remote.commit, "bytes": download.to_get, "files": count})
        what = (
            f"{counted(count, 'file')}, {size(download.to_get)} to get"
            if count
            else "all of it is here, every byte checked"
        )
        say(f"{remote.id}: {what}, {size(download.free)} free", err=True)
        if dry_run:
            continue
        with progress(f"getting {remote.id.repo}", in_bytes=True) as show:
            path = fetch(download, show)
        if place is not None:
            path = _copied(path, [file.name for file in remote.files], remote.id.at(""), place)
        facts[-1]["path"] = str(path)
        if not as_json:
            say(str(path))
    if as_json:
        say_json([one | {"notes": notes_about(str(one["id"]))} for one in facts])


def _copied(path: Path, names: list[str], prefix: str, place: Destination) -> Path:
    """The files of a snapshot as a folder of their own."""
    from adapterkit.card import copy_file
    from adapterkit.staging import staged

    with staged(place) as folder:
        for name in (name.removeprefix(prefix) for name in names):
            copy_file(path, name, folder / name)
    return place.out


@click.command("push")
@click.argument("path", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of changing the main branch.")
@click.option("--base-id", metavar="ORG/NAME", help="The base on the Hub, where the adapter names a local path.")
@click.option("--license", help="What the card says of it, such as apache-2.0.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be sent, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push_command(
    path: str, repo: str, private: bool, pr: bool, base_id: str | None, license: str | None, message: str | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Send the folder PATH, of an adapter or a model, to REPO on the Hub in one commit.

    First it is checked that it loads and is finite, that its base is on the Hub, that no byte of any file belongs to a
    secret, nor text to a local path, and that the token may write there. State of training and pickles, whatever their
    names, stay here. The card is completed; what it says already stays. Weights that the Hub has are not sent again.
    """
    from adapterkit.hub.publishing import plan_push, push

    plan = plan_push(Path(path), repo, private=private, pull_request=pr, base_id=base_id, license=license)
    if not as_json:
        _show_push(plan)
    if dry_run:
        if as_json:
            say_result(_push_facts(plan))
        else:
            say("nothing was sent (--dry-run)")
        return
    began = time.perf_counter()
    with progress("sending", in_bytes=True) as show:
        done = push(plan, message, show)
    if as_json:
        say_result(_push_facts(plan) | {"url": done.url, "commit": done.commit})
        return
    if done.commit is None:
        say("nothing had changed, and nothing was sent")
    else:
        say(f"pushed    {size(plan.size)} in {time.perf_counter() - began:.1f} s, commit {done.commit[:10]}")
    say(done.url)


def _show_push(plan: Push) -> None:
    """What goes where, and how each file does."""
    state = f"{'private' if plan.private else 'public'}{'' if plan.exists else ', new'}"
    say(f"sends     {plan.parcel.what}")
    say(f"to        {plan.repo} ({state}{', as a pull request' if plan.pull_request else ''})")
    changed = {upload.name for upload in plan.changed}
    lines = [
        (one.name, size(one.size), one.change if one.name in changed else "unchanged") for one in plan.parcel.uploads
    ]
    lines += [(name, "", "removed: weights of before") for name in plan.removed]
    lines += [(name, "", f"left out: {why}") for name, why in plan.parcel.left_out.items()]
    wide = max(len(visible(name)) for name, _, _ in lines)
    for name, bytes_, how in lines:
        say(f"  {visible(name):{wide}}  {bytes_:>8}  {how}".rstrip())


def _push_facts(plan: Push) -> dict[str, Any]:
    changed = {upload.name for upload in plan.changed}
    return {
        "repo": plan.repo, "base": plan.parcel.base, "private": plan.private, "bytes": plan.size,
        "files": [
            {"name": one.name, "bytes": one.size, "sent": one.name in changed, "change": one.change}
            for one in plan.parcel.uploads
        ],
        "removed": list(plan.removed), "left_out": plan.parcel.left_out,
    }  # fmt: skip
