"""JSON of strangers: bounded by size, values and depth, and without duplicate keys."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from adapterkit.errors import FormatError
from adapterkit.files.opening import open_inside, read_up_to

# JSON takes up to 20 times its size in memory, and more for its first byte above U+FFFF. Headers and indexes of 250 000
# tensors fit these bounds; the largest of real files have less than half of that, and real configs some kilobytes.
MAX_HEADER_BYTES = 1 << 26
MAX_HEADER_ITEMS = 2_000_000
MAX_CONFIG_BYTES = 1 << 24
MAX_CONFIG_ITEMS = 500_000
MAX_DEPTH = 100  # of JSON that is written again: for that Python takes a stack frame a level
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(file: Path, large: bool = False, any_name: bool = False) -> dict[str, Any]:
    """Read a JSON object from `file`, which may be no link out of its folder, or raise FormatError naming the line.

    `large` takes what has entries for every tensor of a model, such as an index; with `any_name` its strings may be
    file names that are not UTF-8, whose bytes are halves of surrogate pairs.
    """
    with open_inside(file.parent, file.name) as stream:
        raw = read_up_to(stream, MAX_HEADER_BYTES if large else MAX_CONFIG_BYTES, file)
    return parse_json(file, raw, large, any_name)


def parse_json(file: Path, raw: bytes, large: bool = False, any_name: bool = False) -> dict[str, Any]:
    """The JSON object that `file` holds as `raw`, checked as `read_json` does."""
    value = parse_object(file, raw, MAX_HEADER_ITEMS if large else MAX_CONFIG_ITEMS, any_name)
    depth = 0
    level: list[Any] = [value]
    while level:
        depth += 1
        inner = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inner if isinstance(child, dict | list)]
    if depth > MAX_DEPTH:
        raise FormatError(f"{file}: its JSON is nested {depth} deep, expected at most {MAX_DEPTH}")
    return value


def parse_object(file: Path, raw: bytes, items: int, any_name: bool = False) -> dict[str, Any]:
    """The JSON object `raw`, of at most that many values: each but the first of a container comes after a comma."""
    if (found := sum(map(raw.count, (b",", b"{", b"[")))) > items:
        raise FormatError(f"{file}: its JSON has up to {found:,} values, expected at most {items:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError(f"{file}: the JSON names {twice[:60]!r} twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
        if SURROGATE.search(raw) and not any_name:  # half a surrogate pair cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
