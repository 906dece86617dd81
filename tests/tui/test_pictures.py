"""Pictures of every screen, in a narrow and a wide terminal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from adapterkit.tui.app import AdapterkitApp
from tui.driver import NARROW, ROOT, WIDE, settled

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
