"""Conventions of all commands: help lines, shared options, and the format of errors."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import ROOT
from handmade import Outcome, Terminal, adapterkit, write_adapter, write_base
from jsondocs import sections, undocumented

import adapterkit as package
from adapterkit.cli import main as cli
from adapterkit.cli.command import Command
from adapterkit.cli.failures import name_options
from adapterkit.cli.option_names import in_options
from adapterkit.errors import OutputExistsError, UsageError

every_command = pytest.mark.parametrize("name", cli.COMMANDS)


def command_of(name: str) -> Command:
    command = cli.group.get_command(click.Context(cli.group), name)
    assert isinstance(command, Command)
    return command


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_every_command_in_its_group() -> None:
    lines = adapterkit("--help").out.splitlines()
    for group, commands in cli.GROUPS.items():
        start = lines.index(f"{group}:") + 1
        assert [line.split(maxsplit=1) for line in lines[start : start + len(commands)]] == [
            [name, line] for name, line in commands.items()
        ]
    assert max(map(len, lines)) <= 80


@every_command
def test_help_starts_with_the_summary_line(name: str) -> None:
    usage, _, summary, *rest = adapterkit(name, "--help").out.splitlines()
    assert usage.startswith(f"Usage: adapterkit {name} [OPTIONS]")
    assert " ".join([summary, *rest[:1]]).strip().startswith(f"{cli.COMMANDS[name]}.")
    for option in ("--progress", "-q, --quiet", "-v, --verbose", "-V, --version", "-h, --help"):
        assert any(line.startswith(f"  {option}") for line in rest), option


@every_command
def test_help_does_not_repeat_its_first_line(name: str) -> None:
    assert (command_of(name).help or "").split()[0] != cli.COMMANDS[name].split()[0]


@every_command
def test_help_ends_with_examples_and_a_page_of_the_documentation(name: str) -> None:
    command, lines = command_of(name), adapterkit(name, "--help").out.splitlines()
    count = len(command.examples)
    assert 2 <= count <= 3
    assert lines[-count - 3 :] == ["Examples:", *(f"  {line}" for line in command.examples), "", lines[-1]]
    assert lines[-1] == f"Docs: docs/{command.docs}" and (ROOT / "docs" / command.docs).is_file()
    assert max(map(len, lines)) <= 80


EXAMPLES = [line for name in [*cli.COMMANDS, ""] for line in (command_of(name) if name else cli.group).examples]
NOT_RUN = {"train", "eval", "tui", "pull", "push"}  # each takes a model, a terminal or the Hub, and has its own tests


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files used in examples."""
    folder = tmp_path_factory.mktemp("examples")
    write_base(folder / "base")
    for name in ("adapter", "other", "adapters/one"):
        write_adapter(folder / name)
    for name in ("merged", "finetuned"):
        assert adapterkit("merge", folder / "base", folder / "adapter", "-o", folder / name).code == 0
    assert (
        adapterkit("convert", folder / "adapter", "-o", folder / "dora", "--to", "dora", "--base", folder / "base").code
        == 0
    )
    return folder


@pytest.mark.parametrize("line", dict.fromkeys(EXAMPLES))
def test_examples_run_as_printed(line: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    program, name, *words = shlex.split(re.sub(" >.*", "", line))
    assert program == "adapterkit"
    command_of(name).make_context(name, list(words))
    if name in NOT_RUN or "--hub" in words:
        return
    if "-o" in words:
        shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
    result = adapterkit(name, *words)
    assert result.code == 0, result


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "list", "inspect adapter --modules --against base", "inspect base", "compare adapter other --by module",
        "verify merged --base base --adapter adapter", "merge base adapter --dry-run", "merge base adapter -o json --report",
        "unmerge merged -o json --dry-run", "unmerge merged -o json", "quantize base -o json --to nf4 --dry-run",
        "quantize base -o json --to nf4", "combine adapter other -o json --dry-run", "combine adapter other -o json",
        "resize adapter -o json --rank 2", "convert dora -o json --to lora --base base --rank 2",
        "extract base finetuned -o json --rank 2",
    ],
)  # fmt: skip
def test_json_of_commands_is_documented(line: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapterkit` of handmade.py checks every run, so also those in the tests of training and of the Hub."""
    monkeypatch.chdir(scratch)
    shutil.rmtree("json", ignore_errors=True)
    assert adapterkit(*line.split(), "--json").code == 0
    assert adapterkit(line.split()[0], "--no-such-option", "--json").code == 2


def test_undocumented_fields_are_found() -> None:
    assert undocumented(["list", "--json"], {"adapters": [{"name": "a", "age": 1}], "path": None}) == [
        "adapters[].age",
        "path",
    ]
    assert undocumented(["merge", "--dry-run"], {"landed": {"a": {"b": ["c"]}}, "undone_by": ""}) == ["undone_by"]
    takes = [name for name in cli.COMMANDS if any("--json" in param.opts for param in command_of(name).params)]
    assert [name for name in takes if name not in {heading.split()[0] for heading in sections()}] == []


# --- the options that all share --------------------------------------------------------------------------------------


@every_command
def test_version_before_and_after(name: str) -> None:
    for args in (["-V", name], [name, "-V"], ["--version", name], [name, "--version"]):
        assert adapterkit(*args) == Outcome(0, f"adapterkit {package.__version__}\n", "")


@every_command
def test_progress_before_and_after(name: str) -> None:
    for args in (["--progress", "json", name], [name, "--progress", "json"]):
        adapterkit(*args, "--no-such-option")  # stops before anything is done
        assert adapterkit(*args, "-V").code == 0
    hint = "did you mean json?"
    for args in (["--progress", "jsn", name], [name, "--progress", "jsn"]):
        assert adapterkit(*args).message(2) == f"--progress jsn: expected auto, json or none; {hint}"


@pytest.mark.parametrize("after", [False, True])
def test_the_shared_options_do_the_same_before_and_after(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    (base / "notes.dat").symlink_to("elsewhere")

    def merge(out: str, *shared: str) -> Outcome:
        words = ["merge", str(base), str(adapter), "-o", str(tmp_path / out)]
        return adapterkit(*([*words, *shared] if after else [*shared, *words]))

    usual = merge("usual")
    assert usual.code == 0 and usual.err.startswith("note: ")
    quiet = merge("quiet", "--quiet")
    assert quiet.err == "" and quiet.out.splitlines()[0].startswith("merged ")
    shown = merge("shown", "--progress", "json")
    done = [json.loads(line) for line in shown.err.splitlines() if line.startswith("{")]
    assert done and done[-1]["done"] == done[-1]["total"]
    both = merge("both", "-q", "--progress", "json")
    assert {line[0] for line in both.err.splitlines()} == {"{"}
    assert "Traceback" in merge("usual", "-v").err and merge("usual").message(7)
    assert "exclude each other" in merge("none", "-q", "-v").message(2)
    assert merge("again").err == usual.err
    monkeypatch.setattr(Terminal, "isatty", lambda self: True)
    assert "merging" in merge("drawn").err and merge("undrawn", "-q").err == ""


def test_quiet_before_and_verbose_after_conflict() -> None:
    assert "exclude each other" in adapterkit("-q", "list", "-v").message(2)


def test_quiet_prints_errors() -> None:
    assert adapterkit("-q", "list", "nope").message(1) == "nope: no such folder"


# --- errors ----------------------------------------------------------------------------------------------------------


@every_command
def test_a_mistyped_option(name: str) -> None:
    assert adapterkit(name, "--progres").message(2) == "no such option '--progres'; did you mean --progress?"
    hint = f"adapterkit {name} --help shows the arguments and options"
    assert adapterkit(name, "--zzz").message(2) == f"no such option '--zzz'; {hint}"


@every_command
def test_a_mistyped_choice(name: str) -> None:
    for param in command_of(name).params:
        if isinstance(param, click.Option) and isinstance(param.type, click.Choice):
            choice = str(param.type.choices[0])
            message = adapterkit(name, param.opts[-1], f"{choice}x").message(2)
            assert message.startswith(f"{param.opts[-1]} {choice}x: expected ") and f"did you mean {choice}" in message
            assert "expected  or" not in message


@every_command
def test_a_missing_argument_or_option(name: str) -> None:
    required = [param for param in command_of(name).params if param.required]
    arguments = [param for param in required if isinstance(param, click.Argument)]
    given = []
    for param in [*arguments, *(param for param in required if param not in arguments)]:
        message = adapterkit(name, *given).message(2)
        assert message.startswith(f"missing {param.param_type_name} '") and "UNSET" not in message
        given += [*(param.opts[-1:] if isinstance(param, click.Option) else []), "x"]


def test_an_option_without_a_default_is_required(tmp_path: Path) -> None:
    for name, choices in (("convert", "dora, lora or rslora"), ("quantize", "nf4, fp4 or int8")):
        line = adapterkit(name, tmp_path, "-o", tmp_path / "out").message(2)
        assert line == f"missing option '--to': expected {choices}"


@every_command
def test_a_mistyped_command(name: str) -> None:
    assert adapterkit(f"{name}x").message(2) == f"no such command '{name}x'; did you mean {name}?"


@every_command
def test_an_error_as_json(name: str) -> None:
    result = adapterkit(name, "--progres", "--json")
    facts = {"schema": 1, "error": "no such option '--progres'", "hint": "did you mean --progress?", "exit_code": 2}
    assert json.loads(result.out) == facts
    assert result.message(2) == "; ".join([facts["error"], facts["hint"]])


def test_errors_of_all_kinds_as_json(tmp_path: Path) -> None:
    for args, code in (
        (["mrege", "--json"], 2),
        (["list", tmp_path / "nope", "--json"], 1),
        (["merge", write_base(tmp_path / "base"), write_adapter(tmp_path / "a"), "-o", tmp_path, "--json"], 2),
    ):
        facts: dict[str, Any] = json.loads(adapterkit(*args).out)
        assert (list(facts), facts["exit_code"]) == (["schema", "error", "hint", "exit_code"], code)


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_errors_are_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], coloured: bool) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    red, cyan, plain = ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") if coloured else ("", "", "")
    said = f"{red}error:{plain} no such command 'm\\x1b[31m'\n{cyan}hint:{plain} adapterkit --help lists the commands\n"
    assert adapterkit("m\x1b[31m").err.replace("\\\\", "\\") == said


# --- parameters of the Python calls, as options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("merge", "choose another `out`, or say `overwrite=True`", "choose another -o, or say --overwrite"),
        ("merge", 'use `dtype="fp32"` or `receipt=False`', "use --dtype fp32 or --no-receipt"),
        ("merge", "name a `base`, then `rename`", "name a BASE, then --map"),
        ("eval", "leave out `generate=True` and `max_new_tokens`", "leave out --generate and --max-new-tokens"),
        ("eval", "say `generate=False`", "say --no-generate"),
        ("list", "`rank=4` of `nothing` stays, as does `adapterkit pull`", "`rank=4` of `nothing` stays, as does `adapterkit pull`"),
    ],
)  # fmt: skip
def test_parameters_as_options(name: str, text: str, expected: str) -> None:
    assert in_options(text, command_of(name)) == expected


def test_errors_name_arguments_in_python_and_options_on_the_command_line() -> None:
    error = OutputExistsError("a: exists", hint="choose another `out`, or say `overwrite=True`")
    error.add_note("run it again with `resume=True`")
    assert str(error) == "a: exists; choose another `out`, or say `overwrite=True`"
    name_options(error, command_of("merge"))
    assert str(error) == "a: exists; choose another -o, or say --overwrite"
    assert error.__notes__ == ["run it again with --resume"]
    elsewhere = OutputExistsError("a: exists", hint="choose another `out`")
    name_options(elsewhere, command_of("eval"))
    assert elsewhere.hint == "choose another output"
    name_options(unknown := UsageError("no alpha", hint="give `alpha`, or `scaling`"), command_of("verify"))
    assert unknown.hint == ""


def test_options_are_shown_by_group() -> None:
    """Every option once: in its group, among the command's own, or among the shared ones."""
    lines = adapterkit("merge", "--help").out.splitlines()
    found, title = {}, ""
    for line in lines:
        title = line.rstrip(":") if line.endswith(":") and not line.startswith(" ") else title
        if line.startswith("  -"):
            assert found.setdefault(line.split()[0].rstrip(","), title) == title
    assert found["--rounding"] == "Quantization" and found["--scale"] == "Adapters" and found["-o"] == "Output"
    assert found["--threads"] == "Options" and found["-q"] == "Global options"
    assert [line for line in lines if line.strip().startswith("BASE ")] == [
        "  BASE is a directory, a .safetensors file or a Hub id; without it, the base"
    ]
