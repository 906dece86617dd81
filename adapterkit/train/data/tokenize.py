"""Records as tokens: which ones a model reads, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from adapterkit.base.models.tokenizing import tokenized
from adapterkit.errors import FormatError, UsageError
from adapterkit.train.data.chats import Chats, RefusedError, Templated
from adapterkit.train.data.records import BadRecord, Record

SHOWN = 10  # bad records that an error lists
CHARACTERS = 1_000_000  # of a record: a tokenizer takes up to 6 s and 0.8 GB for so many
CHARACTERS_A_TOKEN = 8  # or as many times --max-length: about twice what a token of text has

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokenizer(Templated, Protocol):
    """What is used of a fast tokenizer of transformers."""

    @property
    def eos_token_id(self) -> Any: ...
    def __call__(
        self, text: str, /, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ..., verbose: bool = ...
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A record as tokens: `ids` (tokens,), `counted` (tokens,) where the loss is for the token; `cut` more were cut."""

    ids: Ids
    counted: Mask
    where: str
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples and the records they come from, in one order, and what was left out."""

    examples: tuple[Example, ...]
    records: tuple[Record, ...]
    bad: tuple[BadRecord, ...] = ()

    @property
    def truncated(self) -> tuple[str, ...]:
        """Where the records stand that were cut."""
        return tuple(example.where for example in self.examples if example.cut)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def counted(self) -> int:
        """How many of them the loss is for."""
        return sum(int(example.counted.sum()) for example in self.examples)


def encode(record: Record, tokenizer: Tokenizer, max_length: int, chats: Chats) -> Example | BadRecord:
    """`record` as at most `max_length` tokens, cut at the end; Bad where no token is left that the loss is for.

    A text counts whole; of a prompt and its completion, the completion; of a chat, what the assistant says, with the
    token that ends each turn. The first token never counts: nothing predicts it. Raises UsageError where a chat meets a
    tokenizer that has no chat template, FormatError where the template takes too much time or memory.
    """
    most = max(CHARACTERS, CHARACTERS_A_TOKEN * max_length)
    try:
        ids, counted = (
            _chat(record.messages, tokenizer, chats, most) if record.messages else _plain(record, tokenizer, most)
        )
    except RefusedError as error:
        return BadRecord(record.where, str(error))
    except FormatError as error:
        raise FormatError(f"{record.where}: {error}") from error
    counted[:1] = False
    if not counted.any():
        return BadRecord(record.where, f"has {len(ids)} tokens, and none that could be learned")
    if not counted[:max_length].any():
        return BadRecord(record.where, f"the prompt alone has {counted.argmax()} tokens, --max-length is {max_length}")
    return Example(ids[:max_length].copy(), counted[:max_length].copy(), record.where, max(0, len(ids) - max_length))


def encode_all(
    records: Iterable[Record | BadRecord], tokenizer: Tokenizer, max_length: int, skip_bad: bool = False
) -> Encoded:
    """All of `records` as tokens. Raises FormatError where some are bad, or with `skip_bad` where none is good."""
    if max_length < 2:
        raise UsageError(f"--max-length is {max_length}, expected 2 or more: nothing predicts a first token")
    good: list[tuple[Example, Record]] = []
    bad: list[BadRecord] = []
    with Chats(tokenizer) as chats:
        for record in records:
            made = record if isinstance(record, BadRecord) else encode(record, tokenizer, max_length, chats)
            if isinstance(record, Record) and isinstance(made, Example):
                good.append((made, record))
            elif isinstance(made, BadRecord):
                bad.append(made)
    if bad and not (skip_bad and good):
        lines = [f"{len(bad)} of {len(bad) + len(good)} records cannot be used"]
        lines += [f"  {one.where}: {one.why}" for one in bad[:SHOWN]]
        lines += [f"  and {len(bad) - SHOWN} more"] * (len(bad) > SHOWN)
        lines += ["Mend them, or go on without them: --skip-bad"] * bool(good)
        raise FormatError(*lines)
    if not good:
        raise FormatError("there are no records, expected one or more")
    return Encoded(tuple(example for example, _ in good), tuple(record for _, record in good), tuple(bad))


def split(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded]:
    """What is trained on and the `share` of the records that is validated on, in order; `bad` stays with the first.

    Raises UsageError where one of them would be empty.
    """
    count = len(encoded.examples)
    held = round(share * count) if 0 < share < 1 else 0
    if not 0 < held < count:
        raise UsageError(f"a share of {share} of {count} records: expected one or more to train on and to validate on")
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())

    def part(validated: bool, bad: tuple[BadRecord, ...]) -> Encoded:
        places = [at for at in range(count) if (at in chosen) is validated]
        return Encoded(tuple(encoded.examples[at] for at in places), tuple(encoded.records[at] for at in places), bad)

    return part(False, encoded.bad), part(True, ())


# --- the forms -------------------------------------------------------------------------------------------------------


def _plain(record: Record, tokenizer: Tokenizer, most: int) -> tuple[Ids, Mask]:
    """A text, or a prompt as it stands when generating and its completion; then the token that ends."""
    _check_size(record.text or f"{record.prompt or ''}{record.completion or ''}", most)
    prompt: list[int] = []
    if record.text is None:
        prompt = tokenized(tokenizer, record.prompt or "")["input_ids"]
        body = tokenized(tokenizer, record.completion or "", add_special_tokens=False)["input_ids"]
    else:
        body = tokenized(tokenizer, record.text)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is not None and body[-1:] != [eos]:
        body = [*body, eos]
    ids = np.array([*prompt, *body], np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def _chat(messages: tuple[Mapping[str, Any], ...], tokenizer: Tokenizer, chats: Chats, most: int) -> tuple[Ids, Mask]:
    """A chat as its template writes it; the tokens count that begin in what the assistant says."""
    whole, spans = chats.text_of(messages)
    _check_size(whole, most)
    encoding = tokenized(tokenizer, whole, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoding["offset_mapping"]], np.int64)
    counted = np.zeros(len(begins), np.bool_)
    for begin, end in spans:
        counted |= (begins >= begin) & (begins < end)
    return np.array(encoding["input_ids"], np.int32), counted


def _check_size(text: str, most: int) -> None:
    """Raise RefusedError where a tokenizer would need too long: it reads all of a text, however little is kept."""
    if len(text) > most:
        raise RefusedError(f"has {len(text):,} characters, expected at most {most:,}; split it into several records")
