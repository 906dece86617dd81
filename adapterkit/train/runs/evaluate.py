"""Evaluate a model on held-out records: perplexity, next-token accuracy, and completions of prompts.

Perplexity per token is `exp(Σ nll / Σ n)` over the n counted tokens of each record, counted as in training; per
sequence it is `exp(mean(nll / n))`, with equal weight for short and long records. Completions are compared with the
expected ones: exactly, by the extracted answer, and word by word.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch

from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.models.loading import load_tokenizer
from adapterkit.base.models.tokenizing import decode_text, encode_text
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.text import counted
from adapterkit.train.causal_lm import Batch, CausalModel
from adapterkit.train.data.records import Fields, Record, read_records
from adapterkit.train.data.tokenize import Encoded, Example, encode_all
from adapterkit.train.evaluate_options import EvaluateOptions
from adapterkit.train.injection import inject_from, lora_layers
from adapterkit.train.loss import IGNORED, perplexity
from adapterkit.train.recipe import Recipe
from adapterkit.train.runs.answer_scores import Prediction, answer_of, compared
from adapterkit.train.runs.checks import check_not_quantized, check_sequences, open_base, open_fitting, size_of
from adapterkit.train.runs.load_model import choose_device, choose_dtype, load_model
from adapterkit.train.runs.memory import available, estimate

MARGIN = 8  # tokens that a completion may exceed the longest expected one


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The evaluation begins: its data, and the number of prompts to complete with up to `max_new_tokens` tokens."""

    data: Encoded
    prompts: int
    max_new_tokens: int
    device: str
    dtype: str
    unpadded: bool
    notes: tuple[str, ...] = ()  # problems of the adapter


@dataclass(frozen=True, slots=True)
class Read:
    """`done` of `total` records have been scored."""

    done: int
    total: int
    what: ClassVar[str] = "reading"


@dataclass(frozen=True, slots=True)
class Completed:
    """`done` of `total` prompts have been completed."""

    done: int
    total: int
    what: ClassVar[str] = "completing"


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Per record: the summed `−log p` of its counted tokens, their number, and how many were predicted correctly."""

    losses: tuple[float, ...]
    counts: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The mean over all counted tokens."""
        return math.fsum(self.losses) / sum(self.counts)

    @property
    def by_token(self) -> float:
        """Perplexity per token."""
        return perplexity(self.loss)

    @property
    def by_sequence(self) -> float:
        """Perplexity per sequence: every record has the same weight."""
        means = [loss / count for loss, count in zip(self.losses, self.counts, strict=True)]
        return perplexity(math.fsum(means) / len(means))

    @property
    def next_token(self) -> float:
        """Next-token accuracy: the share of counted tokens that were the likeliest."""
        return sum(self.right) / sum(self.counts)


@dataclass(frozen=True, slots=True)
class Scored:
    """The end of an evaluation, with its results."""

    likelihood: Likelihood
    predictions: tuple[Prediction, ...] = ()

    @property
    def exact(self) -> float | None:
        """The share of completions that match exactly, except for surrounding whitespace."""
        return _mean([float(prediction.exact) for prediction in self.predictions])

    @property
    def f1(self) -> float | None:
        """The mean word F1 of the completions."""
        return _mean([prediction.f1 for prediction in self.predictions])

    @property
    def accuracy(self) -> float | None:
        """The share of completions with the right answer; None if no answer was asked for."""
        return _mean([float(prediction.right) for prediction in self.predictions if prediction.right is not None])


Event = Started | Read | Completed | Scored


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(o: EvaluateOptions) -> Iterator[Event]:
    """Run the evaluation of `o`; the last event is `Scored`.

    Raises:
        UsageError, FormatError, FitError: Before any weight is read, where possible.
        AdapterkitError: A loss is not finite.
    """
    device = choose_device(o.device)
    base = open_base(str(o.base))
    check_not_quantized(o.quantize, base)
    given = None if o.adapter is None else open_fitting(str(o.adapter), base, o.quantize)
    dtype = choose_dtype(str(o.dtype), base, device, full=False)
    tokenizer = load_tokenizer(base)
    fields = Fields(o.text_field, o.prompt_field, o.completion_field, o.messages_field)
    records = islice(read_records(str(o.data), fields), o.limit)
    data = encode_all(records, tokenizer, o.max_length, o.skip_bad)
    check_sequences(data, base)
    prompts = _prompts(o, data, tokenizer)
    max_new_tokens = _max_new_tokens(o, prompts, base)
    _check_memory(o, base, data, dtype, device)
    model = prepared(load_model(base, dtype, device, o.quantize), given.adapter if given else None)
    notes = [f"{given.label}: {problem}" for problem in given.adapter.problems] if given else []
    yield Started(
        data, len(prompts), max_new_tokens, str(model.model.device), str(dtype).removeprefix("torch."),
        model.unpadded, tuple(notes),
    )  # fmt: skip
    likelihood = yield from read(model, data.examples, o.batch_size)
    predictions = yield from complete(model, tokenizer, prompts, max_new_tokens, o.batch_size, o.answer)
    yield Scored(likelihood, predictions)


def prepared(model: CausalModel, adapter: Adapter | None) -> CausalModel:
    """`model` with the factors of `adapter`, in evaluation mode and without gradients."""
    if adapter is not None:
        inject_from(model.model, adapter)
        for layer in lora_layers(model.model).values():
            if layer.magnitude is not None:  # compute DoRA's norms once, not for every token
                layer.norm = partial(torch.Tensor.detach, layer.norm())  # type: ignore[method-assign]
    model.model.requires_grad_(False)
    model.model.eval()
    return model


def read(
    model: CausalModel, examples: Sequence[Example], batch_size: int
) -> Generator[Read, None, Likelihood]:  # fmt: skip
    """Score `examples`; returns their likelihood in the given order. Raises AdapterkitError if a loss is not finite."""
    order = sorted(
        range(len(examples)), key=lambda at: -len(examples[at].ids)
    )  # longest first: run out of memory early
    scores: dict[int, tuple[float, int, int]] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = Batch.of([examples[at] for at in indices], model.model.device)
        parts = [*model.token_losses(batch), batch.labels != IGNORED]
        by_record = zip(indices, *(torch.split(part.cpu(), list(batch.lengths)) for part in parts), strict=True)
        for at, losses, right, in_loss in by_record:
            loss = losses.sum(dtype=torch.float64).item()
            if not math.isfinite(loss):
                raise AdapterkitError(f"{examples[at].where}: the loss is {loss}", hint="try `dtype='fp32'`")
            scores[at] = loss, int(in_loss.sum()), int(right.sum())
        yield Read(len(scores), len(examples))
    losses, counts, right = zip(*(scores[at] for at in range(len(examples))), strict=True)
    return Likelihood(losses, counts, right)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt, its record, and the number of tokens in the expected completion."""

    record: Record
    ids: tuple[int, ...]
    length: int


def complete(
    model: CausalModel, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int,
    answer: str | None = None,
) -> Generator[Completed, None, tuple[Prediction, ...]]:  # fmt: skip
    """Complete `prompts` greedily; returns the completions, compared with the expected ones, in the given order."""
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at].ids))
    predictions: dict[int, Prediction] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        ids = [torch.tensor(prompts[at].ids) for at in indices]
        completions = model.complete(ids, max_new_tokens, tokenizer.eos_token_id)
        for at, completion in zip(indices, completions, strict=True):
            predictions[at] = compared(prompts[at].record, decode_text(tokenizer, completion), answer)
        yield Completed(len(predictions), len(prompts))
    return tuple(predictions[at] for at in range(len(prompts)))


# --- checks ----------------------------------------------------------------------------------------------------------


def _prompts(o: EvaluateOptions, data: Encoded, tokenizer: Any) -> list[Prompt]:
    """The prompts to complete; those without a token cannot be."""
    if o.generate is False:
        return []
    prompts: list[Prompt] = []
    for record, example in zip(data.records, data.examples, strict=True):
        if record.prompt is not None and (ids := encode_text(tokenizer, record.prompt)["input_ids"]):
            prompts.append(Prompt(record, tuple(ids), len(example.ids) + example.cut - len(ids)))
    if not prompts and (o.generate or o.answer is not None or o.max_new_tokens is not None):
        raise UsageError(
            f"{o.data}: no record has a prompt with a completion, so there is nothing to generate; omit "
            "`generate=True`, `max_new_tokens`, `answer` and `predictions`, or name the fields with `prompt_field` and "
            "`completion_field`"
        )
    if (pattern := o.answer) is not None:
        expected = {prompt.record.where: prompt.record.completion or "" for prompt in prompts}
        without = [where for where, completion in expected.items() if answer_of(completion, pattern) is None]
        if without:
            raise UsageError(
                f"`answer={pattern}`: no match in the completions of {counted(len(without), 'record')}, the first at "
                f"{without[0]}"
            )
    return prompts


def _max_new_tokens(o: EvaluateOptions, prompts: Sequence[Prompt], base: Checkpoint) -> int:
    """The maximum length of a completion, in tokens."""
    limit = o.max_new_tokens or max((prompt.length for prompt in prompts), default=0) + MARGIN
    positions = size_of(base, "max_position_embeddings", "n_positions")
    longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
    if positions is None or longest is None or len(longest.ids) + limit <= positions:
        return limit
    if o.max_new_tokens or len(longest.ids) >= positions:
        raise UsageError(
            f"{longest.record.where}: the prompt has {len(longest.ids):,} tokens and {limit:,} more do not fit into "
            f"the {positions:,} that {base.name} supports; use a lower `max_new_tokens`, or `generate=False`"
        )
    return positions - len(longest.ids)


def _check_memory(
    o: EvaluateOptions, base: Checkpoint, data: Encoded, dtype: torch.dtype, device: torch.device
) -> None:
    recipe = Recipe(batch_size=o.batch_size, max_length=o.max_length, quantize=o.quantize)
    memory, free = estimate(base, recipe, data.examples, dtype, device), available(device)
    if (needed := memory.weights + memory.logits + memory.process) > free:
        hint = "" if base.quantization or o.quantize != "none" else "; `quantize='nf4'` needs less"
        raise UsageError(
            f"{base.name} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free on {device}{hint}"
        )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
