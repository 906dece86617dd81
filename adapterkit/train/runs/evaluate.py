"""How well a model does on records that it was not trained on: how likely it finds them, and what it writes itself.

Perplexity by token is `exp(Σ nll / Σ n)` over the n tokens of each record that count, as a loss in training counts
them; by sequence `exp(mean of nll / n)`, where a short record weighs as much as a long one. What the model writes after
a prompt is compared with the completion that belongs there: as it is, by the part that is the answer, and word by word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.models.loading import load_tokenizer
from adapterkit.base.models.tokenizing import decoded, tokenized
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.train.causal import Batch, CausalModel
from adapterkit.train.data.records import DEFAULT, Fields, Record, read_records
from adapterkit.train.data.tokenize import Encoded, Example, encode_all
from adapterkit.train.injection import inject_from, lora_layers
from adapterkit.train.loss import IGNORED, perplexity
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs.checks import check_sequences, open_base, open_fitting, refuse_twice_quantized, size_of
from adapterkit.train.runs.memory import available, estimate
from adapterkit.train.runs.metrics import Prediction, answer_of, compared
from adapterkit.train.runs.models import choose_device, choose_dtype, load_model

MORE = 8  # tokens that a completion may have beyond the longest that belongs to a prompt


@dataclass(frozen=True, slots=True)
class Request:
    """What to evaluate and how; raises UsageError where that makes no sense."""

    base: str
    data: str
    adapter: str | None = None
    max_length: int = 1024
    batch_size: int = 8
    limit: int | None = None  # so many records, the first
    dtype: str = "auto"
    device: str = "auto"
    quantize: str = "none"
    fields: Fields = DEFAULT
    skip_bad: bool = False
    generate: bool | None = None  # None: where there are prompts with completions
    max_new_tokens: int | None = None  # None: the longest completion's, and a few more
    answer: str | None = None  # a regular expression

    def __post_init__(self) -> None:
        # Choices, and what a training run has too, are checked as there.
        Recipe(max_length=self.max_length, batch_size=self.batch_size, dtype=self.dtype, quantize=self.quantize)
        for name, value in (("--limit", self.limit), ("--max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: expected 1 or more")
        for name, given in (("--answer", self.answer), ("--max-new-tokens", self.max_new_tokens)):
            if given is not None and self.generate is False:
                raise UsageError(f"{name} is about what the model writes, which --no-generate leaves out")
        if self.answer is not None:
            try:
                re.compile(self.answer)
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(f"--answer {self.answer}: is no regular expression: {error}") from error


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """What is about to be read, and after how many prompts the model writes up to `max_new_tokens` tokens."""

    data: Encoded
    prompts: int
    max_new_tokens: int
    device: str
    dtype: str
    unpadded: bool
    notes: tuple[str, ...] = ()  # what is odd about the adapter


@dataclass(frozen=True, slots=True)
class Read:
    """So many of the records are read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Completed:
    """So many of the prompts are completed."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """`−log p` of each record's counted tokens, summed, how many these are, and how many were the likeliest."""

    losses: tuple[float, ...]
    counts: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The mean over all tokens that count."""
        return math.fsum(self.losses) / sum(self.counts)

    @property
    def by_token(self) -> float:
        """The perplexity of all tokens alike."""
        return perplexity(self.loss)

    @property
    def by_sequence(self) -> float:
        """The perplexity where each record counts as one."""
        means = [loss / count for loss, count in zip(self.losses, self.counts, strict=True)]
        return perplexity(math.fsum(means) / len(means))

    @property
    def next_token(self) -> float:
        """The share of counted tokens that the model found likeliest."""
        return sum(self.right) / sum(self.counts)


@dataclass(frozen=True, slots=True)
class Scored:
    """The end: all that was measured."""

    likelihood: Likelihood
    predictions: tuple[Prediction, ...] = ()

    @property
    def exact(self) -> float | None:
        """The share of completions that are the expected ones, whitespace around them aside."""
        return _mean([float(one.exact) for one in self.predictions])

    @property
    def f1(self) -> float | None:
        """The mean F1 of their words."""
        return _mean([one.f1 for one in self.predictions])

    @property
    def accuracy(self) -> float | None:
        """The share with the right answer; None where no answer was looked for."""
        return _mean([float(one.right) for one in self.predictions if one.right is not None])


Event = Started | Read | Completed | Scored


# --- a whole evaluation ----------------------------------------------------------------------------------------------


def evaluate(request: Request) -> Iterator[Event]:
    """Measure what `request` asks for; ends with `Scored`.

    Raises UsageError, FormatError and FitError before a weight is read where that is possible, and AdapterkitError
    where a loss is no number.
    """
    device = choose_device(request.device)
    base = open_base(request.base)
    refuse_twice_quantized(request.quantize, base)
    given = None if request.adapter is None else open_fitting(request.adapter, base)
    dtype = choose_dtype(request.dtype, base, device, full=False)
    tokenizer = load_tokenizer(base)
    records = islice(read_records(request.data, request.fields), request.limit)
    data = encode_all(records, tokenizer, request.max_length, request.skip_bad)
    check_sequences(data, base)
    prompts = _prompts(request, data, tokenizer)
    most = _most(request, prompts, base)
    _check_memory(request, base, data, dtype, device)
    model = prepared(load_model(base, dtype, device, request.quantize), given.adapter if given else None)
    notes = [f"{given.label}: {problem}" for problem in given.adapter.problems] if given else []
    yield Started(
        data, len(prompts), most, str(model.model.device), str(dtype).removeprefix("torch."), model.unpadded,
        tuple(notes),
    )  # fmt: skip
    likelihood = yield from read(model, data.examples, request.batch_size)
    predictions = yield from complete(model, tokenizer, prompts, most, request.batch_size, request.answer)
    yield Scored(likelihood, predictions)


def prepared(model: CausalModel, adapter: Adapter | None) -> CausalModel:
    """`model` with the factors of `adapter` beside its weights, and nothing in it trained."""
    if adapter is not None:
        inject_from(model.model, adapter)
        for layer in lora_layers(model.model).values():
            if layer.magnitude is not None:  # else DoRA's norms would be computed anew for every token
                layer.norm = partial(torch.Tensor.detach, layer.norm())  # type: ignore[method-assign]
    model.model.requires_grad_(False)
    model.model.eval()
    return model


def read(
    model: CausalModel, examples: Sequence[Example], batch_size: int
) -> Generator[Read, None, Likelihood]:  # fmt: skip
    """How likely `model` finds each of `examples`; ends with that, in their order.

    Raises AdapterkitError where it is no number.
    """
    order = sorted(range(len(examples)), key=lambda at: -len(examples[at].ids))  # what is too much fails at once
    found: dict[int, tuple[float, int, int]] = {}
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        batch = Batch.of([examples[at] for at in some], model.model.device)
        parts = [*model.token_losses(batch), batch.labels != IGNORED]
        by_record = zip(some, *(torch.split(part.cpu(), list(batch.lengths)) for part in parts), strict=True)
        for at, losses, right, counted in by_record:
            loss = losses.sum(dtype=torch.float64).item()
            if not math.isfinite(loss):
                raise AdapterkitError(f"{examples[at].where}: its loss is {loss}. Try --dtype fp32.")
            found[at] = loss, int(counted.sum()), int(right.sum())
        yield Read(len(found), len(examples))
    losses, counts, right = zip(*(found[at] for at in range(len(examples))), strict=True)
    return Likelihood(losses, counts, right)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens, what belongs after it, and how many tokens that has."""

    record: Record
    ids: tuple[int, ...]
    length: int


def complete(
    model: CausalModel, tokenizer: Any, prompts: Sequence[Prompt], most: int, batch_size: int, answer: str | None = None
) -> Generator[Completed, None, tuple[Prediction, ...]]:
    """The likeliest continuation of each of `prompts`, of up to `most` tokens; ends with them compared, in order."""
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at].ids))
    found: dict[int, Prediction] = {}
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        ids = [torch.tensor(prompts[at].ids) for at in some]
        for at, made in zip(some, model.complete(ids, most, tokenizer.eos_token_id), strict=True):
            text = decoded(tokenizer, made)
            found[at] = compared(prompts[at].record, text, answer)
        yield Completed(len(found), len(prompts))
    return tuple(found[at] for at in range(len(prompts)))


# --- what is checked first -------------------------------------------------------------------------------------------


def _prompts(request: Request, data: Encoded, tokenizer: Any) -> list[Prompt]:
    """What the model is to complete; a prompt without a token cannot be."""
    if request.generate is False:
        return []
    found: list[Prompt] = []
    for record, example in zip(data.records, data.examples, strict=True):
        if record.prompt is not None and (ids := tokenized(tokenizer, record.prompt)["input_ids"]):
            found.append(Prompt(record, tuple(ids), len(example.ids) + example.cut - len(ids)))
    if not found and (request.generate or request.answer is not None or request.max_new_tokens is not None):
        raise UsageError(
            f"{request.data}: no record has a prompt with a completion, and without there is nothing to generate; "
            "leave out --generate, --max-new-tokens, --answer and --predictions, or name the fields with "
            "--prompt-field and --completion-field"
        )
    if request.answer is not None:
        without = [one.record.where for one in found if answer_of(one.record.completion or "", request.answer) is None]
        if without:
            raise UsageError(
                f"--answer {request.answer}: finds no answer in the completions of {len(without)} records, the first "
                f"of them {without[0]}"
            )
    return found


def _most(request: Request, prompts: Sequence[Prompt], base: Checkpoint) -> int:
    """How many tokens the model may write."""
    most = request.max_new_tokens or max((one.length for one in prompts), default=0) + MORE
    positions = size_of(base, "max_position_embeddings", "n_positions")
    longest = max(prompts, key=lambda one: len(one.ids), default=None)
    if positions is None or longest is None or len(longest.ids) + most <= positions:
        return most
    if request.max_new_tokens or len(longest.ids) >= positions:
        raise UsageError(
            f"{longest.record.where}: the prompt has {len(longest.ids):,} tokens, with {most:,} more that is beyond "
            f"the {positions:,} that {base.name} reads: lower --max-new-tokens, or --no-generate"
        )
    return positions - len(longest.ids)


def _check_memory(request: Request, base: Checkpoint, data: Encoded, dtype: torch.dtype, device: torch.device) -> None:
    recipe = Recipe(batch_size=request.batch_size, max_length=request.max_length, quantize=request.quantize)
    found, room = estimate(base, recipe, data.examples, dtype, device), available(device)
    if (needed := found.weights + found.logits + found.process) > room:
        less = "" if base.quantization or request.quantize != "none" else "; --quantize nf4 takes less"
        raise UsageError(
            f"{base.name} takes about {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are free on {device}{less}"
        )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
