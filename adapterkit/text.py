"""Format numbers for people, and escape untrusted text."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches


def number(value: float | None) -> str:
    """Format a measured value with three digits: `0.550`."""
    return "–" if value is None else f"{value:#.3g}".rstrip(".") if value else "0"


def given(value: float | None) -> str:
    """Format a configured value without trailing zeros: `2`."""
    return "?" if value is None else f"{value:.4g}"


def between(low: float, high: float, word: Callable[[float], str] = number) -> str:
    """Format a range, `0.5–0.7`, or one number if both look the same."""
    return word(low) if word(low) == word(high) else f"{word(low)}–{word(high)}"


def span(values: Sequence[float]) -> str:
    """Format the range of sorted values: `8` or `4–16`."""
    return between(values[0], values[-1], given) if values else ""


def runs(numbers: Sequence[int]) -> str:
    """`0–3, 8, 10–11`."""
    found: list[list[int]] = []
    for at in numbers:
        if found and at == found[-1][1] + 1:
            found[-1][1] = at
        else:
            found.append([at, at])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)


def short(targets: Sequence[str]) -> str:
    """Abbreviate the usual target names: `q,k,v,o`."""
    return ",".join(name.removesuffix("_proj") for name in targets[:7]) + ("…" if len(targets) > 7 else "")


def size(count: float) -> str:
    """Format a number of bytes: `3.0 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}" if unit == "GB" else f"{count / step:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """Format a duration: `0:42`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, word: str) -> str:
    """Format a count: `1 adapter`, `2,000 adapters`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest the most similar name: `did you mean merge?`; empty if none is similar."""
    near = get_close_matches(name, list(names), 1)
    return f"did you mean {near[0]}?" if near else ""


# --- untrusted text --------------------------------------------------------------------------------------------------

LONGEST, END = 5_000, 1_000  # characters to show of a long line, and of its end; paths are shorter
NOT_PLAIN = re.compile(r"[^ -~]")
NOT_PLAIN_IN_LINES = re.compile(r"[^ -~\n\t]")
MARKUP = re.compile(r"[\\`*\[\]<>|~$&@]|(?<!\w)_|_(?!\w)|^[#+-]|(?<=:)/(?=/)|(?<=www)\.")
# Invisible characters in Unicode categories of visible ones; all other invisible ones are in the categories C*.
BLANK = {*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2028\u2029\u3164\uffa0"}
BLANK |= {*map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))}
JOINERS, SELECTORS, KEYCAP = "\u200c\u200d", "\ufe0e\ufe0f", "\u20e3"
VIRAMA = 9  # the combining class of virama signs, which need joiners in Indic scripts


def visible(text: str) -> str:
    """Escape untrusted `text` for display in one line.

    Control, bidirectional and invisible characters are escaped (`\\x1b`, `\\u202e`, `\\n`), and more than `LONGEST`
    characters are truncated in the middle. Letters of all scripts and emoji are unchanged, with their joiners.
    """
    return _cut(NOT_PLAIN.sub(_written_out, _cut(text)))


def visible_lines(text: str) -> str:
    """Escape untrusted text of several lines, such as a model card, without truncation."""
    return NOT_PLAIN_IN_LINES.sub(_written_out, text.replace("\r\n", "\n"))


def without_hidden(text: str) -> str:
    """Return `text` without the characters that `visible` escapes."""
    return text if text.isprintable() else "".join(c for at, c in enumerate(text) if not _is_hidden(text, at))


def command(argv: Iterable[str]) -> str:
    """Format a command to copy into a shell; unprintable arguments are written with printf."""
    return " ".join(map(_quoted, argv))


def argument(path: str | os.PathLike[str]) -> str:
    """Return a path as a command argument that can't be mistaken for an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def markdown(text: str) -> str:
    """Escape untrusted `text` for one line of Markdown: no end of a cell, no tags, links or formulas."""
    return MARKUP.sub(r"\\\g<0>", visible(text))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - END - 1]}…{text[-END:]}"


def _quoted(word: str) -> str:
    """Quote a word for any shell; one with unprintable characters as bytes, by printf."""
    if not any(_is_hidden(word, at) for at in range(len(word))):
        return shlex.quote(word)
    start = word.rstrip("\n")  # $(…) drops trailing newlines
    plain = set(range(0x20, 0x7F)) - set(b"\\'%")
    escaped = "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(start))
    return f"\"$(printf '{escaped}')\"" + (shlex.quote(word[len(start) :]) if start != word else "")


def _written_out(match: re.Match[str]) -> str:
    hidden = _is_hidden(match.string, match.start())
    return match[0].encode("unicode_escape").decode() if hidden else match[0]


def _is_hidden(text: str, at: int) -> bool:
    """Return whether the character at `at` is invisible, and not a joiner that adjacent emoji or letters need."""
    c, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    if c in SELECTORS and before:
        return not (_is_symbol(before) or after == KEYCAP)
    if c in JOINERS and before and after:
        arabic = unicodedata.bidirectional(before) == unicodedata.bidirectional(after) == "AL"
        emoji = (_is_symbol(before) or before in SELECTORS) and _is_symbol(after)
        return not (arabic or emoji or unicodedata.combining(before) == VIRAMA)
    return c in BLANK or unicodedata.category(c)[0] == "C"


def _is_symbol(c: str) -> bool:
    return c > "\x7f" and unicodedata.category(c)[0] == "S"


def file_rows(name: str, weight: str, digests: Mapping[str, str]) -> list[str]:
    """Return the rows for an input's files in the table of a model card."""
    return [f"| {markdown(name)} | {weight} | {markdown(file)} | `{digest}` |" for file, digest in digests.items()]
