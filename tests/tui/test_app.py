"""The app as a whole: its help, mouse, palette, themes and keys, and what it needs to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from handmade import adapterkit
from textual.widgets import Input, Static

from adapterkit.tui.actions import ACTIONS
from adapterkit.tui.screens.forms import AskScreen, FormScreen
from adapterkit.tui.screens.help import HelpScreen
from tui.driver import names, running, settled, text_of


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


def test_the_command_wants_a_terminal() -> None:
    assert "needs a terminal" in adapterkit("tui").message(2)


def test_the_app_imports_neither_torch_nor_the_client_before_it_is_painted() -> None:
    code = "import adapterkit.tui.app, sys; print({'torch', 'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout == "set()\n"
