"""What is done with rows: compared, copied, deleted; and commands: their forms, plans and jobs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handmade import adapterkit, contents
from hubserver import Hub
from textual.pilot import Pilot
from textual.widgets import Button, DataTable, Input, Static

from adapterkit.tui import app as module
from adapterkit.tui.actions import ACTIONS, line
from adapterkit.tui.jobs import Job
from adapterkit.tui.screens.compare import CompareScreen, differences
from adapterkit.tui.screens.forms import ConfirmScreen, FormScreen
from adapterkit.tui.screens.jobs import JobsScreen
from adapterkit.tui.widgets.charts import Plot
from adapterkit.tui.widgets.job_bar import JobBar, progress_text
from tui.driver import ended, names, on_hub, running, settled, text_of

# --- marks, comparing, copying ---------------------------------------------------------------------------------------


async def test_compare_wants_two(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "space", "c")
        assert not isinstance(pilot.app.screen, CompareScreen)
        await pilot.press("space", "c")
        await settled(pilot)
        assert isinstance(pilot.app.screen, CompareScreen)
        said = text_of(pilot.app.screen.query_one("#what", Static))
        assert "4 modules in both; cosine +1.000" in said
        assert pilot.app.screen.query_one("#layers", DataTable).row_count == 3
        configs = pilot.app.screen.query_one("#configs", DataTable)
        assert [str(cell) for cell in configs.get_row_at(0)] == ["lora_alpha", "6", "9"]
        assert len(pilot.app.screen.query_one(Plot)._datasets) == 2
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, CompareScreen)


async def test_compare_with_what_is_broken(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("space", "space", "c")
        await settled(pilot)
        assert "broken" in text_of(pilot.app.screen.query_one("#what", Static))


def test_configs_that_differ() -> None:
    assert differences({"r": 1, "a": 2}, {"r": 1, "a": 3, "b": None}) == [("a", "2", "3"), ("b", "–", "None")]


async def test_y_copies_the_command(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("j", "y")
        assert pilot.app.clipboard == "adapterkit inspect mine/one --against base"


async def test_delete_shows_what_goes_and_asks_twice(folder: Path) -> None:
    (folder / "one" / "notes.txt").write_text("mine")
    async with running(folder) as pilot:

        async def press(*keys: str) -> None:
            for key in keys:
                await pilot.press(key)
                await settled(pilot)

        await press("j", "delete")
        assert isinstance(pilot.app.screen, ConfirmScreen)
        asked = text_of(pilot.app.screen.query_one(Static))
        assert "adapter_model.safetensors" in asked
        assert "The folder stays: it also contains notes.txt." in asked
        await press("enter")  # which is no
        assert (folder / "one" / "adapter_config.json").is_file()
        await press("delete", "y", "n")
        assert (folder / "one" / "adapter_config.json").is_file()
        await press("delete", "y", "y")
        assert os.listdir(folder / "one") == ["notes.txt"]
        assert names(pilot) == ["mine/broken", "mine/two"]
        assert "removed 3 files" in str([notice.message for notice in pilot.app._notifications])
        (folder / "broken" / ".git").mkdir()
        await press("k", "k", "delete")
        assert not isinstance(pilot.app.screen, ConfirmScreen)
        assert (folder / "broken" / "adapter_model.safetensors").is_file()


async def test_what_is_to_be_deleted_is_whatever_is_asked_about_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), module.remove
    monkeypatch.setattr(module, "remove", lambda plan: real(plan) if go.wait(60) else None)
    async with running(folder) as pilot:
        try:
            await pilot.press("j", "delete")
            await settled(pilot)
            await pilot.press("y", "y", "j", "delete", "delete")
            while any(worker.group == "plan" and worker.is_running for worker in pilot.app.workers):
                await pilot.pause(0.002)
            [removing] = [worker for worker in pilot.app.workers if worker.group == "remove"]
            assert not removing.is_cancelled
            assert "mine/two" in text_of(pilot.app.screen.query_one(Static))
            await pilot.press("n")
            assert len(pilot.app.screen_stack) == 1
        finally:
            go.set()
        await settled(pilot)
        assert not (folder / "one").exists()
        assert (folder / "two").exists()


# --- doing -----------------------------------------------------------------------------------------------------------


async def test_merge_watch_unmerge(folder: Path) -> None:
    before = contents(Path("base"))
    async with running(folder, base="base") as pilot:
        await pilot.press("j", "m")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["merge", "base", "mine/one", "-o", "one-merged"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        plan = text_of(form.query_one("#plan", Static))
        assert "all 4 modules match the base" in plan
        assert not Path("one-merged").exists()
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert (job.state, job.code) == ("done", 0), job
        assert job.result == "wrote     one-merged"
        assert "✓ merge done" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("u")
        pilot.app.screen.query_one("#field-merged", Input).value = "one-merged"
        pilot.app.screen.query_one("#field-o", Input).value = "again"
        await pilot.pause()
        await pilot.press("ctrl+s")
        await settled(pilot)
        assert "restores  4 of 6 tensors, changed by one" in text_of(pilot.app.screen.query_one("#plan", Static))
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
    again = contents(Path("again"))
    assert {name: again[name] for name in before} == before


async def test_a_plan_is_made_once_and_only_of_what_is_asked_for_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow: Path
) -> None:
    begun: list[Job] = []
    real = Job.run

    async def run(self: Job, changed: Callable[[], None]) -> None:
        begun.append(self)
        await real(self, changed)

    monkeypatch.setattr(Job, "run", run)
    async with running(folder, base="base") as pilot:

        async def planning(many: int) -> None:
            while len(begun) < many:
                await pilot.pause(0.002)
            await said(pilot, begun[-1])

        await pilot.press("j", "m", "ctrl+s", "ctrl+s")
        await planning(1)
        await pilot.press("ctrl+s")
        form = pilot.app.screen
        assert len(begun) == 1
        assert "planning" in text_of(form.query_one("#plan", Static))
        form.query_one("#field-o", Input).value = "elsewhere"
        await settled(pilot)
        assert text_of(form.query_one("#plan", Static)).strip() == ""
        assert begun[0].process is not None
        assert await begun[0].process.wait() == 130
        assert slow.exists()
        assert str(form.query_one("#go", Button).label) == "Plan"
        await pilot.press("ctrl+s")
        await planning(2)
        await pilot.press("escape")
    assert begun[1].process is not None
    assert await begun[1].process.wait() == 130


async def test_a_plan_that_fails_is_told_and_nothing_runs(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("m", "ctrl+s")
        await settled(pilot)
        assert "broken" in text_of(pilot.app.screen.query_one("#plan", Static))
        assert str(pilot.app.screen.query_one("#go", Button).label) == "Plan"
        assert not pilot.app.jobs


async def test_what_is_not_filled_in_is_asked_for(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "m")
        pilot.app.screen.query_one("#field-adapters", Input).value = ""
        await pilot.pause()
        await pilot.press("ctrl+s")
        assert "Required: adapters" in text_of(pilot.app.screen.query_one("#plan", Static))
        pilot.app.screen.query_one("#field-adapters", Input).value = "'open"
        await pilot.pause()
        await pilot.press("ctrl+s")
        assert "close the quote" in text_of(pilot.app.screen.query_one("#plan", Static))


async def test_combine_takes_the_marked(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("j", "space", "space", "o")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["combine", "mine/one", "mine/two", "-o", "one-combine", "--method", "linear"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        assert "4 modules, checked" in text_of(form.query_one("#plan", Static))
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
        assert Path("one-combine/adapter_model.safetensors").is_file()


async def test_every_form_opens_and_closes(folder: Path) -> None:
    async with running(folder, base="base") as pilot:
        await pilot.press("j")
        for command, action in ACTIONS.items():
            await pilot.press(action.key)
            form = pilot.app.screen
            assert isinstance(form, FormScreen), command
            assert form.argv[0] == command
            await pilot.press("ctrl+y")
            assert pilot.app.clipboard == line(form.argv)
            await pilot.press("escape")
            assert not isinstance(pilot.app.screen, FormScreen), command


@pytest.mark.parametrize("command", ACTIONS)
def test_every_field_is_an_argument_of_its_command(command: str) -> None:
    """The forms and the command line cannot part: each option is one that the command has."""
    said = adapterkit(command, "--help").out
    for field in ACTIONS[command].fields:
        assert not field.name.startswith("-") or field.name in said, field
        if field.kind == "choice" and "[" in said:
            for choice in field.choices:
                assert choice in said or field.name == "--method", choice
    for option in ACTIONS[command].plan:
        assert option in said


async def test_pull_and_push(there: Hub, folder: Path) -> None:
    async with running(folder) as pilot:
        await on_hub(pilot)
        await pilot.press("d")
        form = pilot.app.screen
        assert isinstance(form, FormScreen)
        assert form.argv == ["pull", "some/lora-000"]
        await pilot.press("ctrl+s")
        await settled(pilot)
        await pilot.press("ctrl+s")
        job = await ended(pilot)
        assert job.state == "done", job
        await pilot.press("r")
        await settled(pilot)
        marks = [str(pilot.app.table.query_one(DataTable).get_row(f"some/lora-00{n}")[0]) for n in (0, 1)]
        assert ["●" in marks[0], "○" in marks[1]] == [True, True]
        pilot.app.run_job(["push", "mine/two", "me/two"])
        job = await ended(pilot)
        assert job.state == "done", job
        assert "adapter_model.safetensors" in there.repos["me/two"].files()


async def test_a_job_that_fails_says_why(folder: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["merge", "base", "mine/broken", "-o", "out"])
        job = await ended(pilot)
        assert (job.state, job.code) == ("failed", 1)
        assert "mine/broken" in job.result
        assert "✗ merge failed" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("J")
        assert isinstance(pilot.app.screen, JobsScreen)
        assert "mine/broken" in text_of(pilot.app.screen.query_one("#said", Static))
        await pilot.press("y")
        assert pilot.app.clipboard == "adapterkit merge base mine/broken -o out"
        await pilot.press("escape")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A command that says how far it is, and then waits until it is ended by ctrl-C, which it notes in a file."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print(json.dumps({'progress': 'training', 'done': 1, 'total': 4, 'loss': 2.5}), file=sys.stderr, flush=True)\n"
        "print(json.dumps({'progress': 'training', 'done': 2, 'total': 4, 'loss': 1.5}), file=sys.stderr, flush=True)\n"
        "try:\n    print('a word', file=sys.stderr, flush=True)\n    signal.pause()\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'tidied')!r}, 'w').close()\n    sys.exit(130)\n"
    )
    real = module.Job.run

    async def run(self: Job, changed: Callable[[], None]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(tmp_path / "python"))
            await real(self, changed)

    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(module.Job, "run", run)
    yield tmp_path / "tidied"


async def said(pilot: Pilot[None], job: Job) -> None:
    """Until the slow command has said all it says."""
    while not job.said:
        await pilot.pause(0.002)


async def test_progress_losses_and_cancelling(folder: Path, slow: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["train", "--recipe", "x"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        assert (job.share, job.losses, job.doing) == (0.5, [2.5, 1.5], "training")
        assert "50%" in progress_text(job)
        assert "loss 1.500" in progress_text(job)
        pilot.app._draw_jobs()
        assert "x cancel" in text_of(pilot.app.query_one(JobBar))
        await pilot.press("J")
        await pilot.pause()
        assert pilot.app.screen.query_one(Plot).display
        await pilot.press("x")
        await ended(pilot)
        assert (job.state, job.code) == ("cancelled", 130)
        assert slow.exists()


async def test_a_command_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(folder) as pilot:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        pilot.app.run_job(["merge"])
        job = await ended(pilot)
        assert (job.state, job.result) == ("failed", "cannot start: No such file or directory")


async def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    job = Job(["merge"])
    await job.run(lambda: None)
    assert (job.state, job.said[-1]) == ("done", "last")


async def test_what_does_not_end_is_killed_when_asked_again(folder: Path, slow: Path) -> None:
    script = slow.with_name("slow.py")
    script.write_text(script.read_text().replace("    signal.pause()", "    while True:\n        deaf()"))
    script.write_text(
        "import signal\ndef deaf():\n    try:\n        signal.pause()\n    except BaseException:\n        pass\n"
        + script.read_text()
    )
    async with running(folder) as pilot:
        pilot.app.run_job(["merge"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        await pilot.press("x")
        await pilot.pause()
        assert "press x again to kill it" in progress_text(job)
        await pilot.press("x")
        await ended(pilot)
        assert (job.state, job.code) == ("cancelled", -9)


async def test_quitting_asks_about_jobs(folder: Path, slow: Path) -> None:
    async with running(folder) as pilot:
        pilot.app.run_job(["merge"])
        job = pilot.app.jobs[-1]
        await said(pilot, job)
        await pilot.press("q")
        await pilot.pause()
        assert isinstance(pilot.app.screen, ConfirmScreen)
        await pilot.press("n")
        await pilot.pause()
        assert pilot.app.is_running
        assert job.state == "running"
        await pilot.press("q")
        await pilot.pause()
        await pilot.press("y")
        await ended(pilot)
        assert job.state == "cancelled"
        assert slow.exists()


async def test_quitting_without_jobs(folder: Path) -> None:
    async with running(folder) as pilot:
        await pilot.press("q")
        await settled(pilot)
        assert not pilot.app.is_running


def test_lines_that_are_no_progress_are_kept() -> None:
    job = Job(["merge"])
    for text in ("note: x", '{"progress": ', '{"done": 1}', '{"progress": "a", "done": 3, "total": null}'):
        job.hear(text)
    assert job.said == ["note: x", '{"progress": ', '{"done": 1}']
    assert (job.done, job.share, progress_text(job)) == (3, None, "a")
