"""Progress bars for `progress=True`, by tqdm: a widget in a notebook, a line on stderr elsewhere.

>>> adapterkit.merge("base", "adapter", "merged", progress=True)  # and of what it downloads first
>>> for event in adapterkit.run(plan, progress=True): ...  # the same bar, beside the same events
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from adapterkit.hub.locate import on_download
from adapterkit.text import visible


class Show(Protocol):
    """A callback for the progress; `what` changes the bar's description."""

    def __call__(self, done: int, total: int | None, what: str = "") -> None: ...


@contextmanager
def progress_bar(what: str, unit: str, shown: bool = True) -> Iterator[Show]:
    """Yield the callback of a bar in `unit` (tensors, modules or B), drawn if `shown` and there is a stderr."""
    if not shown or sys.stderr is None or sys.stderr.closed:  # as in a service without a console
        yield lambda done, total, what="": None
        return
    from tqdm.auto import tqdm

    in_bytes = unit == "B"
    with tqdm(desc=visible(what), unit=unit if in_bytes else f" {unit}", unit_scale=in_bytes) as line:

        def show(done: int, total: int | None, what: str = "") -> None:
            if what:
                line.set_description(visible(what), refresh=False)
            if total != line.total:
                line.reset(total)
            line.update(done - line.n)

        yield show


@contextmanager
def downloads_shown(shown: bool) -> Iterator[None]:
    """Draw a bar for every download that starts in the context, if `shown`."""
    if not shown:
        yield
        return
    token = on_download.set(partial(progress_bar, unit="B"))
    try:
        yield
    finally:
        on_download.reset(token)
