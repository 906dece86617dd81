"""Untrusted files: only regular files are opened, and no link leads out of a folder."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.files import opening
from adapterkit.files.opening import (
    CHUNK_BYTES,
    MAX_FOLDER_DEPTH,
    cache_blob,
    files_below,
    open_inside,
    open_regular,
    read_up_to,
    read_whole,
    sha256_of,
)


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Check that no descriptor is left open."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


PACKAGE = Path(opening.__file__).parents[1]


def unchecked_reads(file: Path) -> list[str]:
    """Return the lines of `file` that open or read a file without `opening`, except in /proc and for our own files."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "/proc/" in (line := ast.unparse(node)):
            continue
        name, args = ast.unparse(node.func), [*map(ast.unparse, node.args)]
        mode = args[1] if len(args) > 1 else "'r'"
        reads = name == "open" and not mode.strip("'").startswith(("w", "a", "x"))
        reads |= name.endswith((".read_text", "np.load", "torch.load", "safe_open", "load_file"))
        reads |= name.endswith(".read_bytes") and name.split(".")[-2] in ("file", "path", "partial", "source")
        reads |= name in ("os.open", "os.fdopen") and not re.search("O_WRONLY|O_EXCL|NEW", line)
        found += [f"{file.relative_to(PACKAGE)}:{node.lineno}: {line}"] if reads else []
    return found


def test_files_are_opened_in_one_place() -> None:
    """The known modules open our own files, check for themselves, or use a stream from `opening`."""
    known = {
        "files/opening.py",
        "base/models/tokenizer_subprocess.py",
        "files/workspace.py",
        "files/os_calls.py",
        "files/outfile.py",
        "cli/main.py",
        "adapter/formats/pickled.py",
        "hub/download.py",
    }
    found = [line for file in sorted(PACKAGE.rglob("*.py")) for line in unchecked_reads(file)]
    assert [line for line in found if line.partition(":")[0] not in known] == []


def make(path: Path, kind: str) -> Path:
    """Create something that is not a regular file at `path`; reading it could block forever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            at = os.open(path.parent, os.O_PATH)  # socket paths have a short limit
            one.bind(f"/proc/self/fd/{at}/{path.name}")
            os.close(at)
    elif kind == "a directory":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket", "a directory"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    file = make(tmp_path / "x", kind)
    with pytest.raises(FormatError, match=f"x: cannot be read: {kind}, expected a regular file"):
        open_regular(file)
    with pytest.raises(FormatError, match="x: (is a link|cannot be read: a)"):
        open_inside(tmp_path, "x")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_files_are_read_up_to_the_limit(size: int, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(data := bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert read_whole(file, size) == read_whole(file, size + 1) == data
    assert sha256_of(file) == hashlib.sha256(data).hexdigest()
    with pytest.raises(FormatError, match=f"x: is too large, expected at most {size - 1:,} bytes"):
        read_whole(file, size - 1)
    with open("/dev/zero", "rb") as endless, pytest.raises(FormatError, match="is too large"):
        read_up_to(endless, size, file)


@pytest.mark.parametrize("name", ["x\0y", "x" * 256, "no/such/folder", "pipe/x"])
def test_invalid_names(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for opened in (lambda: open_regular(tmp_path / name), lambda: open_inside(tmp_path, name)):
        with pytest.raises(
            FormatError, match="cannot be read: (embedded null|File name too long|No such file|Not a directory)"
        ):
            opened()


def cached(cache: Path, name: str = "models--o--n") -> Path:
    """A snapshot in the Hub cache: two links to blobs, one of them in a folder."""
    snapshot = cache / name / "snapshots" / "0a1b"
    (snapshot / "inner").mkdir(parents=True)
    (cache / name / "blobs").mkdir()
    for blob in ("aa", "bb"):
        (cache / name / "blobs" / blob).write_text(blob)
    (snapshot / "a").symlink_to("../../blobs/aa")
    (snapshot / "inner" / "b").symlink_to("../../../blobs/bb")
    return snapshot


def read(folder: Path, name: str) -> str:
    with open_inside(folder, name) as stream:
        return stream.read().decode()


def test_links_of_the_hub_cache_to_its_blobs_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")  # users may have linked it
    snapshot = cached(tmp_path / "cache")
    assert [read(snapshot, "a"), read(snapshot, "inner/b"), read(snapshot / "inner", "b")] == ["aa", "bb", "bb"]
    assert list(files_below(snapshot)) == [(Path("a"), None), (Path("inner/b"), None)]


def another_repository(snapshot: Path) -> None:
    cached(snapshot.parents[2], "models--o--private")
    (snapshot / "x").symlink_to("../../../models--o--private/blobs/aa")


def below_the_blobs(snapshot: Path) -> None:
    (snapshot.parents[1] / "blobs" / "inner").symlink_to("/proc/self")
    (snapshot / "x").symlink_to("../../blobs/inner/environ")


def a_blob_that_is_a_link(snapshot: Path) -> None:
    (snapshot.parents[1] / "blobs" / "cc").symlink_to("/proc/self/environ")
    (snapshot / "x").symlink_to("../../blobs/cc")


def blobs_that_are_a_link(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(blobs.with_name("moved"))
    blobs.symlink_to("/proc/self")
    (snapshot / "x").symlink_to("../../blobs/environ")


def no_cache(snapshot: Path) -> None:
    """A snapshots folder that is not of the Hub cache."""
    repo = snapshot.parents[1].rename(snapshot.parents[2] / "home")
    (repo / "snapshots" / "0a1b" / "x").symlink_to("../../blobs/aa")


ESCAPES: dict[str, Callable[[Path], Any]] = {
    "the environment": lambda folder: (folder / "x").symlink_to("/proc/self/environ"),
    "a file of the folder": lambda folder: (folder / "x").symlink_to("a"),
    "a folder on the way": lambda folder: (folder / "up").symlink_to("/proc/self"),
    "nothing": lambda folder: (folder / "x").symlink_to("gone"),
    "itself": lambda folder: (folder / "x").symlink_to("x"),
    "another repository": another_repository,
    "below the blobs": below_the_blobs,
    "a blob that is a link": a_blob_that_is_a_link,
    "blobs that are a link": blobs_that_are_a_link,
    "no cache": no_cache,
}


@pytest.mark.parametrize("case", ESCAPES)
def test_no_other_link_is_followed(tmp_path: Path, case: str) -> None:
    folder = cached(tmp_path)
    ESCAPES[case](folder)
    if case == "no cache":
        folder = tmp_path / "home" / "snapshots" / "0a1b"
    name = "up/environ" if case == "a folder on the way" else "x"
    with pytest.raises(FormatError) as error:
        open_inside(folder, name)
    assert str(error.value).startswith(f"{folder / name}: ")
    listed = dict(files_below(folder))
    assert listed[Path(name.partition("/")[0])] in ("a link", None)


@pytest.mark.parametrize("after", ["a link", "a named pipe"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_file_that_changes_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, inside: bool
) -> None:
    file, check = tmp_path / "x", opening._check
    file.write_text("")

    def swapped(mode: int) -> None:
        check(mode)
        file.unlink(missing_ok=True)
        if after == "a link":
            file.symlink_to("/proc/self/environ" if inside else "/dev/zero")
        else:
            os.mkfifo(file)

    monkeypatch.setattr(opening, "_check", swapped)
    with pytest.raises(FormatError, match="x: cannot be read: (a|Too many levels)"):
        open_inside(tmp_path, "x") if inside else open_regular(file)


def test_files_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/d/e", ".hidden", ".git/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.link(tmp_path / "b", tmp_path / "hard")
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "up").symlink_to("/")
    found = [(str(file), kind) for file, kind in files_below(tmp_path)]
    assert found == [
        ("b", None), ("hard", None), ("up", "a link"), ("a/c", None), ("a/pipe", "a named pipe"), ("a/d/e", None)
    ]  # fmt: skip
    with pytest.raises(FormatError, match="gone: cannot be read: No such file"):
        list(files_below(tmp_path / "gone"))


def test_the_limit_on_nested_folders(tmp_path: Path) -> None:
    deepest = tmp_path.joinpath(*"d" * MAX_FOLDER_DEPTH)
    deepest.mkdir(parents=True)
    (deepest / "x").touch()
    assert list(files_below(tmp_path)) == [(deepest.relative_to(tmp_path) / "x", None)]
    (deepest / "d").mkdir()
    with pytest.raises(FormatError, match="is nested more than 100 folders deep; move it up"):
        list(files_below(tmp_path))


def test_folders_nested_deeper_than_a_path_allows(tmp_path: Path) -> None:
    at = os.open(tmp_path, os.O_PATH)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=at)
        at, above = os.open("d" * 250, os.O_PATH, dir_fd=at), at
        os.close(above)
    os.close(at)
    with pytest.raises(FormatError, match="cannot be read: File name too long"):
        list(files_below(tmp_path))
    assert cache_blob(tmp_path) is None


def test_the_error_for_a_link(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeFileError, match="x: is a link and could point to any file; replace it with the file"):
        open_inside(tmp_path, "x")
