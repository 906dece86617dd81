"""`progress=True`: one progress bar for every long call and its downloads; without it nothing is drawn."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, contents, write_adapter, write_base
from hubserver import Hub

import adapterkit

# Verb -> its call in a folder that has what it names, and the last line of its bar.
CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "merge": (lambda more: adapterkit.merge("base", "one", "out", **more), r"out: 100%.* 4/4 .* tensors/s"),
    "quantize": (lambda more: adapterkit.quantize("base", "out", to="nf4", **more), r"out: 100%.* 4/4 .* tensors/s"),
    "verify": (lambda more: list(adapterkit.verify("merged", "base", "one", **more)), r"verifying: 100%.* 6/6 "),
    "unmerge": (
        lambda more: adapterkit.unmerge("twice", "out", adapters=["one", "two"], every=True, **more),
        r"out, merge 2 of 2: 100%.* 4/4 .* tensors/s",
    ),
    "combine": (lambda more: adapterkit.combine(["one", "two"], "out", **more), r"out: 100%.* 4/4 .* modules/s"),
    "resize": (lambda more: adapterkit.resize("one", "out", rank=2, **more), r"out: 100%.* 4/4 "),
    "convert": (lambda more: adapterkit.convert("one", "out", to="rslora", **more), r"out: 100%.* 4/4 "),
    "extract": (lambda more: adapterkit.extract("base", "merged", "out", rank=2, **more), r"out: 100%.* 4/4 "),
    "compare": (lambda more: adapterkit.compare(["one", "two"], **more), r"comparing: 100%.* 4/4 .* modules/s"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that `CALLS` use."""
    folder = tmp_path_factory.mktemp("progress")
    base = write_base(folder / "base")
    one, two = (
        write_adapter(folder / name, config=CONFIG | {"lora_alpha": alpha}) for name, alpha in (("one", 6), ("two", 3))
    )
    adapterkit.merge(base, one, folder / "merged")
    adapterkit.merge(folder / "merged", two, folder / "twice")
    return folder


@pytest.fixture
def out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The output path of one call, removed afterwards."""
    monkeypatch.chdir(folder)
    yield folder / "out"
    shutil.rmtree(folder / "out", ignore_errors=True)


@pytest.mark.parametrize("verb", CALLS)
def test_a_bar_reaches_its_total(verb: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call, last = CALLS[verb]
    call({"progress": True})
    drawn = capsys.readouterr()
    assert re.fullmatch(last + ".*", drawn.err.rstrip("\n").split("\r")[-1]) and drawn.out == ""


def test_a_run_draws_a_bar_and_yields_its_events(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = adapterkit.plan_merge("base", "one", "out")
    before = contents(out.parent)
    events = adapterkit.run(plan, progress=True)
    assert capsys.readouterr().err == ""  # nothing has begun
    next(events)
    events.close()  # as where a loop is left: what was begun is taken back
    assert contents(out.parent) == before
    assert "out:" in capsys.readouterr().err
    *_, last = adapterkit.run(plan, progress=True)
    assert isinstance(last, adapterkit.Merged)


def test_nothing_is_drawn_unless_asked_for(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("resize", "compare"):
        CALLS[verb][0]({})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO())])
def test_nothing_is_drawn_without_stderr(
    out: Path, monkeypatch: pytest.MonkeyPatch, stream: io.TextIOWrapper | None
) -> None:
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    for verb in ("resize", "compare"):
        CALLS[verb][0]({"progress": True})
    assert out.is_dir()


def test_names_on_a_bar_are_escaped(out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapterkit.resize("one", tmp_path / "a\x1b[2Jb", rank=2, progress=True)
    assert "\\x1b[2Jb: 100%" in capsys.readouterr().err.replace("\x1b[A", "")


def test_downloads_draw_too(hub: Hub, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "one"):
        hub.add(f"lab/{name}", {file: data for file, data in contents(folder / name).items() if data is not None})
    adapterkit.merge("lab/base", "lab/one", "out", progress=True)
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert [line.split("\r")[-1].partition("%")[0] for line in lines] == [
        "downloading lab/one: 100", "downloading lab/base: 100", "out: 100",
    ]  # fmt: skip
    assert "B/s" in lines[0]
    hub.add("lab/two", {file: data for file, data in contents(folder / "two").items() if data is not None})
    adapterkit.inspect("lab/two", full=True)
    assert capsys.readouterr().err == ""
