"""Rename an adapter's modules (`rename`), and suggest a rename when its names don't match a base."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from adapterkit.errors import UsageError
from adapterkit.files.safetensors import Weight

MAX_RENAMES_TRIED = 3


def explain_missing(
    missing: Sequence[str], tensors: Mapping[str, Weight], fits: Callable[[tuple[str, str]], bool] = lambda _: False
) -> str:
    """Explain missing names by the nearest names in the base, and a rename with which the whole adapter `fits`."""
    stems = [re.sub(r"\.(weight|bias)$", "", name) for name in tensors]
    nearest = {name: _nearest(name, stems) for name in missing[:500]}
    renames = Counter(rename for name, near in nearest.items() if near and (rename := _rename(name, near)))
    similar = {name: f"nearest: {near}" if near else "no similar module" for name, near in nearest.items()}
    lines = [f"{name}: not in the base ({similar[name]})" for name in missing[:3]]
    if len(missing) > 3:
        lines.append(f"and {len(missing) - 3} more")
    for (old, new), _ in renames.most_common(MAX_RENAMES_TRIED):
        if fits((old, new)):
            return "; ".join(lines) + f". One rename fixes all of them: `rename={old}={new}`"
    return "; ".join(lines) + ". Was this adapter trained on another base?"


def parse_rename(text: str) -> tuple[str, str]:
    """Parse the option's value `old=new`; raises UsageError."""
    old, equals, new = text.partition("=")
    if not equals or not old.strip(".") or "=" in new:
        raise UsageError(f"`rename={text}`: expected OLD=NEW", hint="for example `rename=attn=self_attn`")
    return old.strip("."), new.strip(".")


def apply_rename(name: str, rename: tuple[str, str] | None) -> str:
    """Replace the whole dotted segments `old` by `new` in `name`."""
    if rename is None:
        return name
    old, new = rename
    renamed = re.sub(rf"(?:(?<=\.)|^){re.escape(old)}(?=\.|$)", lambda _: new, name)
    return re.sub(r"\.\.+", ".", renamed).strip(".")


def _nearest(name: str, stems: Iterable[str]) -> str | None:
    """Return the most similar base name with the same numbers, and if possible the same last segment."""
    numbers = re.findall(r"\d+", name)
    leaf = name.rpartition(".")[2]
    same_numbers = [stem for stem in stems if re.findall(r"\d+", stem) == numbers]
    same_leaf = [stem for stem in same_numbers if stem.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(name, same_leaf or same_numbers, n=1, cutoff=0.4)
    return close[0] if close else None


def _rename(name: str, near: str) -> tuple[str, str] | None:
    """Return the dotted segments that differ between two names, as a rename; None if they differ in numbers."""
    a, b = name.split("."), near.split(".")
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    if start == len(a) - end and end > 0:  # a pure insertion: include the next segment
        end -= 1
    old, new = a[start : len(a) - end], b[start : len(b) - end]
    if not old or any(part.isdigit() for part in (*old, *new)):
        return None
    return ".".join(old), ".".join(new)
