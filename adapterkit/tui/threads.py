"""How a thread of the app hands over what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.app import App
from textual.worker import get_current_worker


def hand_over(app: App[Any], show: Callable[..., object], *found: object) -> None:
    """Call `show` in the app's own thread, unless the worker was cancelled; a look before that would be too early."""
    worker = get_current_worker()

    def call() -> None:
        if not worker.is_cancelled:
            show(*found)

    app.call_from_thread(call)
