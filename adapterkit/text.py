"""Numbers as people read them, and what strangers wrote as it may be shown."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches


def number(value: float | None) -> str:
    """What was measured, with three digits: `0.550`."""
    return "–" if value is None else f"{value:#.3g}".rstrip(".") if value else "0"


def given(value: float | None) -> str:
    """What was set, as short as it goes: `2`."""
    return "?" if value is None else f"{value:.4g}"


def between(low: float, high: float, word: Callable[[float], str] = number) -> str:
    """`0.5–0.7`, or one of them where they read the same."""
    return word(low) if word(low) == word(high) else f"{word(low)}–{word(high)}"


def span(values: Sequence[float]) -> str:
    """`8` or `4–16`."""
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
    """`q,k,v,o` for the field's usual names."""
    return ",".join(name.removesuffix("_proj") for name in targets[:7]) + ("…" if len(targets) > 7 else "")


def size(count: float) -> str:
    """`3.0 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}" if unit == "GB" else f"{count / step:.1f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """`0:42`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, word: str) -> str:
    """`1 adapter`, `2,000 adapters`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`did you mean merge?` of the name that is most like `name`, or nothing where none is."""
    near = get_close_matches(name, list(names), 1)
    return f"did you mean {near[0]}?" if near else ""


# --- what strangers wrote --------------------------------------------------------------------------------------------

LONGEST, END = 5_000, 1_000  # characters that are shown of a line, more than any path has; and of them those of its end
NOT_PLAIN = re.compile(r"[^ -~]")
NOT_PLAIN_IN_LINES = re.compile(r"[^ -~\n\t]")
MARKUP = re.compile(r"[\\`*\[\]<>|~$&@]|(?<!\w)_|_(?!\w)|^[#+-]|(?<=:)/(?=/)|(?<=www)\.")
# Nothing is to be seen of these, though Unicode has them as letters and marks; all others that hide are "other" there.
BLANK = {*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2028\u2029\u3164\uffa0"}
BLANK |= {*map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))}
JOINERS, SELECTORS, KEYCAP = "\u200c\u200d", "\ufe0e\ufe0f", "\u20e3"
VIRAMA = 9  # the combining class of what joins consonants in the scripts of India


def visible(text: str) -> str:
    """A stranger's `text` as a part of one line that can be shown.

    What would steer a terminal, reorder a line or not be seen is written out (`\\x1b`, `\\u202e`, `\\n`), and of more
    than `LONGEST` characters the middle is left out. Letters of all scripts and emoji stay, with the joiners they need.
    """
    return _cut(NOT_PLAIN.sub(_written_out, _cut(text)))


def visible_lines(text: str) -> str:
    """The same of a text of lines, such as a card: none of it is left out."""
    return NOT_PLAIN_IN_LINES.sub(_written_out, text.replace("\r\n", "\n"))


def without_hidden(text: str) -> str:
    """`text` as wide as it is, without what `visible` writes out."""
    return text if text.isprintable() else "".join(c for at, c in enumerate(text) if not _is_hidden(text, at))


def command(argv: Iterable[str]) -> str:
    """A command to be copied into a shell; what `visible` writes out stands as bytes, for printf."""
    return " ".join(map(_quoted, argv))


def argument(path: str | os.PathLike[str]) -> str:
    """A path as an argument of a command that does not take it for an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def markdown(text: str) -> str:
    """A stranger's `text` as a part of one line of Markdown: no end of a cell, no tag, link or formula."""
    return MARKUP.sub(r"\\\g<0>", visible(text))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - END - 1]}…{text[-END:]}"


def _quoted(word: str) -> str:
    """A word as any shell reads it; one with what cannot be shown is written out as bytes, by printf."""
    if not any(_is_hidden(word, at) for at in range(len(word))):
        return shlex.quote(word)
    start = word.rstrip("\n")  # a shell drops line breaks at the end of what a command prints
    plain = set(range(0x20, 0x7F)) - set(b"\\'%")
    told = "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(start))
    return f"\"$(printf '{told}')\"" + (shlex.quote(word[len(start) :]) if start != word else "")


def _written_out(match: re.Match[str]) -> str:
    hidden = _is_hidden(match.string, match.start())
    return match[0].encode("unicode_escape").decode() if hidden else match[0]


def _is_hidden(text: str, at: int) -> bool:
    """Whether nothing is to be seen of the character at `at`, and neither emoji nor letters beside it need it."""
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
    """The rows of a part's files in the table of a card."""
    return [f"| {markdown(name)} | {weight} | {markdown(file)} | `{digest}` |" for file, digest in digests.items()]
