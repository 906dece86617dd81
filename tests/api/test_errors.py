"""Errors of Python calls: they are also Python's own kinds, and name arguments rather than options."""

from __future__ import annotations

import ast
import errno
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from handmade import adapterkit as run_adapterkit
from handmade import contents, write_adapter, write_base

import adapterkit
from adapterkit import errors
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import map_os_errors
from adapterkit.hub.client.call import checked_response
from adapterkit.merging.run_options import RunOptions
from adapterkit.train.recipe import Recipe

PACKAGE = Path(adapterkit.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base, an adapter, and a folder with a file in it."""
    write_base(tmp_path / "base"), write_adapter(tmp_path / "one"), (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISSING: dict[str, Callable[[], Any]] = {
    "load": lambda: adapterkit.load("no/nope"),
    "list_adapters": lambda: adapterkit.list_adapters("nope"),
    "merge into": lambda: adapterkit.merge("./nope", "one", "out"),
    "merge": lambda: adapterkit.merge("base", "./nope", "out"),
    "plan_merge": lambda: adapterkit.plan_merge("base", Path("nope.safetensors"), "out"),
    "verify": lambda: adapterkit.verify("./nope", "base", "one"),
    "unmerge": lambda: adapterkit.unmerge("./nope", "out"),
    "quantize": lambda: adapterkit.quantize("./nope", "out", to="nf4"),
    "combine": lambda: adapterkit.combine(["one", "./nope"], "out"),
    "compare": lambda: adapterkit.compare(["one", "./nope"]),
    "resize": lambda: adapterkit.resize("./nope", "out", rank=2),
    "convert": lambda: adapterkit.convert("one", "out", to="dora", base="./nope"),
    "extract": lambda: adapterkit.extract("base", "./nope", "out", rank=2),
}  # fmt: skip


@pytest.mark.parametrize("call", MISSING)
def test_missing_files_are_file_not_found_errors(call: str, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(FileNotFoundError) as caught:
        MISSING[call]()
    error = caught.value
    assert isinstance(error, errors.FormatError) and error.exit_code == 1
    assert re.fullmatch(r"\S*nope(\.safetensors)?: no such (file or directory|folder)", str(error))
    assert contents(folder) == before


def test_errors_are_also_of_pythons_kinds(folder: Path) -> None:
    for call in (lambda: adapterkit.merge("base", "one", "taken"), lambda: adapterkit.resize("one", "taken", rank=2)):
        with pytest.raises(FileExistsError, match="taken: ") as exists:
            call()
        assert isinstance(exists.value, errors.OutputExistsError) and exists.value.exit_code == 7
    with pytest.raises(FileExistsError, match="is not empty"):
        adapterkit.save(adapterkit.load("one"), "taken")
    with pytest.raises(ValueError, match="scale inf"):
        adapterkit.merge("base", "one", "out", scale=float("inf"))
    with pytest.raises(TypeError, match="scales"):
        adapterkit.merge("base", "one", "out", scales=2)  # type: ignore[call-arg]
    with pytest.raises(FileNotFoundError, match="gone: cannot be read: No such file"), open_regular(Path("gone")):
        pass
    assert issubclass(errors.OfflineError, ConnectionError)
    assert issubclass(errors.NotAllowedError, PermissionError) and issubclass(errors.UnreadableError, PermissionError)
    assert (folder / "taken" / "mine.txt").read_text() == "mine"


def test_a_file_without_read_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", denied)
    with pytest.raises(PermissionError, match="cannot be read: Permission denied") as caught:
        adapterkit.load("one")
    assert isinstance(caught.value, errors.FormatError)


ALL = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.AdapterkitError)]


@pytest.mark.parametrize("kind", ALL)
def test_messages_do_not_depend_on_the_second_base_class(kind: type[errors.AdapterkitError]) -> None:
    """OSError would interpret two arguments as errno and strerror, and a third as a file name."""
    for lines in (["a"], ["a", "b"], ["a", "b", "c"])[: 1 if kind is errors.UnknownStrengthError else 3]:
        error = kind(*lines, hint="do this")
        again = pickle.loads(pickle.dumps(error))
        for one in (error, again):
            assert (type(one), one.lines, one.hint) == (kind, lines, "do this")
            assert str(one) == ("a; do this" if lines == ["a"] else "\n".join([*lines, "do this"]))


@pytest.mark.parametrize("kind", [errors.OutputExistsError, errors.MissingFileError, errors.UsageError])
def test_mapping_os_errors_leaves_our_errors_unchanged(kind: type[errors.AdapterkitError]) -> None:
    for mapped in (map_os_errors(Path("out")), checked_response("lab/base")):
        error = kind("ours")
        with pytest.raises(kind) as caught, mapped:
            raise error
        assert caught.value is error


# --- arguments and options -------------------------------------------------------------------------------------------

PARAMETER = re.compile("`([a-z_]+)(?:=[^`]*)?`")
COMMAND = re.compile(r"`adapterkit [^`]*`")  # whole commands may have options
OPTION = re.compile(r"(?<![\w-])(--[a-z]|-[a-z](?![\w-]))")


@cache
def texts() -> list[tuple[str, str]]:
    """The texts below the command line, each with its file."""
    files = [file for file in PACKAGE.rglob("*.py") if not {"cli", "tui"} & set(file.relative_to(PACKAGE).parts)]
    return [(file.name, text) for file in files for text in texts_of(file)]


def texts_of(file: Path) -> Iterator[str]:
    """Return the texts of a module that can be shown: those with a space, except docstrings and commands to copy."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        found = [part.value for part in parts if isinstance(part, ast.Constant) and id(part) not in known]
        known |= {id(part) for part in parts}
        text = "…".join(part for part in found if isinstance(part, str))
        if " " in text.strip() and not text.startswith("adapterkit "):
            yield text


def test_no_message_outside_the_command_line_names_an_option() -> None:
    plain = [(name, COMMAND.sub("", text)) for name, text in texts()]
    assert len(plain) > 1000 and [(name, text) for name, text in plain if OPTION.search(text)] == []
    assert [bool(OPTION.search(text)) for text in ("give -o OUT", "say --json", "a-b --", "up - down", "e-3")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_every_argument_that_a_text_names_is_one() -> None:
    """What stands in backticks, as `overwrite=True`, is an argument of a public call, or a field of a recipe."""
    calls = [one for name in adapterkit.__all__ if inspect.isfunction(one := getattr(adapterkit, name))]
    known = {argument for call in calls for argument in inspect.signature(call).parameters}
    known |= {field.name for options in (RunOptions, Recipe) for field in fields(options)}
    known |= {*adapterkit.__all__, "json"}  # calls, and an option of every command
    named = {(file, name) for file, text in texts() for name in PARAMETER.findall(text)}
    assert {(file, name) for file, name in named if name not in known} == set() and len(named) > 50


BOTH: dict[str, tuple[Callable[[], Any], list[str], str, str]] = {
    "a receipt is enough": (
        lambda: adapterkit.unmerge("merged", "out", adapters="one", base="base"),
        ["unmerge", "merged", "-o", "out", "--adapter", "one", "--base", "base"],
        "omit `adapters`", "omit --adapter",
    ),
    "one of two": (
        lambda: adapterkit.load("one", alpha=1.0, scaling=1.0),
        ["inspect", "one", "--alpha", "1", "--scaling", "1"],
        "`alpha` and `scaling`", "--alpha and --scaling",
    ),
    "what is for a quantized output": (
        lambda: adapterkit.merge("base", "one", "out", accept_loss=True),
        ["merge", "base", "one", "-o", "out", "--accept-loss"],
        "`accept_loss` goes with `quantize`", "--accept-loss goes with --quantize",
    ),
    "no receipt": (
        lambda: adapterkit.unmerge("base", "out"),
        ["unmerge", "base", "-o", "out"],
        "`approximate=True`", "--approximate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOTH)
def test_the_same_error_in_python_and_in_a_shell(case: str, folder: Path) -> None:
    call, words, argument, option = BOTH[case]
    if "merged" in words:
        adapterkit.merge("base", "one", "merged")
    with pytest.raises(errors.AdapterkitError) as caught:
        call()
    assert argument in str(caught.value) and not OPTION.search(str(caught.value))
    shown = run_adapterkit(*words)
    assert option in shown.err and "`" not in shown.err and shown.code == caught.value.exit_code
