"""The app by its keys: folders, rows, what is shown of one, and any name and any terminal; jobs are real commands."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import toyformat
from handmade import adapterkit, write_adapter
from hostile import FOLDER, steering, write_hostile_adapter, write_hostile_base
from safetensors.torch import load_file, save_file
from textual.pilot import Pilot
from textual.widgets import DataTable, Markdown, Select, Static, TabbedContent

from adapterkit.adapter.fingerprint import encoded
from adapterkit.adapter.formats import load, save, table
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.fingerprint import fingerprint
from adapterkit.hub.adapter_listing import AdapterEntry, list_folders
from adapterkit.inspection import cache
from adapterkit.inspection.module_rows import ModuleRow
from adapterkit.tui import browser
from adapterkit.tui.details import Details, changes
from adapterkit.tui.screens.detail import Detail, DetailScreen
from adapterkit.tui.screens.forms import FormScreen
from adapterkit.tui.widgets import adapter_table
from adapterkit.tui.widgets.adapter_table import AdapterTable
from adapterkit.tui.widgets.charts import Layers, Plot, Spectrum, norms
from adapterkit.tui.widgets.sources import Source, Sources
from tui.driver import BASE, NARROW, TINY, WIDE, drawn, ended, facts, names, running, settled, text_of


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


async def test_what_stands_out_is_in_the_overview(folder: Path) -> None:
    """Other weights of the base at once, and figures of the weights once they are measured."""
    tensors = load_file(folder / "two" / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.zeros_like(tensors[name])
    rows = {tensor: (kind, "0" * 16) for tensor, (kind, _) in fingerprint(open_checkpoint(Path("base"))).items()}
    save_file(tensors, folder / "two" / "adapter_model.safetensors", encoded(rows))
    async with running(folder, base="base") as pilot:
        await pilot.press("j", "j")
        await settled(pilot)
        assert "0 of 4 compared rows of its weights equal" in facts(pilot)
        assert "made for other weights than those of base" in facts(pilot) and "B = 0" not in facts(pilot)
        await pilot.press("2")
        await settled(pilot)
        assert "1 of 4 modules have B = 0" in facts(pilot)
        await pilot.press("k")
        await settled(pilot)
        assert "B = 0" not in facts(pilot) and "other weights" not in facts(pilot)


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


def test_groups_add_up() -> None:
    def row(target: str, norm: float) -> ModuleRow:
        return ModuleRow(f"layers.0.{target}", 0, target, "linear", 1, 1.0, 1.0, (1, 1), (1, 1), "F32", frobenius=norm)

    rows = [row("q_proj", 3.0), row("down_proj", 4.0), row("k_proj", float("nan"))]
    assert norms(rows, {"q", "mlp"}) == ([0], [5.0])
    assert norms(rows, {"k"}) == ([], [])
