"""Compare completions with the expected ones: exactly, by the extracted answer, and word by word."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass

from adapterkit.train.data.records import Record

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A completion and its scores; `right` says whether the answer matches, None if no answer was asked for."""

    where: str
    prompt: str
    expected: str
    completion: str
    exact: bool
    f1: float
    right: bool | None = None


def compared(record: Record, text: str, answer: str | None = None) -> Prediction:
    """Compare `text`, the model's completion of `record`, with the expected completion."""
    expected = record.completion or ""
    right = None if answer is None else answer_of(text, answer) == answer_of(expected, answer)
    exact = text.strip() == expected.strip()
    return Prediction(record.where, record.prompt or "", expected, text, exact, f1(text, expected), right)


def answer_of(text: str, pattern: str) -> str | None:
    """The first group of the last match of `pattern`, or the whole match without groups; None without a match."""
    matches = list(re.finditer(pattern, text))
    answer: str | None = matches[-1][min(1, matches[-1].re.groups)] if matches else None
    return None if answer is None else answer.strip()


def f1(text: str, expected: str) -> float:
    """`2·c / (n + m)`, c the common words among n and m: the F1 of SQuAD (Rajpurkar et al., arXiv 1606.05250).

    If either side has no words, 1 if both have none, else 0, as in SQuAD 2.0 (arXiv 1806.03822).
    """
    completed, reference = words(text), words(expected)
    if not completed or not reference:
        return float(completed == reference)
    return 2 * sum((Counter(completed) & Counter(reference)).values()) / (len(completed) + len(reference))


def words(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, without ASCII punctuation and English articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()
