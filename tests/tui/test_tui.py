"""The terminal app by its keys: every screen, action and state, without a terminal; jobs are real commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from html import unescape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import toyformat
from handmade import CONFIG, adapterkit, contents, write_adapter, write_base
from hostile import FOLDER, steering, write_hostile_adapter, write_hostile_base
from hubserver import Hub
from textual._compositor import Compositor
from textual.pilot import Pilot
from textual.widgets import Button, DataTable, Input, Markdown, Select, Static, TabbedContent
from textual.worker import WorkerCancelled

from adapterkit.adapter.formats import load, save, table
from adapterkit.hub.listing import AdapterEntry, list_folders
from adapterkit.inspection import cache
from adapterkit.inspection.summary import ModuleRow
from adapterkit.text import size
from adapterkit.tui import app as module
from adapterkit.tui import browser, system_info
from adapterkit.tui.actions import ACTIONS, line
from adapterkit.tui.app import AdapterkitApp
from adapterkit.tui.details import Details, changes
from adapterkit.tui.jobs import Job
from adapterkit.tui.screens.compare import CompareScreen, differences
from adapterkit.tui.screens.detail import Detail, DetailScreen
from adapterkit.tui.screens.forms import AskScreen, ConfirmScreen, FormScreen
from adapterkit.tui.screens.help import HelpScreen
from adapterkit.tui.screens.jobs import JobsScreen
from adapterkit.tui.widgets import adapter_table
from adapterkit.tui.widgets.adapter_table import AdapterTable
from adapterkit.tui.widgets.charts import Layers, Plot, Spectrum, norms
from adapterkit.tui.widgets.job_bar import JobBar, progress_text
from adapterkit.tui.widgets.sources import Source, Sources

WIDE, USUAL, NARROW, TINY = (160, 48), (120, 30), (80, 24), (12, 4)  # what is drawn takes time: wide where it matters
BASE = "lab/base"
ROOT = Path(module.__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting for a person's pace, no user, no disk of this machine, and a cache of its own."""
    monkeypatch.setattr(adapter_table, "LOOKING", 0.001)
    monkeypatch.setattr(adapter_table, "TYPING", 0.001)
    monkeypatch.setattr(browser, "CHANGES_EVERY", 3600.0)
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "measured")
    monkeypatch.setattr(module, "machine", lambda: "disk 81G")
    monkeypatch.setattr(module, "who", lambda: ("online @me", ""))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(autouse=True)
def seldom_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pictures are drawn, where one is asked for; to draw each change, unseen, takes half of a test's time."""
    draw = Compositor.render_update

    def render_update(self: Compositor, full: bool = False, **how: Any) -> Any:
        if full:
            return draw(self, full, **how)
        self._dirty_regions.clear()

    monkeypatch.setattr(Compositor, "render_update", render_update)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters of one base, one of which is broken; and the base."""
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"base_model_name_or_path": BASE}
    write_adapter(tmp_path / "mine" / "one", config=config)
    write_adapter(tmp_path / "mine" / "two", config=config | {"lora_alpha": 9})
    (tmp_path / "mine" / "one" / "README.md").write_text("# The first\n")
    (tmp_path / "mine" / "broken").mkdir()
    (tmp_path / "mine" / "broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    write_base(tmp_path / "base")
    return Path("mine")


async def settled(pilot: Pilot[None]) -> None:
    """Until nothing is going on any more but jobs: no worker is there after timers and messages had their turn, twice."""
    quiet = 0
    while quiet < 2:
        await pilot.pause(0.002)
        workers = [worker for worker in pilot.app.workers if worker.group != "jobs"]
        for worker in workers:
            with suppress(WorkerCancelled):  # where another took its place
                await worker.wait()
        await pilot.pause()
        quiet = 0 if workers else quiet + 1


async def ended(pilot: Pilot[None]) -> Job:
    """The newest job, at its end."""
    jobs = [worker for worker in pilot.app.workers if worker.group == "jobs"]
    await pilot.app.workers.wait_for_complete(jobs)
    await settled(pilot)
    job: Job = pilot.app.jobs[-1]  # type: ignore[attr-defined]
    return job


@asynccontextmanager
async def running(*folders: Path, base: str = "", size: tuple[int, int] = USUAL) -> AsyncIterator[Pilot[None]]:
    """The app, with what is in `folders` read; how a test leaves it must be drawable."""
    app = AdapterkitApp(folders, base)
    async with app.run_test(size=size) as pilot:
        await settled(pilot)
        yield pilot
        if app.is_running:
            app.export_screenshot()


def text_of(widget: Static) -> str:
    """What a widget shows, as text."""
    from rich.console import Console

    console = Console(width=300, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(widget.content)  # type: ignore[arg-type]
    return capture.get()


def names(pilot: Pilot[None]) -> list[str]:
    """The rows of the table, in their order."""
    return [row.name for row in pilot.app.table._shown]  # type: ignore[attr-defined]


def facts(pilot: Pilot[None]) -> str:
    """The overview."""
    return text_of(pilot.app.screen.query_one("#facts", Static))


# --- browsing --------------------------------------------------------------------------------------------------------


async def test_folders_are_listed_and_the_first_is_shown(folder: Path) -> None:
    async with running(folder) as pilot:
        assert names(pilot) == ["mine/broken", "mine/one", "mine/two"]
        assert "✗" in str(pilot.app.table.query_one(DataTable).get_row("mine/broken")[0])
        await pilot.press("j")
        await settled(pilot)
        assert "LoRA" in facts(pilot)
        assert BASE in facts(pilot)
        await pilot.press("k")
        await settled(pilot)
        assert "⚠" in facts(pilot)


async def test_how_it_fits_the_base(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("j")
        await settled(pilot)
        assert "4 of 4 targets found in base" in facts(pilot)
        await pilot.press("b")
        await pilot.press(*"x", "enter")
        await settled(pilot)
        assert "cannot read" in facts(pilot)
        assert "base: x ▾" in text_of(pilot.app.screen.query_one("#top", Static))


async def test_another_format_is_shown_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FORMATS", (*table.FORMATS, toyformat))
    save(load(folder / "one"), Path("toys/three"), format="toy")
    async with running(Path("toys")) as pilot:
        assert names(pilot) == ["toys/three"] and "toy, LoRA" in facts(pilot) and BASE in facts(pilot)


async def test_search_and_escape(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("slash", *"two")
        await settled(pilot)
        assert names(pilot) == ["mine/two"]
        assert pilot.app.table.border_title == "1 of 3"
        await pilot.press("escape", "slash", *"xx")
        await settled(pilot)
        assert names(pilot) == []
        assert "No adapter matches 'xx'" in text_of(pilot.app.query_one("#empty", Static))


async def test_enter_after_words_takes_what_they_find(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_table, "TYPING", 3600.0)
    async with running(folder, size=NARROW) as pilot:
        await pilot.press("slash", *"two", "enter", "enter")
        await settled(pilot)
        assert names(pilot) == ["mine/two"]
        assert "mine/two" in facts(pilot)
        assert isinstance(pilot.app.screen, DetailScreen)


async def test_sorting(folder: Path) -> None:
    async with running(folder) as pilot:
        seen = []
        for _ in range(6):
            await pilot.press("s")
            seen.append(pilot.app.table.sort)
        assert seen == ["rank", "size", "modified", "downloads", "likes", "name"]
        assert names(pilot) == ["mine/broken", "mine/one", "mine/two"]


async def test_what_is_highlighted_stays_so_when_rows_come(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "j")
        write_adapter(Path("mine") / "another")
        await pilot.press("r")
        await settled(pilot)
        assert names(pilot)[0] == "mine/another"
        await pilot.press("j", "j", "j")
        write_adapter(Path("mine") / "any")
        pilot.app.browser.look_for_changes()
        await settled(pilot)
        assert names(pilot) == ["mine/another", "mine/any", "mine/broken", "mine/one", "mine/two"]
        assert pilot.app.table.current.name == "mine/two"


async def test_what_vanishes_while_it_is_shown(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j")
        await settled(pilot)
        shutil.rmtree("mine/one")
        await pilot.press("2")
        await settled(pilot)
        assert any("no such file" in text_of(one) for one in pilot.app.query(".wait").results(Static))
        pilot.app.browser.look_for_changes()
        await settled(pilot)
        assert names(pilot) == ["mine/broken", "mine/two"]


def test_what_did_not_change_is_not_read_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path("mine") / "pickled").mkdir()
    (Path("mine") / "pickled" / "adapter_model.bin").write_bytes(b"x")
    known = {row.name: row.modified for row in list_folders([folder])}
    assert len(known) == 4
    assert changes(folder, known) == ([], [])
    os.utime("mine/one/adapter_model.safetensors", (1, 1))
    [new], gone = changes(folder, known | {"mine/gone": 1.0})
    assert (new.name, gone) == ("mine/one", ["mine/gone"])


async def test_the_tabs(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j")
        await settled(pilot)
        tabs = pilot.app.query_one("#tabs", TabbedContent)
        for key, tab in zip("12345", ("overview", "layers", "spectrum", "config", "card"), strict=True):
            await pilot.press(key)
            await settled(pilot)
            assert tabs.active == tab
        assert "lora_alpha" in text_of(pilot.app.query_one("#config-text", Static))
        assert pilot.app.query_one("#card-text", Markdown).source == "# The first\n"


async def test_layers_and_spectrum(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "2")
        await settled(pilot)
        layers = pilot.app.query_one(Layers)
        assert layers.display
        [bars] = layers.query_one(Plot)._datasets
        assert list(bars.x) == [0, 1]
        before = list(bars.y)
        known = json.loads(adapterkit("inspect", "mine/one", "--json", "--modules").out)["modules"]
        for layer in (0, 1):
            whole = sum(row["frobenius"] ** 2 for row in known if row["layer"] == layer)
            assert before[layer] == pytest.approx(whole**0.5)
        await pilot.click("#group-q")
        await settled(pilot)
        [bars] = layers.query_one(Plot)._datasets
        assert all(now < then for now, then in zip(bars.y, before, strict=True))
        assert not pilot.app.query_one("#group-mlp").display
        await pilot.press("3")
        await settled(pilot)
        spectrum = pilot.app.query_one(Spectrum)
        [curve] = spectrum.query_one(Plot)._datasets
        largest = max(known, key=lambda row: row["frobenius"])
        assert [10**value for value in curve.y] == pytest.approx(largest["sigma"])
        assert "90% of ‖ΔW‖²" in text_of(spectrum.query_one(Static))


async def test_measurements_are_cached_by_the_bytes_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "2")
        await settled(pilot)
    [cached] = cache.folder().glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "measure", None)  # which would raise
        async with running(folder) as pilot:
            await pilot.press("j", "2")
            await settled(pilot)
            assert pilot.app.query_one(Layers).display
    cached.write_text("[{}]")  # of another version: measured again
    adapter = load(Path("mine/one"))
    assert [row.name for row in cache.measured(adapter)] == list(adapter.modules)
    assert json.loads(cached.read_text()) != [{}]


async def test_enter_goes_into_the_detail(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "enter")
        assert pilot.app.query_one(Detail) in pilot.app.focused.ancestors


async def test_a_narrow_terminal_has_the_detail_on_a_screen_of_its_own(folder: Path) -> None:
    async with running(folder, size=NARROW) as pilot:
        assert not pilot.app.browser.detail.display
        await pilot.press("j", "enter")
        await settled(pilot)
        assert isinstance(pilot.app.screen, DetailScreen)
        await pilot.press("2")
        await settled(pilot)
        assert pilot.app.screen.query_one(Layers).display
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, DetailScreen)


class Held:
    """Looks at adapters wait here until they are let go; `begun` are the names of those looked at, `waiting` how many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.waiting, self._look = threading.Event(), [], 0, browser.details_of
        self.go.set()
        monkeypatch.setattr(browser, "details_of", self)

    def __call__(self, row: AdapterEntry, base: str) -> Details:
        self.waiting += 1
        self.begun.append(row.name)
        self.go.wait(20)
        self.waiting -= 1
        return self._look(row, base)

    async def looks(self, pilot: Pilot[None], many: int) -> None:
        """Until so many looks have begun."""
        while len(self.begun) < many:
            await pilot.pause(0.002)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


async def test_what_was_chosen_comes_whatever_is_highlighted_meanwhile(
    folder: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_table, "LOOKING", 3600.0)
    async with running(folder, size=NARROW) as pilot:
        held.go.clear()
        await pilot.press("j", "enter", "enter")
        await held.looks(pilot, 2)
        pilot.app.table.post_message(AdapterTable.Looked(pilot.app.table.current))
        await held.looks(pilot, 3)
        await pilot.press("j")
        pilot.app.table.post_message(AdapterTable.Looked(pilot.app.table.current))
        await held.looks(pilot, 4)
        held.go.set()
        await settled(pilot)
        assert held.begun == ["mine/one"] * 3 + ["mine/two"]
        assert isinstance(pilot.app.screen, DetailScreen)
        assert "mine/one" in facts(pilot)
        await pilot.press("escape")
        assert len(pilot.app.screen_stack) == 1
        assert "mine/two" in facts(pilot)


async def test_what_comes_late_is_not_shown_over_what_one_does_now(
    folder: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_table, "LOOKING", 3600.0)
    async with running(folder, Path("base"), size=NARROW) as pilot:
        held.go.clear()
        await pilot.press("j", "enter")
        await held.looks(pilot, 1)
        await pilot.press("m")
        held.go.set()
        await settled(pilot)
        assert isinstance(pilot.app.screen, FormScreen)
        await pilot.press("escape")
        held.go.clear()
        for row in ("mine/two", "mine/broken"):  # highlighted, and chosen
            message = AdapterTable.Looked if row == "mine/two" else AdapterTable.Chosen
            pilot.app.table.post_message(message(pilot.app.table.rows[row]))
        await held.looks(pilot, 3)
        pilot.app.query_one(Sources).post_message(Sources.Picked(Source("folder", Path("base"))))
        await pilot.pause()
        held.go.set()
        await settled(pilot)
        assert len(pilot.app.screen_stack) == 1
        assert facts(pilot).strip() == ""


async def test_a_hub_that_answers_none_of_many_keeps_nothing_else_waiting(folder: Path, held: Held) -> None:
    async with running(folder) as pilot:
        held.go.clear()
        for number in range(40):
            pilot.app.browser._look(AdapterEntry(f"some/lora-{number:02}", None, "remote"))
            await held.looks(pilot, len(held.begun) + 1)
        assert held.waiting >= 40
        write_adapter(Path("mine") / "another")
        pilot.app.browser.find()
        reading = [worker for worker in pilot.app.workers if worker.group == "find"]
        await pilot.app.workers.wait_for_complete(reading)
        assert len(names(pilot)) == 4
        held.go.set()


@pytest.mark.parametrize("size", [(1, 1), (40, 6)])
async def test_almost_no_terminal(folder: Path, size: tuple[int, int]) -> None:
    async with running(folder, size=size) as pilot:
        for key in ("j", "2", "m", "escape", "question_mark", "escape", "space", "J", "escape"):
            await pilot.press(key)
            pilot.app.export_screenshot()  # which must not fail
        for other in (WIDE, TINY, (2, 1)):
            await pilot.resize_terminal(*other)
            pilot.app.export_screenshot()
        await pilot.resize_terminal(*NARROW)
        await settled(pilot)
        assert names(pilot)


async def test_nothing_there(tmp_path: Path) -> None:
    async with running(tmp_path) as pilot:
        assert "Get started" in text_of(pilot.app.query_one("#empty", Static))
        for key in ("space", "c", "y", "delete", "x", "enter"):
            await pilot.press(key)
        await settled(pilot)


async def test_a_folder_that_is_not_there_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path / "none") as pilot:
        assert "no such folder" in facts(pilot)


async def test_names_in_any_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("日本語 [bold]", "قمر", "a\x1b[31mb", "🦙" * 40, "[/]"):
        write_adapter(tmp_path / "all" / name)
    async with running(Path("all")) as pilot:
        assert len(names(pilot)) == 5
        for _ in range(5):
            await pilot.press("j", "space")
            await settled(pilot)
        await pilot.press("y", "m")
        assert "\x1b" not in str(pilot.app.export_screenshot())


def drawn(pilot: Pilot[None]) -> str:
    """All that is on the screen."""
    return unescape("".join(re.findall(r"<text[^>]*>([^<]*)", pilot.app.export_screenshot()))).replace("\xa0", " ")


async def test_strangers_names_are_text_everywhere(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    (near := Path(mkdtemp())).rmdir()
    near.symlink_to(tmp_path / "near")  # so short a path that the screen has room for all of it
    home = near / "[b]all[/] [/]"
    for name, alpha in (("one", 6), ("two", 9)):
        write_hostile_adapter(home / f"{FOLDER}{name}", alpha)
    (home / f"{FOLDER}broken").mkdir()
    (home / f"{FOLDER}broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    base = write_hostile_base(tmp_path / "base").rename(tmp_path / f"base{FOLDER}")
    seen = []
    async with running(home, base=str(base), size=(110, 24)) as pilot:

        async def press(*keys: str) -> None:
            await pilot.press(*keys)
            await settled(pilot)
            seen.append(drawn(pilot))

        await press("j")
        await press("2")
        await press("4")
        await press("3")
        pilot.app.query_one(Select).action_show_overlay()
        await press("3")
        pilot.app.table.query_one(DataTable).focus()
        await press("y", "space", "space", "c")
        await press("escape", "m", "ctrl+s")
        await press("escape", "delete", "y")
        pilot.app.run_job(["inspect", f"{home}/{FOLDER}nothing"])
        assert (await ended(pilot)).state == "failed"
        await press("n", "J")
    screens = "".join(seen)
    assert steering(screens) == set()
    near.unlink()
    for text in ("[b]all[/] [/]", "a\\x1b[38;5;201m", "c[/] $x$", "no such file"):
        assert text in screens


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(hub: Hub, folder: Path) -> Hub:
    """The adapters of the folder on the Hub, and the base."""

    def files(path: str) -> dict[str, bytes]:
        return {name: data for name, data in contents(Path(path)).items() if data is not None}

    card = f"---\nbase_model: {BASE}\nlibrary_name: peft\n---\n# It\n".encode()
    for number in range(120):
        hub.add(f"some/lora-{number:03}", files("mine/one") | {"README.md": card}, downloads=number)
    hub.add(BASE, files("base"))
    return hub


async def on_hub(pilot: Pilot[None]) -> None:
    """Pick the Hub in the sources."""
    tree = pilot.app.query_one(Sources)
    tree.focus()
    tree.move_cursor(tree.root.children[-1])
    await pilot.press("enter")
    await settled(pilot)


async def test_the_hub_pages_as_one_scrolls(there: Hub, folder: Path) -> None:
    async with running(folder, base=BASE) as pilot:
        await on_hub(pilot)
        assert len(names(pilot)) == 50
        assert "○" in str(pilot.app.table.query_one(DataTable).get_row("some/lora-000")[0])
        pilot.app.table.query_one(DataTable).move_cursor(row=49)
        await settled(pilot)
        assert len(names(pilot)) == 100
        await pilot.press("s")
        await settled(pilot)
        assert names(pilot)[0] == "some/lora-119"
        await pilot.press("slash", *"lora-077", "enter")
        await settled(pilot)
        assert names(pilot) == ["some/lora-077"]


async def test_a_row_of_the_hub_is_filled_by_its_headers(there: Hub, folder: Path) -> None:
    async with running(folder, base=BASE) as pilot:
        await on_hub(pilot)
        row = pilot.app.table.query_one(DataTable).get_row("some/lora-000")
        assert [str(cell) for cell in row[3:6]] == ["4", "6", "o,q"]
        whole = sum(len(blob.data) for blob in there.repos["some/lora-000"].files().values())
        assert f"of {size(whole)}: headers and config" in facts(pilot)
        assert "4 of 4 targets found in lab/base" in facts(pilot)
        assert all(one.span for one in there.asked("GET .*/resolve/.*"))
        asked = len(there.requests)
        await pilot.press("j")
        await settled(pilot)
        await pilot.press("k")
        more = len(there.requests)
        await settled(pilot)
        assert asked < more
        assert len(there.requests) == more  # what was seen is remembered
        await pilot.press("2")
        await settled(pilot)
        assert any("download the adapter (d)" in text_of(one) for one in pilot.app.query(".wait").results(Static))


async def test_what_is_gated_says_where_to_ask(there: Hub, folder: Path) -> None:
    there.repos["some/lora-000"].gated = True
    async with running(folder) as pilot:
        await on_hub(pilot)
        assert f"request access at {there.url}/some/lora-000".replace("\n", "") in facts(pilot).replace("\n", "")


async def test_a_hub_that_is_out_of_order(there: Hub, folder: Path) -> None:
    there.fail("GET /api/models", 500, times=99)
    async with running(folder) as pilot:
        await on_hub(pilot)
        assert "out of service" in text_of(pilot.app.query_one("#empty", Static))
        assert "cache is still available" in text_of(pilot.app.query_one("#empty", Static))
        there.faults.clear()
        await pilot.press("r")
        await settled(pilot)
        assert len(names(pilot)) == 50


async def test_a_hub_that_hangs_is_told_of(there: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.05)
    there.fail("GET /api/models", hang=True, times=99)
    async with running(folder) as pilot:
        await on_hub(pilot)
        assert "does not respond" in text_of(pilot.app.query_one("#empty", Static))


async def test_offline_is_told_in_a_banner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "who", system_info.who)
    async with running(folder) as pilot:
        assert "offline" in text_of(pilot.app.query_one("#top", Static))
        banner = pilot.app.query_one("#banner", Static)
        assert banner.display
        assert "Offline: showing local folders and cache" in text_of(banner)
        await on_hub(pilot)
        assert "HF_HUB_OFFLINE" in text_of(pilot.app.query_one("#empty", Static))


@pytest.mark.parametrize(
    ("token", "expected"), [("hf_writer", "online @me"), ("", "online, no token"), ("hf_wrong", "token refused")]
)
def test_who_one_is(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, expected: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert system_info.who()[0] == expected


async def test_the_cache_is_a_source(there: Hub, folder: Path) -> None:
    assert adapterkit("pull", "some/lora-003").code == 0
    async with running(folder) as pilot:
        tree = pilot.app.query_one(Sources)
        tree.focus()
        tree.move_cursor(tree.root.children[1])
        await pilot.press("enter")
        await settled(pilot)
        assert names(pilot) == ["some/lora-003"]


# --- marks, comparing, copying ---------------------------------------------------------------------------------------


async def test_compare_wants_two(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "space", "c")
        assert not isinstance(pilot.app.screen, CompareScreen)
        await pilot.press("space", "c")
        await settled(pilot)
        assert isinstance(pilot.app.screen, CompareScreen)
        said = text_of(pilot.app.screen.query_one("#what", Static))
        assert "4 modules in both; cosine +1.000" in said
        assert pilot.app.screen.query_one("#layers", DataTable).row_count == 3
        configs = pilot.app.screen.query_one("#configs", DataTable)
        assert [str(cell) for cell in configs.get_row_at(0)] == ["lora_alpha", "6", "9"]
        assert len(pilot.app.screen.query_one(Plot)._datasets) == 2
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, CompareScreen)


async def test_compare_with_what_is_broken(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("space", "space", "c")
        await settled(pilot)
        assert "broken" in text_of(pilot.app.screen.query_one("#what", Static))


async def test_y_copies_the_command(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("j", "y")
        assert pilot.app.clipboard == "adapterkit inspect mine/one --against base"


async def test_delete_shows_what_goes_and_asks_twice(folder: Path) -> None:
    (folder / "one" / "notes.txt").write_text("mine")
    async with running(folder) as pilot:

        async def press(*keys: str) -> None:
            for key in keys:
                await pilot.press(key)
                await settled(pilot)

        await press("j", "delete")
        assert isinstance(pilot.app.screen, ConfirmScreen)
        asked = text_of(pilot.app.screen.query_one(Static))
        assert "adapter_model.safetensors" in asked
        assert "The folder stays: it also contains notes.txt." in asked
        await press("enter")  # which is no
        assert (folder / "one" / "adapter_config.json").is_file()
        await press("delete", "y", "n")
        assert (folder / "one" / "adapter_config.json").is_file()
        await press("delete", "y", "y")
        assert os.listdir(folder / "one") == ["notes.txt"]
        assert names(pilot) == ["mine/broken", "mine/two"]
        assert "removed 3 files" in str([notice.message for notice in pilot.app._notifications])
        (folder / "broken" / ".git").mkdir()
        await press("k", "k", "delete")
        assert not isinstance(pilot.app.screen, ConfirmScreen)
        assert (folder / "broken" / "adapter_model.safetensors").is_file()


async def test_what_is_to_be_deleted_is_whatever_is_asked_about_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), module.remove
    monkeypatch.setattr(module, "remove", lambda plan: real(plan) if go.wait(60) else None)
    async with running(folder) as pilot:
        try:
            await pilot.press("j", "delete")
            await settled(pilot)
            await pilot.press("y", "y", "j", "delete", "delete")
            while any(worker.group == "plan" and worker.is_running for worker in pilot.app.workers):
                await pilot.pause(0.002)
            [removing] = [worker for worker in pilot.app.workers if worker.group == "remove"]
            assert not removing.is_cancelled
            assert "mine/two" in text_of(pilot.app.screen.query_one(Static))
            await pilot.press("n")
            assert len(pilot.app.screen_stack) == 1
        finally:
            go.set()
        await settled(pilot)
        assert not (folder / "one").exists()
        assert (folder / "two").exists()


# --- doing -----------------------------------------------------------------------------------------------------------


async def test_merge_watch_unmerge(folder: Path) -> None:
    before = contents(Path("base"))
    async with running(folder, base="base") as pilot:
        await pilot.press("j", "m")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["merge", "base", "mine/one", "-o", "one-merged"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        plan = text_of(form.query_one("#plan", Static))
        assert "all 4 modules match the base" in plan
        assert not Path("one-merged").exists()
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert (job.state, job.code) == ("done", 0), job
        assert job.result == "wrote     one-merged"
        assert "✓ merge done" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("u")
        pilot.app.screen.query_one("#field-merged", Input).value = "one-merged"
        pilot.app.screen.query_one("#field-o", Input).value = "again"
        await pilot.pause()
        await pilot.press("ctrl+s")
        await settled(pilot)
        assert "restores  4 of 6 tensors, changed by one" in text_of(pilot.app.screen.query_one("#plan", Static))
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
    again = contents(Path("again"))
    assert {name: again[name] for name in before} == before


async def test_a_plan_is_made_once_and_only_of_what_is_asked_for_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow: Path
) -> None:
    begun: list[Job] = []
    real = Job.run

    async def run(self: Job, changed: Callable[[], None]) -> None:
        begun.append(self)
        await real(self, changed)

    monkeypatch.setattr(Job, "run", run)
    async with running(folder, base="base") as pilot:

        async def planning(many: int) -> None:
            while len(begun) < many:
                await pilot.pause(0.002)
            await said(pilot, begun[-1])

        await pilot.press("j", "m", "ctrl+s", "ctrl+s")
        await planning(1)
        await pilot.press("ctrl+s")
        form = pilot.app.screen
        assert len(begun) == 1
        assert "planning" in text_of(form.query_one("#plan", Static))
        form.query_one("#field-o", Input).value = "elsewhere"
        await settled(pilot)
        assert text_of(form.query_one("#plan", Static)).strip() == ""
        assert begun[0].process is not None
        assert await begun[0].process.wait() == 130
        assert slow.exists()
        assert str(form.query_one("#go", Button).label) == "Plan"
        await pilot.press("ctrl+s")
        await planning(2)
        await pilot.press("escape")
    assert begun[1].process is not None
    assert await begun[1].process.wait() == 130


async def test_a_plan_that_fails_is_told_and_nothing_runs(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("m", "ctrl+s")
        await settled(pilot)
        assert "broken" in text_of(pilot.app.screen.query_one("#plan", Static))
        assert str(pilot.app.screen.query_one("#go", Button).label) == "Plan"
        assert not pilot.app.jobs


async def test_what_is_not_filled_in_is_asked_for(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "m", "ctrl+s")
        assert "Required: base" in text_of(pilot.app.screen.query_one("#plan", Static))
        pilot.app.screen.query_one("#field-adapters", Input).value = "'open"
        await pilot.pause()
        await pilot.press("ctrl+s")
        assert "close the quote" in text_of(pilot.app.screen.query_one("#plan", Static))


async def test_combine_takes_the_marked(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "space", "space", "o")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["combine", "mine/one", "mine/two", "-o", "one-combine", "--method", "linear"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        assert "4 modules, checked" in text_of(form.query_one("#plan", Static))
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
        assert Path("one-combine/adapter_model.safetensors").is_file()


async def test_every_form_opens_and_closes(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("j")
        for command, action in ACTIONS.items():
            await pilot.press(action.key)
            form = pilot.app.screen
            assert isinstance(form, FormScreen), command
            assert form.argv[0] == command
            await pilot.press("ctrl+y")
            assert pilot.app.clipboard == line(form.argv)
            await pilot.press("escape")
            assert not isinstance(pilot.app.screen, FormScreen), command


@pytest.mark.parametrize("command", ACTIONS)
def test_every_field_is_an_argument_of_its_command(command: str) -> None:
    """The forms and the command line cannot part: each option is one that the command has."""
    said = adapterkit(command, "--help").out
    for field in ACTIONS[command].fields:
        assert not field.name.startswith("-") or field.name in said, field
        if field.kind == "choice" and "[" in said:
            for choice in field.choices:
                assert choice in said or field.name == "--method", choice
    for option in ACTIONS[command].plan:
        assert option in said


async def test_pull_and_push(there: Hub, folder: Path) -> None:
    async with running(folder) as pilot:
        await on_hub(pilot)
        await pilot.press("d")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["pull", "some/lora-000"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
        await pilot.press("r")
        await settled(pilot)
        marks = [str(pilot.app.table.query_one(DataTable).get_row(f"some/lora-00{n}")[0]) for n in (0, 1)]
        assert ["●" in marks[0], "○" in marks[1]] == [True, True]
        pilot.app.run_job(["push", "mine/two", "me/two"])
        job = await ended(pilot)
        assert job.state == "done", job
        assert "adapter_model.safetensors" in there.repos["me/two"].files()


async def test_a_job_that_fails_says_why(folder: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["merge", "base", "mine/broken", "-o", "out"])
        job = await ended(pilot)
        assert (job.state, job.code) == ("failed", 1)
        assert "mine/broken" in job.result
        assert "✗ merge failed" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("J")
        assert isinstance(pilot.app.screen, JobsScreen)
        assert "mine/broken" in text_of(pilot.app.screen.query_one("#said", Static))
        await pilot.press("y")
        assert pilot.app.clipboard == "adapterkit merge base mine/broken -o out"
        await pilot.press("escape")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A command that says how far it is, and then waits until it is ended by ctrl-C, which it notes in a file."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print(json.dumps({'progress': 'training', 'done': 1, 'total': 4, 'loss': 2.5}), file=sys.stderr, flush=True)\n"
        "print(json.dumps({'progress': 'training', 'done': 2, 'total': 4, 'loss': 1.5}), file=sys.stderr, flush=True)\n"
        "try:\n    print('a word', file=sys.stderr, flush=True)\n    signal.pause()\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'tidied')!r}, 'w').close()\n    sys.exit(130)\n"
    )
    real = module.Job.run

    async def run(self: Job, changed: Callable[[], None]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(tmp_path / "python"))
            await real(self, changed)

    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(module.Job, "run", run)
    yield tmp_path / "tidied"


async def said(pilot: Pilot[None], job: Job) -> None:
    """Until the slow command has said all it says."""
    while not job.said:
        await pilot.pause(0.002)


async def test_progress_losses_and_cancelling(folder: Path, slow: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["train", "--recipe", "x"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        assert (job.share, job.losses, job.doing) == (0.5, [2.5, 1.5], "training")
        assert "50%" in progress_text(job)
        assert "loss 1.500" in progress_text(job)
        pilot.app._draw_jobs()
        assert "x cancel" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("J")
        await pilot.pause()
        assert pilot.app.screen.query_one(Plot).display
        await pilot.press("x")
        await ended(pilot)
        assert (job.state, job.code) == ("cancelled", 130)
        assert slow.exists()


async def test_a_command_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(folder) as pilot:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        pilot.app.run_job(["merge"])
        job = await ended(pilot)
        assert (job.state, job.result) == ("failed", "cannot start: No such file or directory")


async def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    job = Job(["merge"])
    await job.run(lambda: None)
    assert (job.state, job.said[-1]) == ("done", "last")


async def test_what_does_not_end_is_killed_when_asked_again(folder: Path, slow: Path) -> None:
    script = slow.with_name("slow.py")
    script.write_text(script.read_text().replace("    signal.pause()", "    while True:\n        deaf()"))
    script.write_text(
        "import signal\ndef deaf():\n    try:\n        signal.pause()\n    except BaseException:\n        pass\n"
        + script.read_text()
    )
    async with running(folder) as pilot:
        pilot.app.run_job(["merge"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        await pilot.press("x")
        await pilot.pause()
        assert "press x again to kill it" in progress_text(job)
        await pilot.press("x")
        await ended(pilot)
        assert (job.state, job.code) == ("cancelled", -9)


async def test_quitting_asks_about_jobs(folder: Path, slow: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["merge"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        await pilot.press("q")
        await pilot.pause()
        assert isinstance(pilot.app.screen, ConfirmScreen)
        await pilot.press("n")
        await pilot.pause()
        assert pilot.app.is_running
        assert job.state == "running"
        await pilot.press("q")
        await pilot.pause()
        await pilot.press("y")
        await ended(pilot)
        assert job.state == "cancelled"
        assert slow.exists()


async def test_quitting_without_jobs(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("q")
        await settled(pilot)
        assert not pilot.app.is_running


def test_lines_that_are_no_progress_are_kept() -> None:
    job = Job(["merge"])
    for text in ("note: x", '{"progress": ', '{"done": 1}', '{"progress": "a", "done": 3, "total": null}'):
        job.hear(text)
    assert job.said == ["note: x", '{"progress": ', '{"done": 1}']
    assert (job.done, job.share, progress_text(job)) == (3, None, "a")


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_help_names_every_key(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("question_mark")
        assert isinstance(pilot.app.screen, HelpScreen)
        text = text_of(pilot.app.screen.query_one(Static))
        for action in ACTIONS.values():
            assert f"  {action.key} " in text
        assert "here\n  /            search\n  space        select\n" in text
        await pilot.press("escape", "J", "question_mark")
        assert "cancel" in text_of(pilot.app.screen.query_one(Static)).partition("navigation")[0]
        await pilot.press("escape")


async def test_the_mouse(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.click("#adapters DataTable", offset=(8, 2))
        await settled(pilot)
        assert pilot.app.table.current.name == "mine/one"
        await pilot.click("#top")
        assert isinstance(pilot.app.screen, AskScreen)
        await pilot.press("escape", "m")
        await pilot.click("#back")
        assert len(pilot.app.screen_stack) == 1


async def test_the_palette_has_every_action(folder: Path) -> None:
    async with running(folder) as pilot:
        titles = {command.title for command in pilot.app.get_system_commands(pilot.app.screen)}
        assert {action.label for action in ACTIONS.values()} <= titles
        await pilot.press("ctrl+p", *"merge into", "enter")
        await settled(pilot)
        await pilot.press("enter")
        await settled(pilot)
        assert isinstance(pilot.app.screen, FormScreen)


async def test_themes(folder: Path) -> None:
    async with running(folder) as pilot:
        for theme in ("textual-light", "nord", "gruvbox", "ansi-dark"):
            pilot.app.theme = theme
            await settled(pilot)
            assert names(pilot)


async def test_keys_of_the_app_are_letters_in_a_line_of_text(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("slash", *"mqJ1?")
        await settled(pilot)
        assert pilot.app.query_one("#search", Input).value == "mqJ1?"
        assert len(pilot.app.screen_stack) == 1


def test_groups_add_up() -> None:
    def row(target: str, norm: float) -> ModuleRow:
        return ModuleRow(f"layers.0.{target}", 0, target, "linear", 1, 1.0, 1.0, (1, 1), (1, 1), "F32", frobenius=norm)

    rows = [row("q_proj", 3.0), row("down_proj", 4.0), row("k_proj", float("nan"))]
    assert norms(rows, {"q", "mlp"}) == ([0], [5.0])
    assert norms(rows, {"k"}) == ([], [])


def test_configs_that_differ() -> None:
    assert differences({"r": 1, "a": 2}, {"r": 1, "a": 3, "b": None}) == [("a", "2", "3"), ("b", "–", "None")]


def test_the_command_wants_a_terminal() -> None:
    assert "needs a terminal" in adapterkit("tui").message(2)


def test_the_app_imports_neither_torch_nor_the_client_before_it_is_painted() -> None:
    code = "import adapterkit.tui.app, sys; print({'torch', 'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout == "set()\n"


# --- pictures --------------------------------------------------------------------------------------------------------

Before = Callable[[Pilot[None]], Awaitable[None]]
PICTURES: dict[str, tuple[str, ...]] = {
    "browse": (),
    "overview": ("enter",),
    "layers": ("2", "enter"),
    "spectrum": ("3", "enter"),
    "config": ("4", "enter"),
    "compare": (*["down"] * 4, "space", "down", "space", "c"),
    "strangers": ("space", "space", "c"),
    "merge": ("m",),
    "help": ("question_mark",),
    "base": ("b",),
    "delete": ("delete",),
    "jobs": ("J",),
    "search": ("slash", "t", "i", "n", "y"),
}


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["80x24", "160x48"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]) -> None:
    monkeypatch.chdir(ROOT)

    async def before(pilot: Pilot[None]) -> None:
        await settled(pilot)
        for key in PICTURES[name]:
            await pilot.press(key)
            await settled(pilot)
        for one in pilot.app.screen.query(Input):
            one.cursor_blink = False
        pilot.app.export_screenshot()  # a plot knows its margins when it was drawn once
        await settled(pilot)

    assert snap_compare(AdapterkitApp([Path("fixtures")]), terminal_size=size, run_before=before)
