"""`adapterkit list`, `adapterkit pull ID…` and `adapterkit push PATH REPO`."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.progress import progress
from adapterkit.cli.running import files, size
from adapterkit.cli.tables import print_table, span, table
from adapterkit.errors import FormatError, OutputExistsError, UsageError
from adapterkit.finding import HUB_SORTS, SORTS, Found, in_cache, in_folders, on_the_hub, ordered

LIMIT = 30  # rows of the Hub


@click.command("list")
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path())
@click.option("--hub", is_flag=True, help="What is on the Hub, too.")
@click.option("--base", help="Only adapters of this base: its Hub id, or the last part of its path.")
@click.option("--search", default="", metavar="WORDS", help="Only what has all these words in names or targets.")
@click.option("--sort", type=click.Choice([*SORTS, "trending"]), help="Default: by name, on the Hub what is trending.")
@click.option("--limit", type=click.IntRange(1), default=LIMIT, show_default=True, help="Rows of the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(
    folders: tuple[str, ...], hub: bool, base: str | None, search: str, sort: str | None, limit: int, as_json: bool
) -> None:
    """Show the adapters in the folders DIR and below and in the Hub cache, and with --hub those on the Hub.

    Without DIR, of the current folder. What is read are headers and configs.
    """
    if sort == "trending" and not hub:
        raise UsageError("--sort trending is of the Hub: say --hub")
    if hub and sort is not None and sort not in HUB_SORTS:
        raise UsageError(f"the Hub does not sort by {sort}: expected one of {', '.join(HUB_SORTS)}")
    here = [one for one in itertools.chain(in_folders(folders or ["."]), in_cache()) if one.matches(base, search)]
    rows = ordered(here, sort or "name")
    if hub:
        rows += itertools.islice(on_the_hub(base, search, sort or "trending"), limit)
    if as_json:
        print(json.dumps([asdict(row) | {"path": str(row.path) if row.path else None} for row in rows], indent=2))
        return
    if not rows:
        print("no adapters found" + ("" if hub else "; --hub looks on the Hub"))
        return
    print_table(table(_columns(rows), rows))
    for row in rows:
        if row.problem:
            print(f"⚠ {row.name}: {row.problem}")


def _columns(rows: list[Found]) -> dict[str, Callable[[Found], str]]:
    columns: dict[str, Callable[[Found], str]] = {
        "adapter": lambda row: f"{'●◐○'[('here', 'partial', 'remote').index(row.state)]} {row.name}",
        "kind": lambda row: "" if row.kind in (None, "LoRA") else str(row.kind),
        "rank": lambda row: span(row.ranks),
        "alpha": lambda row: span(row.alphas),
        "targets": lambda row: _short(row.targets),
        "size": lambda row: "" if row.size is None else size(row.size),
        "downloads": lambda row: "" if row.downloads is None else f"{row.downloads:,}",
        "base": lambda row: (row.base_model or "").rpartition("/")[2],
    }
    return {name: cell for name, cell in columns.items() if name == "adapter" or any(cell(row) for row in rows)}


def _short(targets: tuple[str, ...]) -> str:
    """`q,k,v,o` for the field's usual names."""
    return ",".join(name.removesuffix("_proj") for name in targets[:7]) + ("…" if len(targets) > 7 else "")


@click.command("pull")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("-o", "--output", type=click.Path(), help="Copy it to this new folder, besides keeping it in the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_command(ids: tuple[str, ...], output: str | None, dry_run: bool, as_json: bool) -> None:
    """Download adapters or bases: org/name, org/name@revision, org/name:folder.

    Every weight is checked against its SHA-256. What was interrupted goes on where it was.
    """
    from adapterkit.hub.fetching import download_of, fetch
    from adapterkit.hub.names import parsed
    from adapterkit.hub.remote import look

    if output is not None and len(ids) != 1:
        raise UsageError("--output is one folder: pull one ID at a time")
    if output is not None and Path(output).exists():
        raise OutputExistsError(f"{output}: exists already; name a new folder")
    names = [parsed(text) for text in ids]
    if wrong := next((text for text, id in zip(ids, names, strict=True) if id is None), None):
        raise FormatError(f"{wrong}: is no name that the Hub allows, expected org/name, with @revision or :folder")
    downloads = [download_of(look(id)) for id in names if id is not None]
    facts: list[dict[str, Any]] = []
    for download in downloads:
        remote, count = download.remote, len(download.missing)
        facts.append({"id": str(remote.id), "commit": remote.commit, "bytes": download.size, "files": count})
        what = f"{files(count)}, {size(download.size)} to get" if count else "all of it is here"
        print(f"{remote.id}: {what}, {size(download.free)} free", file=sys.stderr)
        if dry_run:
            continue
        with progress(f"getting {remote.id.repo}", in_bytes=True) as show:
            path = fetch(download, show)
        if output is not None:
            path = _copied(path, [file.name for file in remote.files], remote.id.at(""), Path(output))
        facts[-1]["path"] = str(path)
        if not as_json:
            print(path)
    if as_json:
        print(json.dumps(facts, indent=2))


def _copied(path: Path, names: list[str], prefix: str, out: Path) -> Path:
    """The files of a snapshot as a folder of their own."""
    from adapterkit.card import copy_file
    from adapterkit.staging import staged

    with staged(out, directory=True) as folder:
        for name in names:
            copy_file(path / name.removeprefix(prefix), folder / name.removeprefix(prefix))
    return out


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

    First it is checked that it loads and is finite, that its base is on the Hub, that no file has a local path or a
    token in it, and that the token may write there. State of training and pickles stay here. The card is completed;
    what it says already stays. Weights that the Hub has are not sent again.
    """
    from adapterkit.hub.publishing import plan_push, push

    plan = plan_push(Path(path), repo, private=private, pull_request=pr, base_id=base_id, license=license)
    changed = {upload.name for upload in plan.changed}
    if not as_json:
        click.echo(f"sends     {plan.parcel.what}")
        state = "private" if plan.private else "public"
        click.echo(
            f"to        {plan.repo} ({state}{'' if plan.exists else ', new'}{', as a pull request' if pr else ''})"
        )
        for upload in plan.parcel.uploads:
            how = upload.change if upload.name in changed else "unchanged"
            click.echo(f"  {upload.name:40} {size(upload.size):>10}  {how}".rstrip())
        for name in plan.removed:
            click.echo(f"  {name:40} {'':10}  removed: weights of before")
        for name, why in plan.parcel.left_out.items():
            click.echo(f"  {name:40} {'':10}  left out: {why}")
    if dry_run:
        if as_json:
            print(json.dumps(_push_facts(plan), indent=2))
        else:
            click.echo("nothing was sent (--dry-run)")
        return
    began = time.perf_counter()
    with progress("sending", in_bytes=True) as show:
        done = push(plan, message, show)
    if as_json:
        print(json.dumps(_push_facts(plan) | {"url": done.url, "commit": done.commit}, indent=2))
        return
    if done.commit is None:
        click.echo("nothing had changed, and nothing was sent")
    else:
        click.echo(f"pushed    {size(plan.size)} in {time.perf_counter() - began:.1f} s, commit {done.commit[:10]}")
    click.echo(done.url)


def _push_facts(plan: Any) -> dict[str, Any]:
    changed = {upload.name for upload in plan.changed}
    return {
        "repo": plan.repo, "base": plan.parcel.base, "private": plan.private, "bytes": plan.size,
        "files": [
            {"name": one.name, "bytes": one.size, "sent": one.name in changed, "change": one.change}
            for one in plan.parcel.uploads
        ],
        "removed": list(plan.removed), "left_out": plan.parcel.left_out,
    }  # fmt: skip
