"""Untrusted text controls no terminal, table, card or picture, wherever it is shown."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from handmade import Outcome, Terminal, adapterkit, write_adapter
from hostile import FOLDER, HOSTILE, STEERS, steering, write_hostile_adapter, write_hostile_base
from hubserver import Hub
from markdown_it import MarkdownIt

import adapterkit as package
from adapterkit.cli import output
from adapterkit.errors import FormatError
from adapterkit.text import LONGEST, command, markdown, visible, visible_lines
from adapterkit.tui.widgets import plain

PACKAGE = Path(package.__file__).parent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m \x90 \x7f \0 \b", r"\x9b31m \x90 \x7f \x00 \x08"),
        ("a\nb\rc\td\u2028e\x85f\x0bg", r"a\nb\rc\td\u2028e\x85f\x0bg"),
        ("\u202e\u202d\u2066\u2069\u200e\u200f\u061c", r"\u202e\u202d\u2066\u2069\u200e\u200f\u061c"),
        ("\udcff \ud800", r"\udcff \ud800"),
        ("q\u200bp r\u200dj\u200c \ufeff \u00ad \u2060", r"q\u200bp r\u200dj\u200c \ufeff \xad \u2060"),
        ("\u200d", r"\u200d"),
        ("a\ufe0f \u3164 \u115f \u034f \U000e0041", r"a\ufe0f \u3164 \u115f \u034f \U000e0041"),
        ("[red]x[/] :warning: $x$ \\x1b", "[red]x[/] :warning: $x$ \\x1b"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert visible(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم", "नियम क्\u200dष र्\u200cय", "日本語\u3000模型", "a\u00a0b", "Ünï©ode", "قمر", "שלום", "🦙", "❤\ufe0f", "1\ufe0f\u20e3",
        "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👩🏽\u200d🚀", "🏃\u200d♀\ufe0f", "\ufffd",
    ],
)  # fmt: skip
def test_harmless_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


def test_long_text_is_truncated_in_the_middle() -> None:
    for text in (f"a{'x' * 10**6}z", f"a{chr(27) * 10**6}z"):
        shown = visible(text)
        assert (len(shown), shown[0], shown[-1], shown.count("…")) == (LONGEST, "a", "z", 1)
        assert visible(shown) == shown


def test_a_command_to_copy_is_quoted_for_a_shell() -> None:
    words = [
        "printf",
        "%s\\0",
        "a b",
        "it's",
        "$HOME`x`",
        "\\n",
        os.fsdecode(b"\xff'\\"),
        "a\nb\x1b[201~1 \u202e\u200bé",
        "می\u200cخواهم",
    ]
    line = command(words)
    assert visible(line) == line
    said = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert said == b"".join(os.fsencode(word) + b"\0" for word in words[2:])


def test_newlines_of_a_text_are_preserved() -> None:
    assert visible_lines("a\r\n\tb\x1b\rc\n") == "a\n\tb\\x1b\\rc\n"


def test_errors_are_escaped() -> None:
    assert str(FormatError("a\n\x1b[2J: b", "second \x9b")) == "a\\n\\x1b[2J: b\nsecond \\x9b"
    code = "from adapterkit.errors import FormatError; raise FormatError('a\\n\\x1b]0;t\\x07')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.endswith("adapterkit.errors.FormatError: a\\n\\x1b]0;t\\x07\n")


def test_arguments_in_usage_errors_are_escaped() -> None:
    for argument in ("--\x1b]0;t\x07", "\x9b2J\nError: all is well"):
        result = adapterkit("merge", "base", "adapter", "--dtype", argument)
        assert result.code == 2
        assert set(result.err) - {"\n"} <= set(map(chr, range(32, 127)))


def test_markdown_is_not_interpreted() -> None:
    assert markdown("a|b\n---\n<img src=x>") == r"a\|b\\n---\\n\<img src=x\>"
    assert markdown("[a](https://b.c) `x` ![i](www.d) *e* _f_ g_h_i") == (
        r"\[a\](https:\//b.c) \`x\` !\[i\](www\.d) \*e\* \_f\_ g_h_i"
    )
    assert [markdown(text) for text in ("# a", "- a", "a # b-c", "$x$ &lt; ~b~ a@b")] == [
        r"\# a", r"\- a", "a # b-c", r"\$x\$ \&lt; \~b\~ a\@b",
    ]  # fmt: skip


@pytest.mark.parametrize("file", sorted((PACKAGE / "tui").glob("*.py")), ids=lambda file: file.stem)
def test_the_app_shows_text_without_markup(file: Path) -> None:
    """Other ways to show text could interpret markup."""
    if file.stem == Path(plain.__file__).stem:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("textual"):
            names = {alias.name for alias in node.names}
            assert names & {"widgets", "Static", "Label", "DataTable", "Tree", "Select", "OptionList", "Toast"} == set()
        if isinstance(node, ast.keyword):
            assert node.arg != "tooltip"
            assert node.arg != "markup" or ast.unparse(node.value) == "False"


@pytest.mark.parametrize("file", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda file: file.stem)
def test_one_module_prints(file: Path) -> None:
    """Other modules could forget to escape."""
    if file.stem == Path(output.__file__).stem:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "click.echo", "click.secho", "click.prompt", "click.confirm", "Console"}
            assert not called.endswith((".stdout.write", ".stderr.write"))


# --- every command ---------------------------------------------------------------------------------------------------

BARS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r(?!\n)")  # colours, and what redraws a line


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hostile adapters, a base, a merge of them, and corrupt files."""
    home = tmp_path_factory.mktemp("workshop")
    write_hostile_base(home / "base")
    for name, alpha in (("one", 6), ("two", 9)):
        write_hostile_adapter(home / "all" / f"{FOLDER}{name}", alpha)
        write_hostile_adapter(home / name, alpha)
    (home / "base").rename(home / f"{FOLDER}base")
    (home / "base").symlink_to(home / f"{FOLDER}base")
    write_hostile_adapter(home / "wrong", peft_type=HOSTILE)
    write_hostile_adapter(home / "strange", alpha_pattern={HOSTILE: HOSTILE}, rank_pattern={HOSTILE: 3})
    write_adapter(home / "steering", {f"base_model.model.{STEERS}.lora_A.weight": torch.ones(4, 8)})
    (home / os.fsdecode(b"\xff\x9b2J")).mkdir()
    (home / "data.jsonl").write_text(json.dumps({HOSTILE: HOSTILE}) + "\n" + json.dumps({"text": HOSTILE}) + "\n")
    assert adapterkit("merge", home / "base", home / "one", "-o", home / "merged").code == 0
    return home


COMMANDS = """
list .
list all --search b
list . --json
list no-such-folder
inspect one
inspect all/{name}one --modules
inspect one --modules --json
inspect one --against base
inspect one --header-only --modules --against {name}base
inspect one --plot plot.svg
inspect base
inspect base --json
inspect wrong
inspect strange
inspect steering --modules
inspect {name}nothing
merge base one --dry-run
merge base one two:0.5 --dry-run --json
merge base all/{name}one -o {name}merged --report
merge base one -o merged
merge base steering --dry-run
merge base wrong
merge base strange --dry-run
merge base {name}
merge base one --map {name}={name} --dry-run
unmerge merged -o again --dry-run
unmerge merged -o again --adapter one
unmerge {name}merged -o {name}again
unmerge base -o again
verify merged --base base --adapter one
verify merged --base base --adapter all/{name}two
verify merged --base base --adapter two --json
combine all/{name}one two:0.5 -o combined --dry-run
combine one two -o {name}combined --method ties
combine one two -o combined --method {name}
combine one two -o combined --set {name}={name}
compare all/{name}one all/{name}two --by module
compare one two --plot likeness.svg --json
compare one steering
convert one -o converted --to rslora
convert one -o {name}dora --to dora --base base
convert one -o converted --to {name}
resize all/{name}one -o resized --rank 2
extract base merged -o extracted --rank 4
extract base merged -o {name}extracted --energy 0.9
quantize base -o quantized --to nf4
push one me/repo --dry-run
push one me/repo --base-id {name}
pull me/{name}
pull me/no-such-thing
train base data.jsonl -o trained
train base data.jsonl -o trained --recipe {name}
eval base data.jsonl
eval base one data.jsonl
tui {name}
{name}
""".strip().splitlines()


def run_hostile(command: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run a command in a copy of the workshop, where `{name}` is a hostile name."""
    shutil.copytree(workshop, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return adapterkit(*(word.format(name=FOLDER) for word in command.split()))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_control_characters(
    command: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_hostile(command, workshop, tmp_path, monkeypatch)
    assert steering(result.out) | steering(result.err) == set()
    assert not re.search(r"^\W*FORGED", result.out + result.err, re.MULTILINE)
    assert result.code in (0, 1, 2, 3, 4, 5, 7)
    if "--json" in command and result.code == 0:
        assert result.out.isascii()
        json.loads(result.out)


@pytest.mark.parametrize("command", [*COMMANDS[:12], "merge base all/{name}one -o out", "compare one two"])
def test_a_terminal_gets_our_own_colours_only(
    command: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = run_hostile(command, workshop, tmp_path, monkeypatch)
    for text in (result.out, result.err):
        assert "\x1b[38;5;201m" not in text
        assert steering(BARS.sub("", text)) == set()


def test_text_from_the_hub_is_escaped(hub: Hub, workshop: Path, tmp_path: Path) -> None:
    hub.add("lab/base", {"config.json": b"{}"})
    files = {file.name: file.read_bytes() for file in (workshop / "one").iterdir()}
    hub.add(
        "some/lora", files | {HOSTILE: b"x", "README.md": f"---\nbase_model: {json.dumps(HOSTILE)}\n---\n".encode()}
    )
    one = shutil.copytree(workshop / "one", tmp_path / FOLDER)
    (one / f".{FOLDER}").write_text("x")
    (one / "README.md").unlink()
    sent = adapterkit("push", one, "me/repo", "--base-id", "lab/base", "--dry-run")
    assert "skip: hidden" in sent.out
    results = [sent, adapterkit("push", one, "me/repo"), adapterkit("pull", "some/lora")]
    results += [adapterkit("inspect", "some/lora"), adapterkit("list", tmp_path, "--hub", "--details")]
    for status in (200, 400, 403, 404, 500):
        body = json.dumps({"error": HOSTILE}).encode()
        said = "".join(c for c in STEERS if c.isascii() and c not in "\r\n\0")
        hub.fail("GET /api/.*", status, body=body, headers=(("X-Error-Message", said),), times=9)
        results += [adapterkit("pull", "some/other"), adapterkit("list", tmp_path, "--hub")]
        hub.faults.clear()
    for result in results:
        assert steering(result.out) | steering(result.err) == set()
        assert not re.search(r"^\W*FORGED", result.out + result.err, re.MULTILINE)


# --- cards and pictures ----------------------------------------------------------------------------------------------


def kinds(markdown: str) -> set[str]:
    """Return the Markdown elements in a text."""
    tokens = MarkdownIt("commonmark", {"linkify": True}).enable(["table", "strikethrough", "linkify"]).parse(markdown)
    return {one.type for token in tokens for one in (token, *(token.children or ()))} - {"inline", "text", "softbreak"}


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the YAML and the body of a card."""
    _, block, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(block), body


OURS = {
    f"{name}_{side}"
    for name in ("heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td", "bullet_list", "list_item")
    for side in ("open", "close")
} | {"code_inline", "fence"}


def test_names_in_cards_are_escaped(workshop: Path, tmp_path: Path, hub: Hub) -> None:
    one, two = (workshop / "all" / f"{FOLDER}{name}" for name in ("one", "two"))
    base = workshop / f"{FOLDER}base"
    assert adapterkit("merge", base, one, "-o", tmp_path / "merged").code == 0
    assert adapterkit("combine", one, two, "-o", tmp_path / "combined").code == 0
    assert adapterkit("quantize", base, "-o", tmp_path / "quantized", "--to", "nf4").code == 0
    for name in ("merged", "combined", "quantized"):
        data, body = card_of(tmp_path / name)
        assert set(data) <= {"base_model", "base_model_relation", "library_name", "tags"}
        assert kinds(body) <= OURS
        assert steering(body) == set()
        assert body.count("<img") == body.count("\\<img")
        [table] = re.findall(r"^\|(?:.*\n\|)+.*", body, re.MULTILINE)
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {5}


def test_names_in_the_cards_of_runs_and_pushes_are_escaped() -> None:
    from adapterkit.hub.upload.card import CardFacts, complete_card
    from adapterkit.train.recipe import Recipe
    from adapterkit.train.runs.export import card

    text, _ = complete_card(
        None, CardFacts("me/repo", "adapter", "lab/base", (), None, None, "peft", (), {"targets": HOSTILE}), []
    )
    data = {"name": HOSTILE, "records": 1, "tokens": 2, "truncated": 0, "left_out": 0}
    facts = {"data": data, "trained_parameters": 1, "steps": 1, "loss": 0.5, "eval_loss": None, "seconds": 1.0}
    facts |= {"tokens": 2, "hardware": HOSTILE, "versions": {"python": HOSTILE}}
    run = card(Recipe(base="b", data="d", targets=HOSTILE), None, facts, f"adapterkit train '\n```\n{HOSTILE}'")
    for made in (text, run):
        body = made.split("---\n", 2)[2]
        assert kinds(body) <= OURS
        assert steering(made) == set()


def test_names_in_pictures_are_escaped(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    one, two = (workshop / "all" / f"{FOLDER}{name}" for name in ("one", "two"))
    assert adapterkit("inspect", one, "--plot", tmp_path / "norms.svg").code == 0
    assert adapterkit("compare", one, two, "--plot", tmp_path / "likeness.svg").code == 0
    for name in ("norms", "likeness"):
        picture = (tmp_path / f"{name}.svg").read_text()
        texts = [
            "".join(text.itertext())
            for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert [text for text in texts if "$x$" in text and "`y`" in text]
        assert [text for text in texts if text.startswith("a\\x1b[38;5;201m")]
        assert steering(picture) == set()
