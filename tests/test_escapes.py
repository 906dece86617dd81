"""What strangers wrote steers nothing: no terminal, no table, no card, no picture, wherever it is shown."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from handmade import adapterkit

import adapterkit as package
from adapterkit.cli import output
from adapterkit.errors import FormatError
from adapterkit.words import LONGEST, markdown, visible, visible_lines

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
def test_what_steers_is_written_out(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert visible(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم", "नियम क्\u200dष र्\u200cय", "日本語\u3000模型", "a\u00a0b", "Ünï©ode", "قمر", "שלום", "🦙", "❤\ufe0f", "1\ufe0f\u20e3",
        "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👩🏽\u200d🚀", "🏃\u200d♀\ufe0f", "\ufffd",
    ],
)  # fmt: skip
def test_honest_writing_stays(text: str) -> None:
    assert visible(text) == text


def test_what_is_too_long_keeps_both_ends() -> None:
    for text in (f"a{'x' * 10**6}z", f"a{chr(27) * 10**6}z"):
        shown = visible(text)
        assert (len(shown), shown[0], shown[-1], shown.count("…")) == (LONGEST, "a", "z", 1)
        assert visible(shown) == shown


def test_lines_stay_lines() -> None:
    assert visible_lines("a\r\n\tb\x1b\rc\n") == "a\n\tb\\x1b\\rc\n"


def test_errors_show_what_steers_wherever_they_are_printed() -> None:
    assert str(FormatError("a\n\x1b[2J: b", "second \x9b")) == "a\\n\\x1b[2J: b\nsecond \\x9b"
    code = "from adapterkit.errors import FormatError; raise FormatError('a\\n\\x1b]0;t\\x07')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.endswith("adapterkit.errors.FormatError: a\\n\\x1b]0;t\\x07\n")


def test_arguments_that_steer_are_shown_in_usage_errors() -> None:
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


@pytest.mark.parametrize("file", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda file: file.stem)
def test_one_module_prints(file: Path) -> None:
    """Whatever else printed could forget to show what steers."""
    if file.stem == Path(output.__file__).stem:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "click.echo", "click.secho", "click.prompt", "click.confirm", "Console"}
            assert not called.endswith((".stdout.write", ".stderr.write"))
