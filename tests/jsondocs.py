"""The fields of docs/json.md, and the fields of an object that are missing there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "json.md"
COMMON = ("JSON output", "Errors")


@cache
def sections() -> dict[str, set[str]]:
    """The fields in the first column of each section's table, by the headings."""
    found = {}
    for part in re.split(r"^##? ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
        for name in heading.split(", "):
            found[name] = {field for cell in cells for field in re.findall("`(.*?)`", cell)}
    return found


def undocumented(args: Sequence[str], facts: dict[str, Any]) -> list[str]:
    """The fields of the object printed by a command that its sections do not have."""
    planned = "--dry-run" in args
    command = next((arg for arg in args if any(heading.split()[0] == arg for heading in sections())), "")
    headings = [heading for heading in sections() if heading.split()[0] == command]
    known = [heading for heading in headings if ("--dry-run" in heading) is planned] or headings
    documented = [field for heading in (*COMMON, *known) for field in sections()[heading]]
    patterns = [re.compile(re.escape(field).replace(r"\*", ".*"), re.DOTALL) for field in documented]
    missing = [field for field in fields(facts) if not any(pattern.fullmatch(field) for pattern in patterns)]
    return [field for field in missing if not any(one.startswith((f"{field}.", f"{field}[")) for one in documented)]


def fields(value: Any, name: str = "") -> Iterator[str]:
    """The fields of a value as docs/json.md writes them: `.` before a key, `[]` for the elements of a list."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from fields(one, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for one in value:
            yield from fields(one, f"{name}[]")
    else:
        yield name
