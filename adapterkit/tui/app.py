"""The app: sources, adapters and details in three panes; forms that run commands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.filter import LineFilter
from textual.screen import Screen
from textual.widgets import Footer, Input
from textual.worker import Worker, WorkerState

from adapterkit.errors import AdapterkitError
from adapterkit.hub.adapter_listing import AdapterEntry
from adapterkit.hub.local_removal import Removal, plan_removal, remove
from adapterkit.text import counted, size, visible, visible_lines
from adapterkit.tui.actions import ACTIONS, line
from adapterkit.tui.browser import Browser
from adapterkit.tui.jobs import Job
from adapterkit.tui.screens.compare import CompareScreen
from adapterkit.tui.screens.detail import TABS, Detail
from adapterkit.tui.screens.forms import AskScreen, ConfirmScreen, FormScreen
from adapterkit.tui.screens.help import HelpScreen, keys_here
from adapterkit.tui.screens.jobs import JobsScreen
from adapterkit.tui.system_info import machine, who
from adapterkit.tui.threads import hand_over
from adapterkit.tui.widgets.adapter_table import AdapterTable
from adapterkit.tui.widgets.job_bar import JobBar
from adapterkit.tui.widgets.plain import ControlFilter, Static

REDRAW_INTERVAL = 0.1  # seconds between redraws of a running job
THREADS = 64  # for slow Hub requests; asyncio has 6 on a small machine, which would block everything else
IN_FOOTER = ("merge", "unmerge", "combine", "pull")  # the others are in the help and the palette


class AdapterkitApp(App[None]):
    """Browse and inspect adapters, and run commands on them."""

    TITLE = "adapterkit"
    CSS = """
    #top { height: 1; background: $primary-background; padding: 0 1; }
    #banner { height: auto; background: $warning-muted; color: $text-warning; padding: 0 1; display: none; }
    .-narrow #detail, .-small #detail, .-small Sources { display: none; }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-small"), (60, "-narrow"), (100, "-wide")]  # noqa: RUF012 (Textual's type)
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(action.key, f"act('{action.command}')", action.command, show=action.command in IN_FOOTER)
            for action in ACTIONS.values()
        ),
        *(Binding(str(number), f"tab('{name}')", name, show=False) for number, name in enumerate(TABS, 1)),
        Binding("c", "compare", "compare"),
        Binding("b", "base", "base", show=False),
        Binding("y", "copy", "copy command", show=False),
        Binding("J", "jobs", "jobs", show=False),
        Binding("x", "cancel", "cancel", show=False),
        Binding("r", "refresh", "refresh", show=False),
        Binding("delete", "delete", "delete", show=False),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def __init__(self, folders: Sequence[Path], base: str = "") -> None:
        super().__init__()
        self.folders, self.base = [folder.expanduser() for folder in folders], base
        self.jobs: list[Job] = []
        self._user = "…"
        self._last_drawn = 0.0

    def compose(self) -> ComposeResult:
        yield Static("", id="top")
        yield Static("", id="banner")
        yield Browser(self.folders, self.base)
        yield JobBar()
        yield Footer()

    def on_mount(self) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        logging.getLogger("adapterkit").addHandler(_Notifier(self))
        self._top()
        self._who()
        self.set_interval(1.0, self._draw_jobs)  # updates the clock of running jobs

    @property
    def browser(self) -> Browser:
        """The panes, below any other screen."""
        return self.screen_stack[0].query_one(Browser)

    @property
    def table(self) -> AdapterTable:
        """The table of adapters."""
        return self.browser.table

    # --- the top line ------------------------------------------------------------------------------------------------

    def _top(self) -> None:
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append("adapterkit", "bold").append(f"   base: {visible(self.base) or 'none (b)'} ▾")
        text.append(f"   {self._user}   {machine()}", "dim")
        self.screen_stack[0].query_one("#top", Static).update(text)

    @on(Click, "#top")
    def _top_clicked(self) -> None:
        self.action_base()

    @work(thread=True, exclusive=True, group="who", exit_on_error=False)
    def _who(self) -> None:
        user, banner = who()
        hand_over(self, self._show_user, user, banner)

    def _show_user(self, user: str, banner: str) -> None:
        self._user = user
        self._top()
        self._banner(banner)

    def _banner(self, text: str) -> None:
        banner = self.screen_stack[0].query_one("#banner", Static)
        banner.update(text)
        banner.display = bool(text)

    # --- actions -----------------------------------------------------------------------------------------------------

    def action_act(self, command: str) -> None:
        """Open the form of an action, and run the command that it returns."""
        action = ACTIONS[command]
        values = action.suggested([row.name for row in self.table.chosen], self.base)
        self.push_screen(FormScreen(action, values), self.run_job)

    def run_job(self, argv: list[str] | None) -> None:
        """Run a command as a job."""
        if argv is not None:
            job = Job(argv)
            self.jobs.append(job)
            self._draw_jobs()
            self._run(job)

    @work(exit_on_error=False, group="jobs")
    async def _run(self, job: Job) -> None:
        await job.run(lambda: self._job_changed(job))
        self._job_changed(job, ended=True)

    def _job_changed(self, job: Job, ended: bool = False) -> None:
        if ended or time.monotonic() - self._last_drawn > REDRAW_INTERVAL:
            self._draw_jobs()
        if ended:
            severity = "information" if job.state == "done" else "warning" if job.state == "cancelled" else "error"
            self.notify(f"{job.argv[0]}: {job.state}. {job.result}", severity=severity)
            self._top()
            if self.browser.source.kind == "cache":
                self.browser.find()
            self.browser.look_for_changes()

    def _draw_jobs(self) -> None:
        self._last_drawn = time.monotonic()
        for bar in self.screen_stack[0].query(JobBar):  # none while the app exits
            bar.show(self.jobs)

    def on_jobs_screen_cancel(self, event: JobsScreen.Cancel) -> None:
        """Cancel the job selected on the jobs screen."""
        self.cancel(event.job)

    def cancel(self, job: Job) -> None:
        """Cancel a running job."""
        if job.state == "running":
            self.run_worker(job.cancel(), exit_on_error=False)

    def action_cancel(self) -> None:
        """Cancel the newest running job."""
        if running := [job for job in self.jobs if job.state == "running"]:
            self.cancel(running[-1])

    def action_jobs(self) -> None:
        """Show all jobs."""
        self.push_screen(JobsScreen(self.jobs))

    def action_compare(self) -> None:
        """Compare the two selected adapters."""
        chosen = list(self.table.marked.values())
        if len(chosen) != 2:
            self.notify(f"Select two adapters with space to compare; {len(chosen)} selected.", severity="warning")
            return
        self.push_screen(CompareScreen(*chosen))

    def action_base(self) -> None:
        """Choose the base."""
        ask = AskScreen("base", self.base, "a folder or ORG/NAME; empty for none")
        self.push_screen(ask, self._set_base)

    def _set_base(self, base: str | None) -> None:
        if base is not None:
            self.base = base
            self._top()
            self.browser.set_base(base)

    def action_copy(self) -> None:
        """Copy the command that inspects the highlighted adapter."""
        row = self.table.current
        argv = ["list", *map(str, self.folders)] if row is None else ["inspect", row.name]
        argv += ["--against", self.base] if row is not None and self.base else []
        self.copy_to_clipboard(line(argv))
        self.notify(line(argv), title="copied")

    def action_delete(self) -> None:
        """Delete the highlighted adapter from this disk, after two confirmations."""
        row = self.table.current
        if row is None or row.path is None:
            self.notify("Only local adapters can be deleted here.", severity="warning")
        else:
            self._plan_removal(row)

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def _plan_removal(self, row: AdapterEntry) -> None:
        """Plan the removal, and ask for confirmation."""
        try:
            plan = plan_removal(row)
        except (AdapterkitError, OSError) as error:
            self.call_from_thread(self.notify, str(error), severity="error")
        else:
            hand_over(self, self._ask_to_remove, plan)

    def _ask_to_remove(self, plan: Removal) -> None:
        lines = "\n".join(plan.lines)

        def delete(yes: bool | None) -> None:
            if yes:
                self._remove(plan)

        def ask_again(yes: bool | None) -> None:
            if yes:
                question = f"{lines}\n\nThis cannot be undone. Delete?"
                self.push_screen(ConfirmScreen(question, "Delete permanently"), delete)

        question = f"Delete {visible(plan.name)} from this disk?\n\n{lines}"
        self.push_screen(ConfirmScreen(question, "Delete"), ask_again)

    @work(thread=True, group="remove", exit_on_error=False)
    def _remove(self, plan: Removal) -> None:
        """Remove it, and report the removed files."""
        try:
            done = remove(plan)
        except (AdapterkitError, OSError) as error:
            self.call_from_thread(self.notify, str(error), severity="error")
            return
        remaining = f"; {', '.join(done.remaining[:3])} not removed" if done.remaining else ""
        self.call_from_thread(self.notify, f"removed {counted(len(done.files), 'file')}, {size(done.bytes)}{remaining}")
        self.call_from_thread(self.table.drop, [plan.name])

    def action_tab(self, name: str) -> None:
        """Switch to a tab of the detail on the current screen."""
        for detail in self.screen.query(Detail):
            detail.turn_to(name)

    def action_refresh(self) -> None:
        """Read the source again, and check the Hub user."""
        self.browser.refresh_rows()
        self._who()

    def action_help(self) -> None:
        """Show the keys of this screen."""
        self.push_screen(HelpScreen(keys_here(self)))

    async def action_quit(self) -> None:
        """Quit; asks first if jobs are running."""
        running = [job for job in self.jobs if job.state == "running"]
        if not running:
            self.exit()
            return
        jobs = "A job is running" if len(running) == 1 else f"{len(running)} jobs are running"
        self.push_screen(ConfirmScreen(f"{jobs}. Cancel and quit?", "Cancel and quit"), self._quit_confirmed)

    def _quit_confirmed(self, yes: bool | None) -> None:
        if yes:
            self._cancel_and_quit()

    @work(exit_on_error=False)
    async def _cancel_and_quit(self) -> None:
        await asyncio.gather(*(job.cancel() for job in self.jobs if job.state == "running"))
        self.exit()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: Textual's commands and every action."""
        yield from super().get_system_commands(screen)
        for action in ACTIONS.values():
            yield SystemCommand(
                action.label, f"adapterkit {action.command}", lambda a=action: self.action_act(a.command)
            )
        for label, about, call in (
            ("Compare selected", "Compare two adapters side by side", self.action_compare),
            ("Choose base", "Set the base that adapters are checked against", self.action_base),
            ("Copy command", "Copy the command that inspects the highlighted adapter", self.action_copy),
            ("Jobs", "Show running and finished jobs", self.action_jobs),
            ("Refresh", "Read the source again", self.action_refresh),
            ("Delete", "Delete the highlighted adapter from this disk", self.action_delete),
        ):
            yield SystemCommand(label, about, call)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's filters, after ours."""
        return [ControlFilter(), *super().get_line_filters()]

    def notify(self, message: str, *, title: str = "", markup: bool = False, **about: Any) -> None:
        """Show a notification in plain text."""
        super().notify(visible_lines(message), title=visible(title), markup=False, **about)

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """Report the failure of a thread instead of exiting."""
        if event.state == WorkerState.ERROR:
            self.notify(f"{type(event.worker.error).__name__}: {event.worker.error}", severity="error")

    def on_key(self, event: object) -> None:
        """Escape leaves the search line."""
        if getattr(event, "key", "") == "escape" and isinstance(self.focused, Input):
            self.table.query_one("DataTable").focus()


class _Notifier(logging.Handler):
    """Shows the library's log messages as notifications, not on the terminal."""

    def __init__(self, app: AdapterkitApp) -> None:
        super().__init__()
        self._app = app

    def emit(self, record: logging.LogRecord) -> None:
        self._app.notify(record.getMessage(), severity="warning")
