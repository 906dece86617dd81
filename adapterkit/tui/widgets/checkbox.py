"""A checkbox that shows its state without colours."""

from __future__ import annotations

from textual.widgets import Checkbox


class MarkCheckbox(Checkbox):
    """A checkbox with a mark only while it is on; Textual's shows the state by colour alone."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        return "x" if self.value else " "
