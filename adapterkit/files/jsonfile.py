"""Read untrusted JSON within limits on size, values and depth; refuse duplicate keys."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from adapterkit.errors import FormatError
from adapterkit.files.opening import open_inside, read_up_to

# Parsed JSON takes up to 20 times its size in memory, and more if it has characters above U+FFFF. These limits admit
# headers and indexes of 250 000 tensors, twice the largest real ones; real configs are a few kilobytes.
MAX_HEADER_BYTES = 1 << 26
MAX_HEADER_ITEMS = 2_000_000
MAX_CONFIG_BYTES = 1 << 24
MAX_CONFIG_ITEMS = 500_000
MAX_DEPTH = 100  # levels; Python's JSON encoder takes a stack frame for each
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(file: Path, large: bool = False, allow_surrogates: bool = False) -> dict[str, Any]:
    """Read a JSON object from `file`; raises FormatError naming the line, and refuses links out of its folder.

    `large` raises the limits for files with an entry per tensor of a model, such as an index. `allow_surrogates`
    accepts lone surrogates, which stand for the bytes of file names that are not UTF-8.
    """
    with open_inside(file.parent, file.name) as stream:
        return parse_json(file, stream, large, allow_surrogates)


def parse_json(file: Path, stream: BinaryIO, large: bool = False, allow_surrogates: bool = False) -> dict[str, Any]:
    """Parse the rest of `stream`, the contents of `file`, with the checks of `read_json`."""
    raw = read_up_to(stream, MAX_HEADER_BYTES if large else MAX_CONFIG_BYTES, file)
    value = parse_object(file, raw, MAX_HEADER_ITEMS if large else MAX_CONFIG_ITEMS, allow_surrogates)
    depth = 0
    level: list[Any] = [value]
    while level:
        depth += 1
        inner = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inner if isinstance(child, dict | list)]
    if depth > MAX_DEPTH:
        raise FormatError(f"{file}: the JSON is nested {depth} levels deep, expected at most {MAX_DEPTH}")
    return value


def parse_object(file: Path, raw: bytes, max_values: int, allow_surrogates: bool = False) -> dict[str, Any]:
    """Parse a JSON object of at most `max_values` values, bounded before parsing by its commas and brackets."""
    if (found := sum(map(raw.count, (b",", b"{", b"[")))) > max_values:
        raise FormatError(f"{file}: the JSON has up to {found:,} values, expected at most {max_values:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            [(key, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError(f"{file}: the JSON has the duplicate key {key[:60]!r}")
        return result

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
        if SURROGATE.search(raw) and not allow_surrogates:  # lone surrogates cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
