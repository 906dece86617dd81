"""Untrusted patterns: those that are matched match as in Python; the others are refused."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapterkit.adapter.safe_regex import Patterns, compile_pattern
from adapterkit.errors import FormatError, UsageError
from adapterkit.train.injection import Lora, inject

# Few repetitions, so that Python's matcher terminates too.
PARTS = [
    "q", "_proj", "0", "1", ".", r"\.", "layers", "a", "|", "(", ")", "(?:", "[ab]", "[^.]", "[0-9]", "[]a]", r"\d", r"\w",
    r"\W", r"\b", r"\B", "^", "$", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{", "}", "-", r"\-", r"\A", r"\Z", r"\z", "(?i:",
    "(?=", "(?!", r"\1", "[[:alpha:]]", r"\pN", r"\Q", r"\x61", r"\101", r"\0", "é", "++", "(?P<n>", r"\N",
]  # fmt: skip
NAMES = st.lists(
    st.sampled_from(["q", "q_proj", "layers", "0", "1", "10", "a", "aa", "b", ".", "-", "Q", "", "é"]), max_size=6
)


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=7).map("".join), NAMES.map("".join).filter(bool))
def test_matches_equal_pythons(key: str, name: str) -> None:
    found = None
    try:
        patterns = Patterns.of({key: 1})
        patterns.check([name])
        found = patterns.first(name, 0)
    except FormatError:
        return
    with warnings.catch_warnings(action="ignore"):
        assert found == bool(re.match(rf"(.*\.)?({key})$", name)), (key, name)


def test_the_first_match_in_file_order_wins() -> None:
    """Also if one of them is an exact name."""
    name = "model.layers.10.self_attn.q_proj"
    exact, others = "^" + re.escape(name), {"q_proj": 1, r"layers\.1.\..*": 2, "k_proj": 3}
    assert Patterns.of(others).first(name, 9) == 1
    assert Patterns.of({exact: 0} | others).first(name, 9) == 0
    assert Patterns.of(others | {exact: 0}).first(name, 9) == 1
    assert Patterns.of({"k_proj": 3, exact: 0, "q_proj": 1}).first(name, 9) == 0
    assert Patterns.of({exact: 0}).first(f"x.{name}", 9) == 9  # as in PEFT: ^ is the start of the name
    assert Patterns.of({}).first(name, None) is None


def test_a_key_that_closes_our_parenthesis() -> None:
    """PEFT inserts keys between parentheses unescaped, so that `$` ends the last alternative only."""
    assert Patterns.of({")|(x": 1}).first("model.q_proj", 0) == 1


def test_thousands_of_exact_names_are_looked_up() -> None:
    names = [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(5000)]
    patterns = Patterns.of({"^" + re.escape(name): i for i, name in enumerate(names)})
    patterns.check(names)
    assert [patterns.first(name, -1) for name in names] == list(range(5000))


def test_patterns_of_a_recipe_that_would_take_minutes() -> None:
    model = nn.ModuleList(nn.Identity() for _ in range(1600))
    with pytest.raises(UsageError, match="patterns: 1999 patterns would take too long"):
        inject(model, Lora("all-linear", rank_pattern={f".*{number}": 1 for number in range(1999)}))


@pytest.mark.parametrize("lora", [{"targets": "("}, {"targets": "(?!a)b"}, {"rank_pattern": {"(": 1}}])
def test_targets_that_are_not_a_pattern(lora: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="targets and patterns: "):
        Lora(**lora)  # type: ignore[arg-type]
    assert compile_pattern(r".*\.[qv]_proj").matches("layers.0.q_proj")


def test_the_limit_on_names_applies_only_if_there_are_patterns() -> None:
    most = Patterns.of({f"a{number}": number for number in range(2000)})
    most.check(["b"] * 1500)
    with pytest.raises(FormatError, match="2000 patterns would take too long to match against 1501 names"):
        most.check(["b"] * 1501)
    with pytest.raises(FormatError, match="would take too long"):
        most.check(["b" * 10**6])
    for patterns in (Patterns.of({}), Patterns.of({"^é": 1})):
        patterns.check(["é"] * 10**5)
        assert patterns.first("é", 2) == (1 if patterns.values else 2)
    with pytest.raises(FormatError, match="'é' is not ASCII, so it cannot be matched against patterns"):
        Patterns.of({"^é": 1, "q": 2}).check(["q", "é"])


def test_the_limit_on_the_size_of_a_pattern(capfd: pytest.CaptureFixture[str]) -> None:
    """By its repetitions; RE2's messages appear only in our error."""
    assert compile_pattern("(" + "".join(f"{letter}?" for letter in "abcdefghij") + "){900}").size == 18_004
    for pattern in ("(" + "".join(f"{letter}?" for letter in "abcdefghijklmnopqrst") + "){900}", "(?=a)"):
        with pytest.raises(FormatError, match="cannot be matched in bounded time"):
            compile_pattern(pattern)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_for_targets_matches_whole_names() -> None:
    """As in PEFT; patterns for ranks match suffixes."""
    for ends in (False, True):
        matcher = compile_pattern("[qv]_proj", ends)
        assert matcher.matches("q_proj") and matcher.matches("layers.0.q_proj") is ends
        assert not matcher.matches("q_proj.x") and not matcher.matches("xq_proj")
    assert not compile_pattern("[qv]_proj").matches("layers.0.q_proj")
