"""Read training records from files, one at a time: texts, prompts with completions, or chats.

A malformed record is yielded as a `BadRecord` with its place and the reason; the caller decides whether to stop.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from adapterkit.errors import AdapterkitError, FormatError, MissingFileError, OfflineError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.sandbox import start
from adapterkit.hub.names import parse_hub_id
from adapterkit.packages import needed
from adapterkit.train.data import parquet_subprocess

FORMS = (("text",), ("prompt", "completion"), ("messages",))
LINE = 16_000_000  # maximum characters of a record in a file, unused fields included
TOO_LONG = f"has more than {LINE:,} characters"
WHOLE = 1_000_000_000  # maximum bytes of a JSON file that is not JSON lines
MEMORY = 4 << 30  # bytes of memory for unpacking a Parquet file
UNPACKED, RATIO = 16_000_000, 100  # a Parquet file may unpack to UNPACKED + RATIO · its size characters
ROW = 200  # minimum number of characters that a Parquet row counts for


@dataclass(frozen=True, slots=True)
class Fields:
    """The names of the fields in a file; an empty name turns that form off."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True, slots=True)
class Record:
    """A record in one of the three forms; the fields of the other forms are None."""

    where: str  # such as train.jsonl:17
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A malformed record."""

    where: str
    why: str


RawRecords: TypeAlias = Iterator[tuple[str, Any] | BadRecord]  # (where, parsed value)
DEFAULT = Fields()


def read_records(source: str | os.PathLike[str], fields: Fields = DEFAULT) -> Iterator[Record | BadRecord]:
    """Read the records of a file or of a dataset on the Hub (`org/name[@revision][:split]`), in order.

    The suffix of a file selects its reader. The fields of a record decide its form; if it has several forms, the one
    with renamed fields is used. Everything except JSON arrays is streamed, and the size of a record is limited.

    Raises:
        FormatError: The source is not a regular file, cannot be read, is empty, or no record has any of the fields.
        UsageError: The file type is unknown, or a package is missing.
        OfflineError: The Hub cannot be reached.
    """
    names = [name for name in astuple(fields) if name]
    empty, known, first = True, False, None
    try:
        for row in _rows(source, fields):
            empty = False
            if isinstance(row, BadRecord):
                yield row
                continue
            where, value = row
            if isinstance(value, Mapping) and value:
                first = first or (where, list(value))
                known = known or any(name in value for name in names)
            yield _record(where, value, fields)
    except AdapterkitError:
        raise
    except OSError as error:
        raise FormatError(f"{source}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise FormatError(f"{source}: has no records, expected one or more")
    if first and not known:
        raise FormatError(
            f"{first[0]}: has the fields {_listed(first[1])}; no record has any of {_listed(names)}. Name the fields "
            "with `text_field`, with `prompt_field` and `completion_field`, or with `messages_field`"
        )


def _record(where: str, row: Any, fields: Fields) -> Record | BadRecord:
    """`row` as a checked record."""
    if not isinstance(row, Mapping):
        return BadRecord(where, f"is {type(row).__name__}, expected an object with fields")
    names = asdict(fields)
    values = {part: row[name] for part, name in names.items() if name and row.get(name) is not None}
    forms = [form for form in FORMS if values.keys() >= set(form)]
    renamed = [form for form in forms if any(names[part] != part for part in form)]
    if len(forms := renamed if len(forms) > 1 and renamed else forms) != 1:
        found = "has " + (_listed(names[part] for part in values) or f"none of {_listed(filter(None, names.values()))}")
        if forms:
            found += ": more than one form; turn one off with an empty name (`text_field=''`)"
        return BadRecord(where, f"{found}: expected a text, a prompt with a completion, or messages")
    for part in forms[0]:
        if why := _problem(part, values[part]):
            return BadRecord(where, f"{names[part]!r} {why}")
    try:  # a tokenizer fails on both with a worse message
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError):
        return BadRecord(where, "has invalid UTF-8 or a lone surrogate")
    form = {part: values[part] for part in forms[0]}
    return Record(where, messages=tuple(form["messages"])) if "messages" in form else Record(where, **form)


def _problem(part: str, value: Any) -> str | None:
    """Why `value` is not valid as the field `part` of a record, or None."""
    if part != "messages":
        if not isinstance(value, str):
            return f"is {type(value).__name__}, expected a string"
        return "is empty" if part != "prompt" and not value.strip() else None
    if not isinstance(value, list):
        return f"is {type(value).__name__}, expected a list of {{role, content}}"
    for number, turn in enumerate(value, 1):
        shaped = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
        if not shaped or not (isinstance(turn.get("content"), str) or turn.get("tool_calls")):
            return f"has an invalid turn {number}, expected strings in {{role, content}}"
    if not any(turn["role"] == "assistant" and str(turn.get("content") or "").strip() for turn in value):
        return "has no assistant turn with content"
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# --- files -----------------------------------------------------------------------------------------------------------


def _rows(source: str | os.PathLike[str], fields: Fields) -> RawRecords:
    path = Path(source).expanduser()
    reader = READERS.get(path.suffix.lower())
    if os.path.lexists(path):
        if reader is None:
            raise UsageError(f"{path}: unsupported file type, expected {', '.join(READERS)}")
        return reader(path, fields)
    if reader or parse_hub_id(str(source)) is None or (path.parent.is_dir() and path.parent != Path()):
        raise MissingFileError(f"{source}: no such file; expected a file or a dataset on the Hub: org/name[:split]")
    return _hub_rows(str(source))


def _lines(file: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of `file`; invalid UTF-8 becomes lone surrogates, which `_record` reports."""
    with io.TextIOWrapper(open_regular(file), "utf-8-sig", "surrogateescape", newline) as stream:
        yield from _bounded(stream)


def _bounded(stream: IO[str]) -> Iterator[str]:
    """The lines of `stream`, cut to `LINE + 1` characters, so that callers recognize lines that are too long."""
    while line := stream.readline(LINE + 1):
        yield line
        while len(line) > LINE and not line.endswith("\n"):
            line = stream.readline(LINE + 1)


def _text_rows(file: Path, fields: Fields) -> RawRecords:
    """One text per line; blank lines are skipped, as in JSON lines."""
    for number, line in enumerate(_lines(file), 1):
        where = f"{file.name}:{number}"
        if len(line) > LINE:
            yield BadRecord(where, TOO_LONG)
        elif line.strip():
            yield where, {fields.text: line.rstrip("\n")}


def _json_line_rows(file: Path, fields: Fields) -> RawRecords:
    for number, line in enumerate(_lines(file), 1):
        where = f"{file.name}:{number}"
        if len(line) > LINE:
            yield BadRecord(where, TOO_LONG)
        elif line.strip():
            try:
                yield where, _parse(line.rstrip("\n"))
            except (ValueError, RecursionError) as error:
                yield BadRecord(where, f"is not valid JSON: {str(error).replace('line 1 column', 'column')}")


def _json_rows(file: Path, fields: Fields) -> RawRecords:
    """An array of records, an object with one array in it, a single record, or JSON lines."""
    with open_regular(file) as stream:
        raw = stream.read(WHOLE + 1)
    if len(raw) > WHOLE:
        raise FormatError(
            f"{file}: is larger than {WHOLE:,} bytes; convert it to JSON lines (.jsonl), read as a stream"
        )
    try:
        value = _parse(raw.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):  # a second value follows the first: JSON lines
            raise FormatError(f"{file}: is not valid JSON: {error}") from error
        yield from _json_line_rows(file, fields)
        return
    if isinstance(value, dict) and not any(name in value for name in astuple(fields)):
        arrays = [inner for inner in value.values() if isinstance(inner, list)]
        value = arrays[0] if len(arrays) == 1 else value
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{file.name}: record {number}", row


def _parse(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) < len(pairs):  # Python silently takes the last
            raise ValueError(f"duplicate key in an object: {_listed(name for name, _ in pairs)[:200]}")
        return result

    return json.loads(text, object_pairs_hook=unique)


class _TableLines:
    """The lines of a table; limits the size of a row, which an unclosed quote would extend to the end of the file."""

    def __init__(self, file: Path) -> None:
        self.lines, self.number, self.taken = _lines(file, newline=""), 0, 0

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number, self.taken = self.number + 1, self.taken + len(line)
        if self.taken > LINE:
            raise csv.Error(TOO_LONG)
        return line


def _table_rows(file: Path, fields: Fields) -> RawRecords:
    csv.field_size_limit(LINE)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    lines = _TableLines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where, lines.taken = f"{file.name}:{lines.number + 1}", 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(where, f"is not valid CSV: {error}")
            continue
        if not header:
            header = cells
            if duplicates := [name for name in astuple(fields) if name and header.count(name) > 1]:
                raise FormatError(f"{where}: the header has {duplicates[0]!r} twice")
        elif cells and len(cells) != len(header):
            yield BadRecord(where, f"has {len(cells)} cells, the header has {len(header)}")
        elif cells:
            yield where, dict(zip(header, cells, strict=True))


def _parquet_rows(file: Path, fields: Fields) -> RawRecords:
    """The rows of a Parquet file, unpacked in a subprocess, up to a limit that depends on the size of the file."""
    needed("pyarrow", f"{file}: Parquet")
    names = json.dumps([name for name in astuple(fields) if name])
    with (
        open_regular(file) as stream,
        start(
            Path(parquet_subprocess.__file__), names, memory=MEMORY, what=f"{file}: Parquet", stdin=stream
        ) as process,
    ):
        room = UNPACKED + RATIO * os.fstat(stream.fileno()).st_size
        assert process.stdout is not None
        try:
            for number, line in enumerate(_bounded(process.stdout), 1):
                room -= max(len(line), ROW)
                if room < 0:
                    raise FormatError(f"{file}: unpacks to more than {RATIO} times its size; convert it to JSON lines")
                answer = json.loads(line) if len(line) <= LINE else {"bad": TOO_LONG}
                if "error" in answer:
                    raise FormatError(f"{file}: {answer['error']}")
                where = f"{file.name}: record {number}"
                yield (where, answer["row"]) if "row" in answer else BadRecord(where, answer["bad"])
            if process.wait():
                raise FormatError(f"{file}: takes too much memory to read, or crashes pyarrow")
        finally:
            process.kill()


def _hub_rows(source: str) -> RawRecords:
    load = needed("datasets", f"{source}: no such file, and a dataset on the Hub").load_dataset
    id = parse_hub_id(source)
    assert id is not None
    try:
        rows = load(id.repo, revision=id.revision, split=id.folder or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}: record {number}", row
    except ConnectionError as error:
        raise OfflineError(f"{source}: no such file, and the Hub cannot be reached: {error}") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{source}: no such file, and the Hub cannot load such a dataset: {error}") from error


READERS: dict[str, Callable[[Path, Fields], RawRecords]] = {
    ".jsonl": _json_line_rows, ".ndjson": _json_line_rows, ".json": _json_rows, ".csv": _table_rows,
    ".tsv": _table_rows, ".parquet": _parquet_rows, ".txt": _text_rows, ".md": _text_rows,
}  # fmt: skip
