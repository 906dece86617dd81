"""Workspaces: recognition, ownership, resuming and removal, and the state of the disk at every step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from handmade import contents
from standins import failing, nth_call

from adapterkit.errors import AdapterkitError, NoSpaceError, OutputExistsError, UsageError
from adapterkit.files import os_calls
from adapterkit.files.staging import RECEIPT, Destination, staged, unfinished_work, workspace_receipts
from adapterkit.files.workspace import MARK, Mark, Workspace, receipt_of, remove_tree, remove_unmarked, workspaces_of

IO = OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Check that no descriptor is left open, since it would hold a lock as long as the app runs."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def dead_workspace(out: Path, job: str | None = None, **how: Any) -> Workspace:
    """Make a workspace as a run that died leaves it."""
    work = Workspace.create(out.parent, Mark(out.name, job, **how))
    work.new.mkdir()
    (work.new / "begun").write_text("")
    work.close()
    return work


def made(out: Path, text: str, **how: Any) -> None:
    """Make the output directory `out`."""
    with staged(Destination(out, overwrite=True, is_ours=lambda _: True), **how) as new:
        (new / "file").write_text(text)


# --- recognizing workspaces ------------------------------------------------------------------------------------------


def moved(path: Path) -> Path:
    return path.rename(path.with_name("elsewhere"))


def marked(mark: Path, what: bytes) -> None:
    mark.write_bytes(what)


SPOILED: dict[str, Callable[[Path], object]] = {
    "the mode of another folder": lambda path: path.chmod(0o700),
    "a mode for all": lambda path: path.chmod(0o1777),
    "a link to one": lambda path: path.symlink_to(moved(path)),
    "no mark": lambda path: (path / MARK).unlink(),
    "a link for a mark": lambda path: (path / MARK).symlink_to(moved(path / MARK)),
    "a pipe for a mark": lambda path: ((path / MARK).unlink(), os.mkfifo(path / MARK)),
    "an empty mark": lambda path: marked(path / MARK, b""),
    "no JSON": lambda path: marked(path / MARK, b'{"adapterkit": "1", "output": "out"'),
    "a list": lambda path: marked(path / MARK, b"[]"),
    "of something else": lambda path: marked(path / MARK, b'{"output": "out"}'),
    "without an output": lambda path: marked(path / MARK, b'{"adapterkit": "1"}'),
    "of no name": lambda path: marked(path / MARK, b'{"adapterkit": "1", "output": null}'),
    "more than it knows": lambda path: marked(path / MARK, b'{"adapterkit": "1", "output": "out", "more": 1}'),
    "a huge one": lambda path: marked(path / MARK, b'{"adapterkit": "1", ' + b" " * (1 << 20) + b'"output": "out"}'),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_an_invalid_workspace_is_left_alone(tmp_path: Path, how: str) -> None:
    work = dead_workspace(tmp_path / "out")
    assert [one.path for one in workspaces_of(tmp_path / "out")] == [work.path]
    SPOILED[how](work.path)
    names = sorted(os.listdir(tmp_path))
    assert Workspace.open(work.path) is None
    made(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out"])
    assert (work.new / "begun").exists()


def test_only_empty_unmarked_folders_are_removed(tmp_path: Path) -> None:
    """A run can die before it writes its mark; a folder that a running one is marking, or with any content, stays."""

    def folder(number: int, mode: int = 0o1700, **files: str) -> Path:
        path = tmp_path / f".adapterkit-0000000{number}"
        path.mkdir()
        path.chmod(mode)
        for name, text in files.items():
            (path / {"mark": MARK}.get(name, name)).write_text(text)
        return path

    gone = [folder(0), folder(1, mark=""), folder(2, mark='{"adap')]
    whole = json.dumps({"adapterkit": "1", "output": "other"})
    stay = [folder(3, 0o700), folder(4, mark="", thesis="x"), folder(5, thesis="x"), folder(6, mark=whole), folder(7, mark="")]  # fmt: skip
    os.mkfifo((pipe := folder(8)) / MARK)
    ((link := folder(9)) / MARK).symlink_to(tmp_path / "nothing")
    gone, stay = [*gone, pipe], [link, *stay]
    (tmp_path / ".adapterkit-longer-than-ours").mkdir(0o1700)
    with open(stay[-1] / MARK) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = {path: contents(path) for path in stay}
        remove_unmarked(tmp_path)
        assert {path: contents(path) for path in stay} == before
    assert not any(path.exists() for path in gone) and (tmp_path / ".adapterkit-longer-than-ours").exists()


def test_the_workspace_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    work = Workspace.create(tmp_path, Mark("out"))
    with pytest.raises(OutputExistsError, match="another adapterkit process is writing to it"):
        made(tmp_path / "out", "second")
    assert work.path.exists() and not (tmp_path / "out").exists()
    made(tmp_path / "other", "beside it")
    assert unfinished_work(tmp_path / "out", "train") is None
    work.close()
    made(tmp_path / "out", "second")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_folder_that_another_run_removed_as_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """If it is removed before it has a mark, or before the mark is locked, another is made."""

    def removed() -> None:
        [path] = tmp_path.glob(".adapterkit-*")
        shutil.rmtree(path)

    owner = os if call == "open" else fcntl
    monkeypatch.setattr(owner, call, nth_call(getattr(owner, call), 1, removed))
    work = Workspace.create(tmp_path, Mark("out"))
    assert list(tmp_path.iterdir()) == [work.path]
    again = Workspace.open(work.path)
    assert again is not None and again.alive and again.mark == work.mark
    work.close()


def test_a_mark_is_private_to_its_user(tmp_path: Path) -> None:
    """For every umask, since whoever can open a file can lock it."""
    before = os.umask(0)
    try:
        work = Workspace.create(tmp_path, Mark("out"))
    finally:
        os.umask(before)
    assert [(work.path / name).stat().st_mode & 0o7777 for name in (".", MARK)] == [0o1700, 0o600]
    work.close()


def test_removing_a_file_that_is_gone_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of an old output, and a mark that could not be written; the disk's error is reported."""
    remove_tree(tmp_path / "gone")

    def fsync(_: int) -> None:
        [mark] = tmp_path.glob(f".adapterkit-*/{MARK}")
        mark.unlink()
        raise IO

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AdapterkitError, match="out: Input/output error"):
        made(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", [os, fcntl], ids=["fsync", "flock"])
def test_a_workspace_that_cannot_be_marked_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    monkeypatch.setattr(owner, "fsync" if owner is os else "flock", failing(IO))
    with pytest.raises(AdapterkitError, match="out: Input/output error"):
        made(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


# --- resuming and removing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("precious", [True, False])
@pytest.mark.parametrize("job", ["mine", "other", None])
def test_a_run_resumes_its_own_job_only(tmp_path: Path, job: str | None, precious: bool, resume: bool) -> None:
    """A precious workspace is removed when its own job starts again, others by any run."""
    work = dead_workspace(tmp_path / "out", "mine", precious=precious)
    assert unfinished_work(tmp_path / "out", "mine") == work.new and unfinished_work(tmp_path / "out", "other") is None
    with staged(Destination(tmp_path / "out"), job=job, resume=resume, precious=precious) as new:
        taken = job == "mine" and resume
        assert (new == work.new) is taken and (new / "begun").exists() is taken
        assert [one.path for one in workspaces_of(tmp_path / "out") if one.alive] == [new.parent]
        assert work.path.exists() is (taken or (precious and job != "mine"))


@pytest.mark.parametrize("hint", ["", "half of it is saved"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EDQUOT, "quota"), OSError(errno.EFBIG, "limit"), IO]
)
def test_the_note_about_unfinished_work(tmp_path: Path, error: BaseException, hint: str) -> None:
    error = type(error)(*error.args)  # a new object, since notes accumulate
    with (
        pytest.raises((KeyboardInterrupt, AdapterkitError)) as raised,
        staged(Destination(tmp_path / "new" / "out"), job="mine", resume_hint=lambda _: hint),
    ):
        raise error
    stopped = isinstance(raised.value, KeyboardInterrupt | NoSpaceError)
    assert stopped is (error.args != IO.args)
    assert getattr(raised.value, "__notes__", []) == [hint or "nothing was written"] * stopped
    assert list(tmp_path.rglob("*") if not hint else tmp_path.glob("new/out")) == []
    assert (unfinished_work(tmp_path / "new" / "out", "mine") is not None) is bool(hint)


def test_the_warning_about_a_workspace_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, staged(Destination(tmp_path / "out")) as new:
        monkeypatch.setattr(shutil, "rmtree", failing(IO))
        raise KeyboardInterrupt
    said = f"{new.parent} could not be removed: Input/output error"
    assert raised.value.__notes__ == [said] and said in caplog.text
    monkeypatch.undo()
    made(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("of", ["a dead_workspace run", "an old output"])
def test_a_workspace_that_cannot_be_removed_does_not_affect_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    out = tmp_path / "out"
    dead_workspace(out) if of == "a dead_workspace run" else made(out, "old")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", failing(IO))
        made(out, "new")
    [left] = {*os.listdir(tmp_path)} - {"out"}
    assert f"{tmp_path / left} could not be removed: Input/output error" in caplog.text
    made(out, "newest")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_read_only_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may have made folders of an old output read-only; simulated, since root ignores that."""
    work, real = dead_workspace(tmp_path / "out"), shutil.rmtree
    (work.new / "a" / "b").mkdir(parents=True)
    (work.new / "a" / "b").chmod(0o500)

    def rmtree(path: Path) -> None:
        if any(not folder.stat().st_mode & 0o200 for folder in path.rglob("*")):
            raise PermissionError
        real(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    made(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("old", [True, False])
def test_ctrl_c_during_a_rename_is_deferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    if old:
        made(tmp_path / "out", "old")
    name = "exchange" if old else "rename_new"
    monkeypatch.setattr(
        os_calls, name, nth_call(getattr(os_calls, name), 1, lambda: signal.raise_signal(signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt) as raised:
        made(tmp_path / "out", "new")
    assert raised.value.__notes__ == [f"{tmp_path}/out is complete"]
    assert contents(tmp_path) == {"out": None, "out/file": b"new"}


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("place", ["out", "out.receipt"])
def test_an_output_that_appears_during_the_run_is_not_replaced(tmp_path: Path, directory: bool, place: str) -> None:
    """Not even with --overwrite, which applies to what existed at the start."""
    out = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match="appeared during the run; choose another `out`")
        if not directory or place == "out"
        else nullcontext(),
        staged(Destination(out, directory=directory, overwrite=True, beside=not directory)) as new,
    ):
        (new / "file" if directory else new).write_text("new")
        (tmp_path / place).mkdir()
        (tmp_path / place / "thesis.tex").write_text("years of work")
    assert (tmp_path / place / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob(".adapterkit-*"))


def test_links_are_removed_but_not_their_targets(tmp_path: Path) -> None:
    """For a link in a running workspace; a dead_workspace one with a link is left alone."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(KeyboardInterrupt), staged(Destination(tmp_path / "out")) as new:
        for folder in (new, new.parent):
            (folder / "link").symlink_to(tmp_path / "thesis")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"thesis": None, "thesis/thesis.tex": b"years of work"}


def test_only_the_read_only_folders_to_remove_get_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not the targets of links; simulated, since root ignores modes."""
    (tmp_path / "thesis").mkdir(0o755)
    (inner := tmp_path / "old" / "a" / "b").mkdir(parents=True)
    (tmp_path / "old" / "link").symlink_to(tmp_path / "thesis")
    (inner / "file").touch()
    inner.chmod(0o500)
    monkeypatch.setattr(shutil, "rmtree", nth_call(shutil.rmtree, 1, failing(PermissionError(errno.EACCES, "no"))))
    changed, chmod = [], Path.chmod
    monkeypatch.setattr(Path, "chmod", lambda path, mode: (changed.append(path), chmod(path, mode)))
    remove_tree(tmp_path / "old")
    assert sorted(changed) == [tmp_path / "old", inner.parent, inner]
    assert os.listdir(tmp_path) == ["thesis"] and (tmp_path / "thesis").stat().st_mode & 0o777 == 0o755


def test_an_old_output_in_a_workspace_and_another_in_its_place(tmp_path: Path) -> None:
    """Neither is overwritten; if the place is free, the old one is restored."""
    work = dead_workspace(tmp_path / "out")
    work.old.mkdir()
    (work.old / "file").write_text("old")
    (tmp_path / "out").mkdir()
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match="a run that ended early had moved this output to .*/old;"):
        made(tmp_path / "out", "new")
    assert contents(tmp_path) == before
    (tmp_path / "out").rmdir()
    with (
        pytest.raises(KeyboardInterrupt),
        staged(Destination(tmp_path / "out", overwrite=True, is_ours=lambda _: True)),
    ):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"out": None, "out/file": b"old"}


@pytest.mark.parametrize("name", ["old", "new", "."])
def test_an_input_inside_a_dead_workspace_is_not_moved(tmp_path: Path, name: str) -> None:
    """A user who finds their old or partial output there may merge from it."""
    work = dead_workspace(tmp_path / "out")
    work.old.mkdir()
    (work.old / "file").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="the input"), staged(Destination(tmp_path / "out", (work.path / name,))):
        pass
    assert contents(tmp_path) == before


class Died(BaseException):
    """Every call that changes a name fails from now on, so that nothing is undone."""


@contextmanager
def failing_at(nth: int, error: BaseException, swaps: bool = True) -> Iterator[Callable[[], int]]:
    """Raise `error` at the `nth` call that changes a name, and Died at all later ones too; yields their count."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **how: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth or (count > nth and isinstance(error, Died)):
                raise error
            return call(*args, **how)

        return step

    with pytest.MonkeyPatch.context() as patched:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr(os_calls, "_rename", counted(os_calls._rename) if swaps else lambda *_: False)
        yield lambda: count


@pytest.mark.parametrize("error", [Died(), OSError(errno.ENOSPC, "full")], ids=["dies", "fails"])
@pytest.mark.parametrize(
    ("directory", "old", "swaps"),
    [
        (True, "none", True), (True, "without", True), (True, "without", False),
        (False, "none", True), (False, "without", True), (False, "with a receipt", True), (False, "with a receipt", False),
    ],
)  # fmt: skip
def test_a_run_that_ends_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, old: str, swaps: bool, error: BaseException
) -> None:
    """The output is the old or the new one with its receipt, at the latest after the next run starts."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # fsync takes most of the time
    out = tmp_path / "out"
    place = Destination(out, directory=directory, overwrite=True, beside=not directory, is_ours=lambda _: True)

    def make(text: str, receipt: bool) -> None:
        with staged(place) as new:
            (new / "file" if directory else new).write_text(text)
            if receipt and not directory:
                (new.parent / "receipt").mkdir()
                (new.parent / "receipt" / RECEIPT).write_text(text)

    def state() -> tuple[str, str] | None:
        file, receipt = out / "file" if directory else out, receipt_of(out) / RECEIPT
        return (file.read_text(), receipt.read_text() if receipt.exists() else "") if file.exists() else None

    before = {"none": None, "without": ("old", ""), "with a receipt": ("old", "" if directory else "old")}[old]
    after = ("new", "" if directory else "new")
    nth = ended = 1
    while ended:
        if before:
            make("old", old == "with a receipt")
        raised = False
        with failing_at(nth, error, swaps) as steps:
            try:
                make("new", True)
            except (Died, NoSpaceError):
                raised = True
        ended, nth, found = steps() >= nth, nth + 1, state()
        if isinstance(error, Died):
            if before == ("old", "old") and found and found[0] != found[1]:
                assert found[0] in [(path / RECEIPT).read_text() for path in workspace_receipts(out)]
        else:
            assert found == (before if raised else after), nth
        with pytest.raises(KeyboardInterrupt), staged(place):
            raise KeyboardInterrupt
        assert state() in ((before, after) if ended else (after,)), nth
        assert set(os.listdir(tmp_path)) <= {"out", "out.receipt"}
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert nth > 5


# --- destinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", ["adapterkit_merge.json", "adapterkit_adapter.json", RECEIPT, "adapterkit_training.json"]
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_folder_with_one_of_our_records_is_ours(tmp_path: Path, record: str, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / record).touch() if kind == "file" else (out / record).mkdir()
    place = Destination(out, overwrite=True)
    if kind == "file":
        place.check()
        return
    with pytest.raises(OutputExistsError, match="was not made by adapterkit"):
        place.check()


@pytest.mark.parametrize("out", ["", ".", "..", "new/..", "/"])
def test_an_output_needs_a_name_of_its_own(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="name a new directory or file to write"):
        Destination(Path(out)).check()


@pytest.mark.parametrize("directory", [True, False])
def test_a_file_or_directory_of_the_wrong_kind_is_refused(tmp_path: Path, directory: bool) -> None:
    out = tmp_path / "out"
    out.write_text("x") if directory else (out / "x").mkdir(parents=True)
    said = "is a file, but the output is a directory" if directory else "is a directory, but the output is a file"
    with pytest.raises(OutputExistsError, match=rf"out: {said}; choose another `out`, or remove it"):
        Destination(out, directory=directory, overwrite=True).check()


@pytest.mark.parametrize(("overwrite", "end"), [(None, "`out`"), (False, "`out`, or replace it with `overwrite=True`")])
def test_overwrite_is_suggested_only_where_it_exists(tmp_path: Path, overwrite: bool | None, end: str) -> None:
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(OutputExistsError) as raised:
        Destination(tmp_path / "out", overwrite=overwrite).check()
    assert str(raised.value) == f"{tmp_path}/out: already exists; choose another {end}"


@pytest.mark.parametrize("length", [247, 248, 255])
def test_the_longest_name_with_a_receipt(length: int, tmp_path: Path) -> None:
    """`.receipt` takes 8 of the 255 bytes of a name."""
    out = tmp_path / ("x" * (length - 2) + "é")
    for directory in (True, False):
        Destination(out, directory=directory).check()
    place = Destination(out, directory=False, beside=True)
    if length == 247:
        place.check()
        return
    with pytest.raises(UsageError, match="the name is too long to add a receipt"):
        place.check()


def test_a_mount_point_is_refused_before_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputExistsError, match="is a mount point"):
        Destination(tmp_path / "out").check()


def test_errors_name_the_output_and_not_the_workspace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterkitError, match=f"^{out}: No such file"), staged(Destination(out)) as new:
        (new / "missing").open()
    with pytest.raises(AdapterkitError, match=f"^{tmp_path}/missing: No such file"), staged(Destination(out)):
        (tmp_path / "missing").open()
    with pytest.raises(AdapterkitError, match=f"^{out}: strange"), staged(Destination(out)):
        raise OSError("strange")
    assert list(tmp_path.iterdir()) == []


# --- on the disk -----------------------------------------------------------------------------------------------------


def inodes(path: Path) -> frozenset[int]:
    return frozenset(one.stat().st_ino for one in (path, *path.rglob("*")))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("directory", [False, True])
def test_everything_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, old: bool
) -> None:
    """A power cut leaves the old or the new output: everything is flushed before its rename, and the rename at the end."""
    out = tmp_path / "out"
    happened: list[Any] = []  # inodes that were flushed; and new names with the inodes below them

    def make(new: Path) -> None:
        folder = new if directory else new.parent / "receipt"
        (folder / "deep").mkdir(parents=not directory)
        (folder / "deep" / "file").write_text("bytes")
        (folder / RECEIPT).write_text("{}")
        if not directory:
            new.write_text("bytes")

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def rename(source: Path, target: Path) -> Any:
            happened.append((target, inodes(source)))
            return call(source, target)

        return rename

    place = Destination(out, directory=directory, overwrite=True, is_ours=lambda _: True)
    if old:
        with staged(place) as new:
            make(new)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), happened.append(os.fstat(fd).st_ino)))
    for owner, name in ((os_calls, "rename_new"), (os_calls, "exchange"), (Path, "replace")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    with staged(place) as new:
        make(new)
        work = new.parent.stat().st_ino
    steps = {one[0]: number for number, one in enumerate(happened) if isinstance(one, tuple)}
    assert list(steps) == [out] if directory else [receipt_of(out), out]
    for number in steps.values():
        assert happened[number][1] <= set(happened[:number]), "it has its name before its bytes"
        assert tmp_path.stat().st_ino in happened[number:], "its name may be lost"
    if not directory:
        between = happened[steps[receipt_of(out)] : steps[out]]
        assert {tmp_path.stat().st_ino, work} <= {one for one in between if isinstance(one, int)}


@pytest.mark.parametrize("old", [False, True])
def test_receipts_are_found_in_the_workspace_during_a_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """unmerge looks there if the receipt beside the file doesn't match it."""
    out = tmp_path / "out"
    place = Destination(out, directory=False, overwrite=True, is_ours=lambda _: True)

    def make(text: str) -> None:
        with staged(place) as new:
            new.write_text(text)
            (new.parent / "receipt").mkdir()
            (new.parent / "receipt" / RECEIPT).write_text(text)
            assert [(path / RECEIPT).read_text() for path in workspace_receipts(out)] == [text]

    if old:
        make("old")
    found = []
    replace = Path.replace if old else os_calls.rename_new
    owner, name = (Path, "replace") if old else (os_calls, "rename_new")

    def replacing(source: Path, target: Path) -> Any:
        if target == out:
            found.extend((path / RECEIPT).read_text() for path in workspace_receipts(out))
        return replace(source, target)

    monkeypatch.setattr(owner, name, replacing)
    make("new")
    assert found == ["old"] * old and workspace_receipts(out) == []
    assert (receipt_of(out) / RECEIPT).read_text() == "new"


# --- renames ---------------------------------------------------------------------------------------------------------


def without(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make renameat2 fail with `number`, or be missing."""
    library = SimpleNamespace() if number is None else SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(os_calls, "_libc", lambda: library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: number)


@pytest.mark.parametrize("number", [0, None, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("there", ["a file", "a directory", "a dangling link", "nothing"])
def test_a_rename_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, number: int | None
) -> None:
    """Also where the kernel, the file system or a sandbox lacks the atomic call."""
    if number != 0:
        without(number, monkeypatch)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("one")
    if there == "a file":
        other.write_text("other")
    elif there == "a directory":
        other.mkdir()
    elif there == "a dangling link":
        other.symlink_to("gone")
    if there == "nothing":
        os_calls.rename_new(one, other)
        assert contents(tmp_path) == {"other": b"one"}
        return
    before = contents(tmp_path)
    with pytest.raises(FileExistsError) as raised:
        os_calls.rename_new(one, other)
    assert str(other) in (raised.value.filename, raised.value.filename2)
    assert contents(tmp_path) == before
    swapped = os_calls.exchange(one, other)
    assert swapped is (number == 0)
    if not swapped:
        assert contents(tmp_path) == before
    else:
        assert other.read_text() == "one"
        assert (one.is_file(), one.is_dir(), one.is_symlink()) == tuple(
            there == kind for kind in ("a file", "a directory", "a dangling link")
        )


def test_a_failed_rename_names_both_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (os_calls.exchange, os_calls.rename_new):
        with pytest.raises(FileNotFoundError) as raised:
            call(tmp_path / "one", tmp_path / "other")
        assert (raised.value.filename, raised.value.filename2) == (f"{tmp_path}/one", f"{tmp_path}/other")
    without(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        os_calls.exchange(tmp_path / "one", tmp_path / "other")


def test_relative_names_are_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").write_text("one"), Path("other").write_text("other")
    assert os_calls.exchange(Path("one"), Path("other"))
    os_calls.rename_new(Path("one"), Path("new"))
    assert contents(tmp_path) == {"new": b"other", "other": b"one"}
