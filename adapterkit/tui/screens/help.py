"""The help screen with the keys."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from adapterkit.tui.actions import ACTIONS
from adapterkit.tui.widgets.plain import Static

KEYS = {
    "navigation": {
        "j k, arrows": "down, up", "tab": "next pane", "enter": "open details", "/": "search (escape to leave)",
        "s": "sort by the next column", "1–5": "overview, layers, spectrum, config, card",
        "Q K V O L": "toggle q, k, v, o, mlp (layers)",
    },
    "adapters": {
        "space": "select", "c": "compare two selected", "y": "copy the inspect command", "delete": "delete",
        "b": "choose the base", "r": "refresh",
    },
    "actions": {action.key: action.label for action in ACTIONS.values()},
    "jobs": {"J": "all jobs", "x": "cancel the newest"},
    "app": {"ctrl+p": "all actions and themes", "?": "help", "q": "quit"},
}  # fmt: skip
SIGNS = "● local   ◐ partly local   ○ on the Hub   ✗ broken   * selected"


def keys_here(app: App[Any]) -> dict[str, str]:
    """The keys of the current screen and pane, as displayed, with their descriptions."""
    keys = {}
    for active in app.screen.active_bindings.values():
        ours = type(active.node).__module__.startswith("adapterkit.") and active.node is not app
        own = {key for binding in vars(type(active.node)).get("BINDINGS", ()) for key in binding.key.split(",")}
        if ours and active.binding.key in own and active.binding.description:
            keys[app.get_key_display(active.binding)] = active.binding.description
    return keys


class HelpScreen(ModalScreen[None]):
    """The keys: those of the current screen first, then all others by purpose."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > VerticalScroll {
        width: 90%; max-width: 76; height: auto; max-height: 95%;
        border: round $accent; background: $surface; padding: 0 1;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss", "back")]

    def __init__(self, here: dict[str, str]) -> None:
        super().__init__()
        self._here = here

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = "keys"
            yield Static(_text(self._here))


def _text(here: dict[str, str]) -> str:
    lines = [SIGNS]
    for about, keys in {"here": here, **KEYS}.items():
        lines += ["", about, *(f"  {key:12} {what}" for key, what in keys.items())]
    return "\n".join(lines)
