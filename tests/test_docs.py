"""The README and docs/: commands and options exist, links work, and the README stays short.

`make examples` compares the output of the examples, which takes minutes.

"""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import adapterkit
from adapterkit.cli.main import group

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("commands.md", "calls.md")  # by mkdocs
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_name
def test_commands_on_a_page_are_valid(page: Path) -> None:
    """By click's own parser: names, options, choices, and the number of arguments."""
    found = commands(page.read_text(encoding="utf-8"))
    for words in found:
        context = group.make_context("adapterkit", [], resilient_parsing=True)
        name, command, arguments = group.resolve_command(context, words[words.index("adapterkit") + 1 :])
        assert command is not None
        try:
            command.make_context(name, arguments, parent=context)
        except click.UsageError as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error.format_message()}")
    assert found or page.name not in ("README.md", "merge.md", "unsloth.md")


def commands(text: str) -> list[list[str]]:
    """Yield the words of each adapterkit command in the shell blocks."""
    lines = []
    for language, block in BLOCK.findall(text):
        block = block.replace("\\\n", " ")
        if language == "console":
            block = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        lines += block.splitlines() if language in ("console", "sh") else []
    split = (shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\||;| >", line))
    return [words for words in split if "adapterkit" in words]


@by_name
def test_links_on_a_page_exist(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    files = [page.parent / target for target in targets if "://" not in target]
    assert [file for file in files if file.name not in GENERATED and not file.exists()] == []


@by_name
def test_names_in_the_python_of_a_page_exist(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            used = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
            names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "adapterkit"}
            assert [name for name in names if not hasattr(adapterkit, name)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
