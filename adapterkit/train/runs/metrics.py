"""What a model wrote beside what belongs there: as it is, by the part that is the answer, and word by word."""

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
    """What the model wrote after a prompt, and how that compares; `right` is for the answer, if one is looked for."""

    where: str
    prompt: str
    expected: str
    completion: str
    exact: bool
    f1: float
    right: bool | None = None


def compared(record: Record, text: str, answer: str | None = None) -> Prediction:
    """`text`, written after the prompt of `record`, beside the completion that belongs there."""
    expected = record.completion or ""
    right = None if answer is None else answer_of(text, answer) == answer_of(expected, answer)
    exact = text.strip() == expected.strip()
    return Prediction(record.where, record.prompt or "", expected, text, exact, f1(text, expected), right)


def answer_of(text: str, pattern: str) -> str | None:
    """The first group of the last match of `pattern`, or all of it if there are no groups; None without a match."""
    matches = list(re.finditer(pattern, text))
    found: str | None = matches[-1][min(1, matches[-1].re.groups)] if matches else None
    return None if found is None else found.strip()


def f1(text: str, expected: str) -> float:
    """`2·c / (n + m)`, where c of the n and m words are common: SQuAD's (Rajpurkar et al., arXiv 1606.05250).

    Without words on a side, 1 if there are none on the other, as in its second version (arXiv 1806.03822).
    """
    one, other = words(text), words(expected)
    if not one or not other:
        return float(one == other)
    return 2 * sum((Counter(one) & Counter(other)).values()) / (len(one) + len(other))


def words(text: str) -> list[str]:
    """The words that SQuAD compares: in lower case, without ASCII punctuation and the articles of English."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()
