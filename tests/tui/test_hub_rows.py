"""The Hub and its cache in the app: pages, headers, and a Hub that is out of order or away."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade import adapterkit
from hubserver import Hub
from textual.widgets import DataTable, Static

from adapterkit.text import size
from adapterkit.tui import app as module
from adapterkit.tui import system_info
from adapterkit.tui.widgets.sources import Sources
from tui.driver import BASE, facts, names, on_hub, running, settled, text_of


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
