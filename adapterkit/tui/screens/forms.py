"""Forms and dialogs: an action's arguments and plan, confirmation, a line of text."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, Input

from adapterkit.text import visible
from adapterkit.tui.actions import Action, Field, Values, line
from adapterkit.tui.jobs import output_of
from adapterkit.tui.widgets.checkbox import MarkCheckbox
from adapterkit.tui.widgets.plain import Select, Static

BOX = """
    align: center middle;
    & > Vertical {
        width: 90%; max-width: 100; height: auto; max-height: 95%;
        border: round $accent; background: $surface; padding: 0 1;
    }
    & Horizontal { height: auto; }
    & VerticalScroll { height: auto; max-height: 60vh; }
    & Button { margin: 0 1 0 0; min-width: 10; height: 1; border: none; }
"""


class FormScreen(ModalScreen[list[str] | None]):
    """Fill in an action's arguments, review its plan, and run it; returns the arguments, or None."""

    DEFAULT_CSS = (
        "FormScreen {"
        + BOX
        + """
    & .label { width: 24; height: 1; color: $text-muted; }
    & Input, & Checkbox, & Select { border: none; height: 1; padding: 0 1; }
    & Input { width: 1fr; background: $boost; }
    & Select { width: 1fr; }
    & Checkbox { background: $surface; }
    & #command { height: auto; max-height: 4; color: $text-accent; margin: 1 0 0 0; }
    & #plan { height: auto; max-height: 16; margin: 1 0; }
    }"""
    )
    AUTO_FOCUS = "Input"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "back"),
        Binding("ctrl+s", "go", "continue"),
        Binding("ctrl+y", "copy", "copy command"),
    ]

    def __init__(self, action: Action, values: Values) -> None:
        super().__init__()
        self._action, self._values = action, dict(values)
        self._planning: list[str] | None = None  # the arguments being planned
        self._planned: list[str] | None = None  # the arguments of the plan shown

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._action.label
            with VerticalScroll():
                for field in self._action.fields:
                    with Horizontal():
                        label = "" if field.kind == "flag" else field.label + (" *" if field.needed else "")
                        yield Static(label, classes="label")
                        yield self._widget(field)
            yield Static("", id="command")
            with VerticalScroll():
                yield Static("", id="plan")
            with Horizontal():
                yield Button("Plan" if self._action.plan else "Run", id="go", variant="primary", compact=True)
                yield Button("Back", id="back", compact=True)

    def _widget(self, field: Field) -> Input | Checkbox | Select:
        value, id = self._values.get(field.name, field.default), f"field-{field.name.strip('-')}"
        if field.kind == "flag":
            return MarkCheckbox(field.label, bool(value), id=id, compact=True)
        if field.kind == "choice":
            options = [(choice, choice) for choice in field.choices]
            chosen = str(value) if value in field.choices else Select.NULL
            return Select(options, value=chosen, allow_blank=not field.needed, prompt="keep", id=id, compact=True)
        text = str(value)
        safe = text if visible(text) == text else ""  # control characters must be typed
        return Input(safe, placeholder=field.hint(), id=id, compact=True)

    @property
    def values(self) -> dict[str, str | bool]:
        """The current values of the fields."""
        found: dict[str, str | bool] = {}
        for field in self._action.fields:
            widget = self.query_one(f"#field-{field.name.strip('-')}")
            if isinstance(widget, Checkbox | Input):
                found[field.name] = widget.value
            elif isinstance(widget, Select):
                found[field.name] = widget.value if isinstance(widget.value, str) else ""
        return found

    @property
    def argv(self) -> list[str]:
        """The command line of the form; raises ValueError for an unclosed quote."""
        return self._action.argv(self.values)

    @on(Input.Changed)
    @on(Checkbox.Changed)
    @on(Select.Changed)
    def _changed(self) -> None:
        argv = None
        try:
            argv = self.argv
            self.query_one("#command", Static).update(line(argv))
        except ValueError as error:
            self.query_one("#command", Static).update(str(error))
        if argv != (self._planning or self._planned or argv):
            self._planning = self._planned = None
            self.workers.cancel_node(self)  # the plan is outdated
            self.query_one("#plan", Static).update("")
            self.query_one("#go", Button).label = "Plan"

    @on(Input.Submitted)
    def _next(self) -> None:
        self.focus_next()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "go":
            self.action_go()
        else:
            self.dismiss(None)

    def action_copy(self) -> None:
        """Copy the command, quoted for a shell."""
        self.app.copy_to_clipboard(line(self.argv))
        self.notify("Command copied.")

    def action_go(self) -> None:
        """Show the plan, or run the planned command."""
        plan = self.query_one("#plan", Static)
        try:
            argv = self.argv
        except ValueError as error:
            plan.update(f"{error}: close the quote")
            return
        if missing := self._action.missing(self.values):
            plan.update(f"Required: {', '.join(missing)}")
        elif not self._action.plan or self._planned == argv:
            self.dismiss(argv)
        elif self._planning != argv:
            self._planning, self._planned = argv, None
            plan.update("planning …")
            self._plan(argv)

    @work(exclusive=True, exit_on_error=False)
    async def _plan(self, argv: list[str]) -> None:
        code, text = await output_of([*argv, *self._action.plan])
        if not self.is_mounted:
            return
        self._planning = None
        self.query_one("#plan", Static).update(text)
        if code == 0:
            self._planned = argv
            self.query_one("#go", Button).label = "Run"
            self.query_one("#go", Button).focus()


class ConfirmScreen(ModalScreen[bool]):
    """A yes-or-no question; the default is no."""

    DEFAULT_CSS = (
        "ConfirmScreen {" + BOX + " & > Vertical { max-width: 70; } & Static { padding: 1 0; height: auto; } }"
    )
    AUTO_FOCUS = "Button"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "dismiss(False)", "no"),
        Binding("y", "dismiss(True)", "yes"),
    ]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question, self._yes = question, yes

    def compose(self) -> ComposeResult:
        with Vertical():
            with VerticalScroll():
                yield Static(self._question)
            with Horizontal():
                yield Button("No", id="no", variant="primary", compact=True)
                yield Button(self._yes, id="yes", variant="error", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer."""
        self.dismiss(event.button.id == "yes")


class AskScreen(ModalScreen[str | None]):
    """A dialog for a line of text."""

    DEFAULT_CSS = "AskScreen {" + BOX + " & Input { margin: 1 0; } }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "back")]

    def __init__(self, title: str, value: str, placeholder: str) -> None:
        super().__init__()
        self._title, self._value, self._placeholder = title, value, placeholder

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._title
            yield Input(self._value, placeholder=self._placeholder, compact=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Answer."""
        self.dismiss(event.value.strip())
