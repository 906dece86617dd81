"""A box that is ticked or empty, also where there are no colours."""

from __future__ import annotations

from textual.widgets import Checkbox


class Tick(Checkbox):
    """A checkbox whose mark is there only while it is on: Textual's own tells by the colour alone."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        return "x" if self.value else " "
