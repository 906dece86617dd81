"""Pass results from a thread to the app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.app import App
from textual.worker import get_current_worker


def hand_over(app: App[Any], show: Callable[..., object], *results: object) -> None:
    """Call `show` in the app's thread, unless the worker is cancelled by then."""
    worker = get_current_worker()

    def call() -> None:
        if not worker.is_cancelled:
            show(*results)

    app.call_from_thread(call)
