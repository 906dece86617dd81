"""The job bar: the newest job in one line."""

from __future__ import annotations

from rich.text import Text

from adapterkit.text import clock, visible
from adapterkit.tui.jobs import Job
from adapterkit.tui.widgets.plain import Static

SIGNS = {"running": "▶", "done": "✓", "failed": "✗", "cancelled": "■"}
STYLES = {"running": "", "done": "green", "failed": "red", "cancelled": "yellow"}
BAR = 16  # columns


def progress_text(job: Job) -> str:
    """The progress of a job: `merging ███████░ 41%  0:42 left`."""
    if job.state != "running":
        return f"{job.state} after {clock(job.seconds)}"
    if job.cancelling:
        return "cancelling; press x again to kill it"
    if job.share is None:
        return job.doing or "starting"
    bar = "█" * round(job.share * BAR)
    left = "" if job.left is None else f"  {clock(job.left)} left"
    loss = f"  loss {job.losses[-1]:.3f}" if job.losses else ""
    return f"{job.doing} {bar:░<{BAR}} {job.share:.0%}{loss}{left}"


class JobBar(Static):
    """The newest job, and the number of jobs."""

    DEFAULT_CSS = "JobBar { height: 1; background: $panel; padding: 0 1; } JobBar.idle { display: none; }"

    def __init__(self) -> None:
        super().__init__("", id="jobs", classes="idle")

    def show(self, jobs: list[Job]) -> None:
        """Draw the newest of `jobs`."""
        self.set_class(not jobs, "idle")
        if not jobs:
            return
        running = [job for job in jobs if job.state == "running"]
        job = (running or jobs)[-1]
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{SIGNS[job.state]} {job.argv[0]} ", STYLES[job.state]).append(progress_text(job))
        if job.state == "failed":
            text.append(visible(f": {job.result}"))
        text.append(f"   {len(running)} running, {len(jobs)} total: J" if len(jobs) > 1 else "   J jobs", "dim")
        if running:
            text.append("  x cancel", "dim")
        self.update(text)
