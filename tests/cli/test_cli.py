"""The command line as a whole: help, exit codes, imports, and output streams."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from handmade import adapterkit, write_adapter, write_base

import adapterkit as package
from adapterkit import errors
from adapterkit.cli import main as cli
from adapterkit.cli.command import Command

ROOT = Path(package.__file__).parents[1]
HEAVY = {"torch", "numpy", "safetensors", "rich", "textual", "huggingface_hub", "matplotlib"}


def python(*args: str | Path, stdout: Any = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_version() -> None:
    result = adapterkit("--version")
    assert (result.code, result.out, result.err) == (0, f"adapterkit {package.__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command(option: str) -> None:
    result = adapterkit(option)
    assert (result.code, result.err) == (0, "")
    for command, line in cli.COMMANDS.items():
        assert f"  {command} " in result.out
        assert line.split()[0] in result.out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command: str) -> None:
    result = adapterkit(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: adapterkit {command} ")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["mrege"], "error: no such command 'mrege'\nhint: did you mean merge?"),
        (["--nope"], "error: no such option '--nope'"),
        (["merge"], "no adapter given"),
        (["combine", "-o", "out"], "missing argument"),
        (["merge", "base", "adapter", "--dtype", "int3"], "--dtype int3: expected bf16, fp16 or fp32"),
        (["merge", "base", "adapter", "--threads", "0"], "invalid value for '--threads'"),
        (["merge", "base", "adapter", "--scale", "much"], "invalid value for '--scale'"),
        (["merge", "base", "adapter", "--dry-run", "--report"], "give one of them"),
        (["merge", "base", "adapter", "--map", "nothing"], "expected OLD=NEW"),
    ],
)
def test_usage_errors(args: list[str], expected: str) -> None:
    result = adapterkit(*args)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.AdapterkitError("a: b"), 1),
        (errors.FormatError("a: b"), 1),
        (errors.UnsafeFileError("a: b"), 1),
        (errors.UsageError("a: b"), 2),
        (errors.FitError("a: b"), 3),
        (errors.NotAllowedError("a: b"), 4),
        (errors.OfflineError("a: b"), 5),
        (errors.NoSpaceError("a: b"), 6),
        (errors.OutputExistsError("a: b"), 7),
        (PermissionError(13, "b", "a"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_failure_is_one_line_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "group", fails)
    expected = "interrupted" if code == 130 else "a: b"
    assert adapterkit().message(code) == expected


@pytest.mark.parametrize("said", ["No space left on device", "Broken pipe"])
def test_errors_of_files_are_not_attributed_to_stdout(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    @click.command(cls=Command, docs="", examples=())
    def fails() -> None:
        raise OSError({"Broken pipe": errno.EPIPE}.get(said, errno.ENOSPC), said)

    monkeypatch.setattr(cli, "group", fails)
    assert adapterkit().message(1) == f"{said}; -v shows where it happened"


def test_control_characters_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise errors.FormatError("a\n\x1b[2J\u202e: b")

    monkeypatch.setattr(cli, "group", fails)
    assert adapterkit().message(1) == "a\\n\\x1b[2J\\u202e: b"


def test_a_list_of_problems_has_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise errors.FormatError("2 of 3 records cannot be used", "  a:1: x\ny", "  a:2: z")

    monkeypatch.setattr(cli, "group", fails)
    assert adapterkit().err == "error: 2 of 3 records cannot be used\n  a:1: x\\ny\n  a:2: z\n"


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nothing", "nothing: no such file or directory"),
        ("./no/thing", "no/thing: no such file or directory"),
        ("no/thing.safetensors", "no/thing.safetensors: no such file or directory"),
        ("../no/thing", "../no/thing: no such file or directory"),
        ("a--b/-c", "a--b/-c: no such path, and not a valid repository name"),
    ],
)
def test_a_base_that_does_not_exist(base: str, expected: str) -> None:
    assert adapterkit("merge", base, "adapter").message(1) == expected


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import adapterkit",
        "import adapterkit; adapterkit.plan_merge",
        "from adapterkit.cli.main import group; group(['--help'], standalone_mode=False)",
        "from adapterkit.cli.main import group; group(['merge', '--help'], standalone_mode=False)",
        "from adapterkit.cli.main import group; group(['inspect', '--help'], standalone_mode=False)",
        "from adapterkit.cli.main import group; group(['combine', '--help'], standalone_mode=False)",
    ],
)
def test_commands_do_not_import_heavy_modules(code: str) -> None:
    result = python("-c", f"{code}\nimport sys; print('\\n', *sys.modules)")
    assert result.stderr == ""
    assert HEAVY & set(result.stdout.splitlines()[-1].split()) == set()


def test_a_dry_run_does_not_import_torch(tmp_path: Path) -> None:
    """Of no verb: all run in one process, in which importing it fails."""
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    runs = [
        ["combine", adapter, adapter, "-o", "new"], ["resize", adapter, "-o", "new", "--rank", "2"],
        ["convert", adapter, "-o", "new", "--to", "dora", "--base", base],
        ["extract", base, base, "-o", "new", "--rank", "2"], ["quantize", base, "--to", "nf4"], ["merge", base, adapter],
    ]  # fmt: skip
    code = """if True:
        import sys
        sys.modules["torch"] = None
        from adapterkit.cli.main import main
        for sys.argv in [["adapterkit", *line.split(), "--dry-run"] for line in sys.argv[1:]]:
            try:
                main()
            except SystemExit as error:
                print("code", error.code)
    """
    result = python("-c", code, *(" ".join(map(str, words)) for words in runs))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("Dry run: nothing written\ncode 0\n") == len(runs)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_every_export_exists() -> None:
    assert {name for name in package.__all__ if getattr(package, name) is not None} == set(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        package.mrege  # noqa: B018


# --- standard output -------------------------------------------------------------------------------------------------


def dry_run(tmp_path: Path) -> list[str | Path]:
    return ["-m", "adapterkit", "merge", write_base(tmp_path / "b"), write_adapter(tmp_path / "a"), "--dry-run"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("help_page", [True, False])
def test_a_closed_pipe(tmp_path: Path, help_page: bool, unbuffered: str) -> None:
    args = ["-m", "adapterkit", "merge", "--help"] if help_page else dry_run(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    result = python(*args, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_device(tmp_path: Path, unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        result = python(*dry_run(tmp_path), stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")


def test_no_standard_output(tmp_path: Path) -> None:
    closing = "import os, sys; os.close(1); os.execv(sys.executable, sys.argv[1:])"
    result = python("-c", closing, sys.executable, *dry_run(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")


def test_an_ascii_terminal(tmp_path: Path) -> None:
    result = python(*dry_run(tmp_path), PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "adapter   a \\xd7 1: " in result.stdout


# --- where it is started ---------------------------------------------------------------------------------------------


def started(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in `folder`, where `$ADAPTERKIT` is the command."""
    env = os.environ | {"ADAPTERKIT": f"{sys.executable} -m adapterkit", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=env, capture_output=True, text=True)


def test_nothing_is_written_to_closed_streams(tmp_path: Path) -> None:
    """Otherwise the output file would get the descriptor of stderr, and libraries would write into it."""
    base, adapter = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    result = started(f"$ADAPTERKIT merge {base} {adapter} -o out 2>&-", tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("merged "), result.stdout
    assert started(f"$ADAPTERKIT inspect {tmp_path}/nope >&- 2>&- <&-", tmp_path).returncode == 1
    assert adapterkit("verify", tmp_path / "out", "--base", base, "--adapter", adapter).code == 0


def test_a_deleted_working_directory(tmp_path: Path) -> None:
    result = started("mkdir gone; cd gone; rmdir ../gone; $ADAPTERKIT list", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("the current directory no longer exists\nhint: change to another directory\n")


def test_files_beside_the_weights_are_noted(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    for args in ((base / "config.json", adapter), (base, adapter / "adapter_config.json")):
        result = adapterkit("merge", *args, "-o", tmp_path / "out")
        assert result.code == 1 and "give its directory" in result.err


def test_an_infinite_weight_is_not_blamed_on_the_adapter(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "adapter")
    result = adapterkit("merge", base, f"{adapter}:1e300", "-o", tmp_path / "out")
    assert result.code == 3 and "scaling × weight is" in result.err and "smaller weight or scale" in result.err
