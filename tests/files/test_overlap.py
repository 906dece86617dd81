"""Inputs and outputs that overlap through links, and those that only seem to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterkit.errors import FormatError, UsageError
from adapterkit.files import overlap
from adapterkit.files.opening import files_below
from adapterkit.files.overlap import check_disjoint

LIES, HOLDS, APART = "is the input", "contains the input", ""
# Files to create, in order: `folder/`, `file`, `link -> target`, `hard = file`; an input; an output; the result.
CASES = {
    "nothing of either": ([], "in", "out", APART),
    "beside each other": (["in/", "in/w", "out/", "out/w"], "in", "out", APART),
    "names that begin alike": (["in/", "in/w"], "in", "in.out", APART),
    "one file": (["w"], "w", "w", LIES),
    "one folder": (["in/"], "in", "in", LIES),
    "in it": (["in/"], "in", "in/out", LIES),
    "deep in it, not there yet": (["in/"], "in", "in/a/b/out", LIES),
    "in it, by a link": (["in/", "in/deep/", "link -> in/deep"], "in", "link/out", LIES),
    "in it, by the input's link": (["real/", "in -> real"], "in", "real/out", LIES),
    "around it": (["out/", "out/in/"], "out/in", "out", HOLDS),
    "far around it": (["out/", "out/a/", "out/a/b/", "out/a/b/w"], "out/a/b/w", "out", HOLDS),
    "around what it is a link to": (["out/", "out/real", "in -> out/real"], "in", "out", HOLDS),
    "around what it links to": (["out/", "out/w", "in/", "in/w -> ../out/w"], "in", "out", HOLDS),
    "around what it links to from below": (["out/", "out/w", "in/", "in/a/", "in/a/w -> ../../out/w"], "in", "out", HOLDS),
    "what it links to": (["w", "in/", "in/w -> ../w"], "in", "w", LIES),
    "a folder that it links to": (["out/", "in/", "in/d -> ../out"], "in", "out", LIES),
    "around a folder that it links to": (["out/", "out/d/", "in/", "in/d -> ../out/d"], "in", "out", HOLDS),
    "a link to it": (["in/", "out -> in"], "in", "out", LIES),
    "a hard link to it": (["in", "out = in"], "in", "out", LIES),
    "a hard link to a file of it": (["in/", "in/a/", "in/a/w", "out = in/a/w"], "in", "out", LIES),
    "a hard link to what it links to": (["w", "in/", "in/w -> ../w", "out = w"], "in", "out", LIES),
    "with a hard link to a file of it, as --link leaves": (["in/", "in/w", "out/", "out/w = in/w"], "in", "out", APART),
    "with a link to it": (["in/", "in/w", "in/deep/", "out/", "out/d -> ../in", "out/w -> ../in/w"], "in", "out", APART),
    "beside what it links to": (["real/", "real/w", "in/", "in/w -> ../real/w"], "in", "real/out", APART),
    "beside it, which links to itself and to nothing": (["in/", "in/a -> a", "in/b -> ../gone", "in/c -> ."], "in", "out", APART),
}  # fmt: skip


def make(folder: Path, what: str) -> None:
    name, link, target = what.partition(" -> ")
    new, hard, old = what.partition(" = ")
    if link:
        (folder / name).symlink_to(target)
    elif hard:
        os.link(folder / old, folder / new)
    elif what.endswith("/"):
        (folder / what).mkdir()
    else:
        (folder / what).write_text(what)


@pytest.mark.parametrize("case", CASES)
def test_outputs_that_overlap_an_input(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read, out, expected = CASES[case]
    for what in made:
        make(tmp_path, what)
    monkeypatch.chdir(tmp_path)
    for inputs, outputs in (([read], [out]), ([tmp_path / read], [out]), (["other", read], ["more", tmp_path / out])):
        paths = [Path(one) for one in inputs], [Path(one) for one in outputs]
        if expected:
            with pytest.raises(UsageError, match=f"{out}: {expected} .*{read}"):
                check_disjoint(*paths)
        else:
            check_disjoint(*paths)


def test_inputs_of_any_depth(tmp_path: Path) -> None:
    """The check comes before limits on nesting."""
    deep, depth = tmp_path / "in", 1100
    for _ in range(depth):
        deep.mkdir()
        deep /= "d"
    with pytest.raises(UsageError, match=HOLDS):
        check_disjoint([deep.parent], [tmp_path / "in"])
    check_disjoint([tmp_path / "in"], [tmp_path / "out"])
    with pytest.raises(FormatError, match="nested more than 100 folders deep"):
        list(files_below(tmp_path / "in"))
    for _ in range(depth):
        deep = deep.parent
        deep.rmdir()


@pytest.mark.parametrize("read", ["in", "in/w", "in/deep", "in/deep/w", "other"])
def test_an_input_mounted_inside_the_output(read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounting needs root, so the equal inodes of two folders are simulated. Removing one would empty the other."""
    for what in ("in/", "in/w", "in/deep/", "in/deep/w", "other", "out/", "out/a/", "out/a/mount/"):
        make(tmp_path, what)
    inode = overlap._inode
    monkeypatch.setattr(overlap, "_inode", lambda path: inode(tmp_path / "in" if path.name == "mount" else path))
    if read == "other":
        check_disjoint([tmp_path / read], [tmp_path / "out"])
    else:
        with pytest.raises(UsageError, match=f"out: {HOLDS}"):
            check_disjoint([tmp_path / read], [tmp_path / "out"])
