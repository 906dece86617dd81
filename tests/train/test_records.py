"""Records from files: literal ones of every kind, and malformed ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterkit.errors import FormatError, MissingPackageError, OfflineError, UsageError
from adapterkit.train.data import records
from adapterkit.train.data.records import BadRecord, Fields, Record, read_records

CHAT = [{"role": "user", "content": "Où ?"}, {"role": "assistant", "content": "Là."}]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Record | BadRecord]]:
    """Return the records in a file of these bytes."""

    def read(name: str, content: str | bytes, **fields: str) -> list[Record | BadRecord]:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_records(tmp_path / name, Fields(**fields)))

    return read


Read = Callable[..., list[Record | BadRecord]]


def test_json_lines_in_all_three_forms(read: Read) -> None:
    lines = [{"text": "a\nb"}, {"prompt": "", "completion": " x"}, {"messages": CHAT, "id": 3}]
    assert read("train.jsonl", "\n".join(json.dumps(line) for line in lines)) == [
        Record("train.jsonl:1", text="a\nb"),
        Record("train.jsonl:2", prompt="", completion=" x"),
        Record("train.jsonl:3", messages=tuple(CHAT)),
    ]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "T.JSONL", "données é.jsonl"])
def test_bom_crlf_and_blank_lines(read: Read, name: str) -> None:
    assert read(name, b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\r\n  \r\n{"text": "b\\r"}\r\n\r\n') == [
        Record(f"{name}:1", text="é"),
        Record(f"{name}:4", text="b\r"),
    ]


def test_only_newlines_end_a_line(read: Read) -> None:
    assert read("t.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}') == [
        Record("t.jsonl:1", text="a\u2028b\x85c"),
        Record("t.jsonl:2", text="d"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "is not valid JSON: Expecting property name"),
        (b'{"text": "a"} x', r"is not valid JSON: Extra data: column 15"),
        (b"[1]", "is list, expected an object with fields"),
        (b"null", "is NoneType, expected an object"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": ', "is not valid JSON: Expecting value: column 10 (char 9)"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b"{}", r"has none of 'text', 'prompt', 'completion', 'messages': expected a text, a prompt with a completion"),
        (b'{"text": null}', "has none of"),
        (b'{"text": 5}', "'text' is int, expected a string"),
        (b'{"text": ""}', "'text' is empty"),
        (b'{"text": " \\n\\t"}', "'text' is empty"),
        (b'{"text": "a", "text": "b"}', "duplicate key in an object: 'text', 'text'"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "a", "id": "\xc3"}', "invalid UTF-8"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b'{"prompt": "a"}', "has 'prompt': expected a text, a prompt with a completion, or messages"),
        (b'{"completion": "a"}', "has 'completion': expected a text, a prompt with a completion, or messages"),
        (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
        (b'{"prompt": ["a"], "completion": "b"}', "'prompt' is list"),
        (b'{"prompt": "a", "completion": "b", "text": "ab"}', "'text', 'prompt', 'completion': more than one form"),
        (b'{"messages": "hi"}', "'messages' is str, expected a list"),
        (b'{"messages": []}', "has no assistant turn with content"),
        (b'{"messages": ["hi"]}', "'messages' has an invalid turn 1, expected strings in {role, content}"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}', "invalid turn 2"),
        (b'{"messages": [{"role": "assistant", "content": 5}]}', "invalid turn 1"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "invalid turn 1"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "has no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": " "}]}', "has no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": "\xe2\x82"}]}', "invalid UTF-8"),
    ],
)
def test_bad_lines_are_named_and_the_others_read(read: Read, line: bytes, why: str) -> None:
    first, bad, last = read("t.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert (first, last) == (Record("t.jsonl:1", text="a"), Record("t.jsonl:3", text="b"))
    assert isinstance(bad, BadRecord) and bad.where == "t.jsonl:2" and why in bad.why
    bad.why.encode()  # can be printed


def test_a_turn_may_call_tools_without_content(read: Read) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    [record] = read("t.jsonl", json.dumps({"messages": [CHAT[0], call, CHAT[1]]}))
    assert record == Record("t.jsonl:1", messages=(CHAT[0], call, CHAT[1]))


def test_renamed_fields(read: Read) -> None:
    line = '{"question": "q", "answer": "a", "text": "t"}'
    assert read("t.jsonl", line, prompt="question", completion="answer") == [
        Record("t.jsonl:1", prompt="q", completion="a")
    ]
    assert read("t.jsonl", line) == [Record("t.jsonl:1", text="t")]
    assert read("t.jsonl", '{"text": "q", "body": "t"}', text="body", prompt="text") == [Record("t.jsonl:1", text="t")]


def test_an_empty_name_turns_a_form_off(read: Read) -> None:
    line = json.dumps({"text": "t", "messages": CHAT, "": "nameless"})
    [bad] = read("t.jsonl", line)
    assert isinstance(bad, BadRecord) and "turn one off with an empty name (`text_field=''`)" in bad.why
    assert read("t.jsonl", line, text="") == [Record("t.jsonl:1", messages=tuple(CHAT))]
    assert read("t.jsonl", line, messages="") == [Record("t.jsonl:1", text="t")]


def test_the_error_for_other_fields_lists_them(read: Read) -> None:
    lines = '[]\n{}\n{"question": "q", "answer": "a"}\n{"question": "r"}'
    with pytest.raises(
        FormatError, match=r"^t.jsonl:3: has the fields 'question', 'answer'; .*`prompt_field` and `comp"
    ):
        read("t.jsonl", lines)
    assert isinstance(read("t.jsonl", lines + '\n{"text": 1}')[-1], BadRecord)  # one is known: the others are bad


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.txt"])
@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file(read: Read, name: str, content: bytes) -> None:
    with pytest.raises(FormatError, match="has no records, expected one or more"):
        read(name, content)


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, 5, {"text": "b"}]',
        '{"version": "1",\n "data": [{"text": "a"}, 5, {"text": "b"}]}',
    ],
)
def test_json_arrays(read: Read, content: str) -> None:
    first, bad, last = read("t.json", content)
    assert (first, last) == (Record("t.json: record 1", text="a"), Record("t.json: record 3", text="b"))
    assert bad == BadRecord("t.json: record 2", "is int, expected an object with fields")


def test_a_single_chat_is_a_record(read: Read) -> None:
    assert read("t.json", json.dumps({"messages": CHAT})) == [Record("t.json: record 1", messages=tuple(CHAT))]


def test_json_lines_in_a_json_file(read: Read) -> None:
    first, bad, last = read("t.json", '{"text": "a"}\n{"text": \n{"text": "b"}\n')
    assert (first, last) == (Record("t.json:1", text="a"), Record("t.json:3", text="b"))
    assert isinstance(bad, BadRecord) and bad.where == "t.json:2"


@pytest.mark.parametrize("content", ["", "[1, 2", '{"data": [', "[" * 100_000])
def test_broken_json(read: Read, content: str) -> None:
    with pytest.raises(FormatError, match=r"t.json: is not valid JSON"):
        read("t.json", content)


def test_an_empty_json_array(read: Read) -> None:
    with pytest.raises(FormatError, match="has no records"):
        read("t.json", "[]")


@pytest.mark.parametrize(("name", "between"), [("t.csv", ","), ("t.tsv", "\t")])
def test_tables(read: Read, name: str, between: str) -> None:
    rows = ["prompt,completion,note", 'a,"b\r\nsaid ""c""",1', "", '"d","é",', "x,", 'y,"",', "\xff,z,"]
    content = "\r\n".join(rows).replace(",", between).encode("latin-1").replace(b"\xe9", "é".encode())
    *good, short, empty, broken = read(name, b"\xef\xbb\xbf" + content)
    assert good == [
        Record(f"{name}:2", prompt="a", completion='b\r\nsaid "c"'),
        Record(f"{name}:5", prompt="d", completion="é"),
    ]
    assert short == BadRecord(f"{name}:6", "has 2 cells, the header has 3")
    assert empty == BadRecord(f"{name}:7", "'completion' is empty")
    assert broken == BadRecord(f"{name}:8", "has invalid UTF-8 or a lone surrogate")


def test_a_table_with_an_unclosed_quote(read: Read) -> None:
    first, bad, last = read("t.csv", 'text\na\n"b"c\nd\n')
    assert (first, last) == (Record("t.csv:2", text="a"), Record("t.csv:4", text="d"))
    assert isinstance(bad, BadRecord) and bad.where == "t.csv:3" and "is not valid CSV" in bad.why
    [bad] = read("t.csv", 'text\n"b\nc\n')
    assert isinstance(bad, BadRecord) and bad.where == "t.csv:2"


def test_a_long_cell_and_a_header_that_names_a_field_twice(read: Read) -> None:
    assert read("t.csv", "text\n" + "x" * 200_000) == [Record("t.csv:2", text="x" * 200_000)]
    with pytest.raises(FormatError, match=r"t.csv:1: the header has 'text' twice"):
        read("t.csv", "text,,,text\na,,,b")
    assert read("t.csv", ",,text\n,,b", prompt="") == [Record("t.csv:2", text="b")]


@pytest.mark.parametrize("name", ["t.txt", "t.md"])
def test_one_text_per_line(read: Read, name: str) -> None:
    first, second, bad = read(name, b"\xef\xbb\xbf# One \r\n\n   \n  two\n\xff\n", text="body")
    assert (first, second) == (Record(f"{name}:1", text="# One "), Record(f"{name}:4", text="  two"))
    assert isinstance(bad, BadRecord) and bad.where == f"{name}:5" and "UTF-8" in bad.why


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", '{"text": "a"}\n{"text": "%s"}\n{"text": "b"}\n'), ("t.txt", "a\n%s\nb\n"),
        ("t.csv", "text\na\n%s\nb\n"), ("t.tsv", "text\na\n%s\nb"), ("t.json", '{"text": "a"}\n"%s"\n{"text": "b"}'),
        ("t.csv", 'text\na\n"%s"\nb\n'),
    ],
)  # fmt: skip
def test_an_endless_line_is_not_held_in_memory(
    read: Read, name: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LINE", 1000)
    first, bad, last = read(name, content % ("x" * 5000))
    assert (first, last) == (Record(first.where, text="a"), Record(last.where, text="b"))
    assert isinstance(bad, BadRecord) and bad.why.endswith(records.TOO_LONG)
    assert [int(one.where.split(":")[1]) - int(first.where.split(":")[1]) for one in (bad, last)] == [1, 2]


def test_an_endless_row_is_not_held_in_memory(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an unclosed quote the rest is one cell, or more and more cells of one row."""
    monkeypatch.setattr(records, "LINE", 1000)
    for content in ('text\na\n"' + "x\n" * 5000, "text\na\n" + '"x\n",' * 5000):
        first, *bad = read("t.csv", content)
        assert first == Record("t.csv:2", text="a")
        assert isinstance(bad[0], BadRecord) and bad[0].why.endswith(records.TOO_LONG)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    for suffix in records.READERS:
        file = tmp_path / f"fifo{suffix}"
        os.mkfifo(file)
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for path in (file, tmp_path / f"zero{suffix}"):
            with pytest.raises(FormatError, match="cannot be read: a (named pipe|device), expected a regular file"):
                list(read_records(path))


def test_json_that_is_too_large_for_memory(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "WHOLE", 1000)
    with pytest.raises(
        FormatError, match=r"t.json: is larger than 1,000 bytes; convert it to JSON lines \(.jsonl\), read as a stream"
    ):
        read("t.json", "[" + '{"text": "a"},' * 100)


def test_lines_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' * 100_000 + "{")
    records = read_records(tmp_path / "t.jsonl")
    assert next(records) == Record("t.jsonl:1", text="a")
    assert isinstance(list(records)[-1], BadRecord)


def test_parquet(tmp_path: Path, read: Read) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": i, "messages": CHAT if i != 1500 else [], "text": "a" if i == 7 else None} for i in range(2000)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    records = list(read_records(tmp_path / "t.parquet"))
    assert len(records) == 2000 and records[1999] == Record("t.parquet: record 2000", messages=tuple(CHAT))
    assert [record.where for record in records if isinstance(record, BadRecord)] == [
        "t.parquet: record 8",  # a text as well
        "t.parquet: record 1501",
    ]
    with pytest.raises(FormatError, match=r"record 1: has the fields 'id', 'messages', 'text'; no record has any of"):
        list(read_records(tmp_path / "t.parquet", Fields("a", "b", "c", "d")))
    with pytest.raises(FormatError, match=r"t.parquet: is not valid Parquet"):
        read("t.parquet", b"PAR1 and no more")


def test_the_limit_on_an_unpacked_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes can claim any number of rows of any size, and the metadata can deny it."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(records, "LINE", 1_000_000)
    monkeypatch.setattr(records, "UNPACKED", 2_000_000)
    file, text = tmp_path / "t.parquet", "x" * 4_000_000
    zeros = arrow.repeat(arrow.scalar(0, arrow.int8()), 1_500_000)

    def read(columns: dict[str, Any]) -> list[Record | BadRecord]:
        parquet.write_table(arrow.table(columns), file, compression="zstd", store_schema=False)
        assert file.stat().st_size < 2000
        return list(read_records(file))

    too_long = BadRecord("t.parquet: record 1", records.TOO_LONG)
    assert (
        read({"text": [text]}) == read({"messages": arrow.ListArray.from_arrays([0, len(zeros)], zeros)}) == [too_long]
    )
    for column in (arrow.DictionaryArray.from_arrays([0] * 5000, [text[:50_000]]), arrow.nulls(90_000, arrow.string())):
        with pytest.raises(
            FormatError, match=r"t.parquet: unpacks to more than 100 times its size; convert it to JSON"
        ):
            read({"text": column})
    monkeypatch.setattr(records, "MEMORY", 1 << 20)
    with pytest.raises(FormatError, match=r"t.parquet: takes too much memory to read"):
        read({"text": [text]})


def test_parquet_with_values_that_are_not_text(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    broken = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"\xff"]).buffers())
    for column, why in ((arrow.array([b"a"]), "bytes is not JSON"), (broken, "can't decode byte 0xff")):
        parquet.write_table(arrow.table({"text": column}), tmp_path / "t.parquet")
        [bad] = read_records(tmp_path / "t.parquet")
        assert isinstance(bad, BadRecord) and why in bad.why


def test_parquet_without_pyarrow(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"t.parquet: Parquet needs pyarrow; pip install pyarrow"):
        read("t.parquet", b"PAR1")


def test_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(name: str, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((name, options))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        if name == "org/away":
            raise ConnectionError("Couldn't reach 'org/away'")
        yield {"text": "a"}
        yield {"text": None}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first, second = read_records("org/name@v1:test")
    assert first == Record("org/name@v1:test: record 1", text="a")
    assert isinstance(second, BadRecord) and second.where == "org/name@v1:test: record 2"
    assert next(read_records("org/name")) == Record("org/name: record 1", text="a")
    assert calls == [
        ("org/name", {"revision": "v1", "split": "test", "streaming": True}),
        ("org/name", {"revision": None, "split": "train", "streaming": True}),
    ]
    with pytest.raises(
        FormatError, match="org/none: no such file, and the Hub cannot load such a dataset: .*doesn't exist"
    ):
        list(read_records("org/none"))
    with pytest.raises(OfflineError, match="org/away: no such file, and the Hub cannot be reached"):
        list(read_records("org/away"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="a dataset on the Hub needs datasets; pip install datasets"):
        list(read_records("org/name"))


@pytest.mark.parametrize("name", ["t.jsonl", "data/t.jsonl", "no-suffix", "there/t", "a/b/c"])
def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(FormatError, match=rf"{name}: no such file; expected a file or a dataset on the Hub"):
        list(read_records(name))


def test_unreadable_files(read: Read, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"t.pickle: unsupported file type, expected .jsonl, "):
        read("t.pickle", b"")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FormatError, match=r"folder.jsonl: cannot be read: a directory, expected a regular file"):
        list(read_records(tmp_path / "folder.jsonl"))


def test_real_files(material: Callable[[str], Path]) -> None:
    folder = material("text")
    gsm8k = list(read_records(folder / "gsm8k_test.jsonl", Fields(prompt="question", completion="answer")))
    assert len(gsm8k) == 1319 and all(isinstance(one, Record) and "####" in str(one.completion) for one in gsm8k)
    wikisql = list(read_records(folder / "mlx_wikisql_valid.jsonl"))
    assert len(wikisql) == 100 and all(isinstance(one, Record) and "SELECT" in str(one.text) for one in wikisql)
