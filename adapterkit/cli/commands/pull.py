"""`adapterkit pull ID…`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.command import Command
from adapterkit.cli.output import say, say_result
from adapterkit.cli.progress import progress
from adapterkit.errors import FormatError, UsageError
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.files.staging import Destination


@click.command(
    "pull",
    cls=Command,
    docs="hub.md",
    examples=[
        "adapterkit pull HuggingFaceTB/SmolLM2-135M-Instruct -o base",
        "adapterkit pull HuggingFaceTB/SmolLM2-135M-Instruct --dry-run",
    ],
)
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("-o", "--output", type=click.Path(), help="Copy it to this new folder, besides keeping it in the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_command(ids: tuple[str, ...], output: str | None, dry_run: bool, as_json: bool) -> None:
    """ID is org/name, org/name@revision or org/name:folder.

    Files in the cache are verified too. Interrupted downloads are resumed.
    """
    from adapterkit.files.staging import Destination
    from adapterkit.hub.download import download_of, fetch
    from adapterkit.hub.names import cache_folder, parsed
    from adapterkit.hub.remote import remote_of

    if output is not None and len(ids) != 1:
        raise UsageError("--output is one folder", hint="pull one ID at a time")
    names = [id for text in ids if (id := parsed(text)) is not None]
    if len(names) < len(ids):
        wrong = next(text for text in ids if parsed(text) is None)
        raise FormatError(f"{wrong}: is no name that the Hub allows, expected org/name, with @revision or :folder")
    place = None if output is None else Destination(Path(output), (cache_folder(names[0]),))
    if place is not None:
        place.check()
    downloads = [download_of(remote_of(id), every_byte=True) for id in names]
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
        say_result({"downloads": facts})


def _copied(path: Path, names: list[str], prefix: str, place: Destination) -> Path:
    """The files of a snapshot as a folder of their own."""
    from adapterkit.files.staging import staged
    from adapterkit.files.writing import copy_file

    with staged(place) as folder:
        for name in (name.removeprefix(prefix) for name in names):
            copy_file(path, name, folder / name)
    return place.out
