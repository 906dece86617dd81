"""Tokenize records: the tokens that a model reads, and those that the loss counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adapterkit.base.models.tokenizing import encode_text
from adapterkit.errors import FormatError, UsageError
from adapterkit.train.data.chat_template import Chats, RefusedError, Templated
from adapterkit.train.data.records import BadRecord, Record

SHOWN = 10  # bad records listed in an error
MAX_CHARACTERS = 1_000_000  # per record: tokenizing that many takes up to 6 s and 0.8 GB
CHARACTERS_PER_TOKEN = 8  # the limit is at least `max_length` times this, about twice the average of text

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokenizer(Templated, Protocol):
    """The part of a fast transformers tokenizer that is used here."""

    @property
    def eos_token_id(self) -> Any: ...
    def __call__(
        self, text: str, /, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ..., verbose: bool = ...
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenized record.

    `ids (tokens,)`; `counted (tokens,)` marks the tokens in the loss; `cut` is the number of tokens truncated.
    """

    ids: Ids
    counted: Mask
    where: str
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples and their records in the same order, and the skipped records."""

    examples: tuple[Example, ...]
    records: tuple[Record, ...]
    bad: tuple[BadRecord, ...] = ()

    @property
    def truncated(self) -> tuple[str, ...]:
        """The places of the truncated records."""
        return tuple(example.where for example in self.examples if example.cut)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def counted(self) -> int:
        """The number of tokens in the loss."""
        return sum(int(example.counted.sum()) for example in self.examples)


def encode(record: Record, tokenizer: Tokenizer, max_length: int, chats: Chats) -> Example | BadRecord:
    """Tokenize `record`, truncated at the end to `max_length` tokens; a BadRecord if no counted token is left.

    The loss counts a whole text; the completion of a prompt; the assistant's turns of a chat, with the token that ends
    each turn. The first token never counts: nothing predicts it.

    Raises:
        UsageError: `record` is a chat, and the tokenizer has no chat template.
        FormatError: The template exceeds its time or memory limit.
    """
    limit = max(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * max_length)
    try:
        ids, counted = (
            _chat(record.messages, tokenizer, chats, limit) if record.messages else _plain(record, tokenizer, limit)
        )
    except RefusedError as error:
        return BadRecord(record.where, str(error))
    except FormatError as error:
        raise FormatError(f"{record.where}: {error}") from error
    counted[:1] = False
    if not counted.any():
        return BadRecord(record.where, f"has no token to learn ({len(ids)} in total)")
    if not counted[:max_length].any():
        return BadRecord(record.where, f"the prompt alone has {counted.argmax()} tokens, `max_length` is {max_length}")
    return Example(ids[:max_length].copy(), counted[:max_length].copy(), record.where, max(0, len(ids) - max_length))


def encode_all(
    records: Iterable[Record | BadRecord], tokenizer: Tokenizer, max_length: int, skip_bad: bool = False
) -> Encoded:
    """Tokenize `records`; raises FormatError if any is bad, or with `skip_bad` if all are."""
    if max_length < 2:
        raise UsageError(f"`max_length` is {max_length}, expected 2 or more: nothing predicts the first token")
    good: list[tuple[Example, Record]] = []
    bad: list[BadRecord] = []
    with Chats(tokenizer) as chats:
        for record in records:
            result = record if isinstance(record, BadRecord) else encode(record, tokenizer, max_length, chats)
            if isinstance(record, Record) and isinstance(result, Example):
                good.append((result, record))
            elif isinstance(result, BadRecord):
                bad.append(result)
    if bad and not (skip_bad and good):
        lines = [f"{len(bad)} of {len(bad) + len(good)} records cannot be used"]
        lines += [f"  {record.where}: {record.why}" for record in bad[:SHOWN]]
        lines += [f"  and {len(bad) - SHOWN} more"] * (len(bad) > SHOWN)
        raise FormatError(*lines, hint="fix them, or skip them with `skip_bad=True`" if good else "")
    if not good:
        raise FormatError("no records, expected one or more")
    return Encoded(tuple(example for example, _ in good), tuple(record for _, record in good), tuple(bad))


def split(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded]:
    """Split into training and validation data, the latter a random `share` of the records, each in order.

    The skipped records stay with the training data. Raises UsageError if a part would be empty.
    """
    count = len(encoded.examples)
    held = round(share * count) if 0 < share < 1 else 0
    if not 0 < held < count:
        raise UsageError(f"a share of {share} of {count} records: expected one or more for training and validation")
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())

    def part(validated: bool, bad: tuple[BadRecord, ...]) -> Encoded:
        indices = [index for index in range(count) if (index in chosen) is validated]
        return Encoded(tuple(encoded.examples[i] for i in indices), tuple(encoded.records[i] for i in indices), bad)

    return part(False, encoded.bad), part(True, ())


# --- the forms -------------------------------------------------------------------------------------------------------


def _plain(record: Record, tokenizer: Tokenizer, limit: int) -> tuple[Ids, Mask]:
    """A text, or a prompt as in generation and its completion; then the end token."""
    _check_size(record.text or f"{record.prompt or ''}{record.completion or ''}", limit)
    prompt: list[int] = []
    if record.text is None:
        prompt = encode_text(tokenizer, record.prompt or "")["input_ids"]
        body = encode_text(tokenizer, record.completion or "", add_special_tokens=False)["input_ids"]
    else:
        body = encode_text(tokenizer, record.text)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is not None and body[-1:] != [eos]:
        body = [*body, eos]
    ids = np.array([*prompt, *body], np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def _chat(messages: tuple[Mapping[str, Any], ...], tokenizer: Tokenizer, chats: Chats, limit: int) -> tuple[Ids, Mask]:
    """A chat rendered by its template; tokens that begin in an assistant's turn count."""
    whole, spans = chats.text_of(messages)
    _check_size(whole, limit)
    encoding = encode_text(tokenizer, whole, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoding["offset_mapping"]], np.int64)
    counted = np.zeros(len(begins), np.bool_)
    for begin, end in spans:
        counted |= (begins >= begin) & (begins < end)
    return np.array(encoding["input_ids"], np.int32), counted


def _check_size(text: str, limit: int) -> None:
    """Raise RefusedError if tokenizing would take too long: a tokenizer reads the whole text before truncation."""
    if len(text) > limit:
        raise RefusedError(f"has {len(text):,} characters, expected at most {limit:,}; split it into several records")
