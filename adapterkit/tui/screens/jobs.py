"""The jobs screen: progress and output of all jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer
from textual_plot import HiResMode

from adapterkit.tui.jobs import Job
from adapterkit.tui.widgets.charts import Plot
from adapterkit.tui.widgets.job_bar import SIGNS, STYLES, progress_text
from adapterkit.tui.widgets.plain import Static, Table


class JobsScreen(Screen[None]):
    """All jobs, the output of the highlighted one, and its losses if it trains."""

    DEFAULT_CSS = """
    JobsScreen > DataTable { height: auto; min-height: 4; max-height: 30%; border: round $foreground 30%; }
    JobsScreen > VerticalScroll { height: 1fr; border: round $foreground 30%; padding: 0 1; }
    JobsScreen > Plot { height: 2fr; display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,J", "dismiss", "back"),
        Binding("x", "cancel", "cancel"),
        Binding("y", "copy", "copy command"),
        Binding("j", "down", show=False),
        Binding("k", "up", show=False),
    ]

    @dataclass
    class Cancel(Message):
        """Requests the cancellation of a job."""

        job: Job

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__()
        self.jobs = jobs  # the app's list, which grows

    def compose(self) -> ComposeResult:
        yield Table(cursor_type="row")
        yield Plot()
        with VerticalScroll():
            yield Static("", id="said")
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one(Table)
        table.border_title = "jobs"
        table.add_column("", key="sign")
        table.add_column("progress", key="progress")
        table.add_column("command", key="command")
        self.refresh_jobs()
        table.move_cursor(row=len(self.jobs) - 1, animate=False)
        self.set_interval(0.5, self.refresh_jobs)

    @property
    def current(self) -> Job | None:
        """The highlighted job."""
        at = self.query_one(Table).cursor_row
        return self.jobs[at] if 0 <= at < len(self.jobs) else None

    def refresh_jobs(self) -> None:
        """Redraw the jobs."""
        table = self.query_one(Table)
        for number, job in enumerate(self.jobs):
            cells = {
                "sign": Text(SIGNS[job.state], STYLES[job.state]),
                "progress": progress_text(job),
                "command": job.command,
            }
            if number >= table.row_count:
                table.add_row(*cells.values(), key=str(number))
            else:
                for column, cell in cells.items():
                    table.update_cell(str(number), column, cell, update_width=True)
        self._say()

    def on_data_table_row_highlighted(self) -> None:
        """Show the output of the highlighted job."""
        self._say()

    def _say(self) -> None:
        job = self.current
        if job is None:
            self.query_one("#said", Static).update("No jobs yet. Press m to merge, o to combine, d to download.")
            return
        said = "\n".join([job.command, "", *job.said, *job.out.splitlines()])
        self.query_one("#said", Static).update(said)
        plot = self.query_one(Plot)
        plot.display = len(job.losses) > 1
        if plot.display:
            plot.clear()
            plot.plot(list(range(1, len(job.losses) + 1)), job.losses, "cyan", HiResMode.BRAILLE)
            plot.set_xlabel("step")
            plot.set_ylabel("loss")

    def action_cancel(self) -> None:
        """Cancel the highlighted job."""
        if self.current is not None:
            self.post_message(self.Cancel(self.current))

    def action_copy(self) -> None:
        """Copy the command of the highlighted job."""
        if self.current is not None:
            self.app.copy_to_clipboard(self.current.command)
            self.notify("Command copied.")

    def action_down(self) -> None:
        """Move to the next job."""
        self.query_one(Table).action_cursor_down()

    def action_up(self) -> None:
        """Move to the previous job."""
        self.query_one(Table).action_cursor_up()
