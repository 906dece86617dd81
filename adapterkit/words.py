"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


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


def printable(text: str) -> str:
    """`text` with what would steer a terminal made visible; line ends stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
