"""A causal language model as the trainer sees it: a batch of sequences in, the sum of their losses out.

The sequences of a batch are laid end to end in one row, without padding; attention ends where a sequence does. So a
batch of uneven records and a packed one are the same thing, and no step is spent on padding. A model that cannot be
read so is found out by trying, and gets its sequences padded; so is one whose logits are more than `h·Wᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adapterkit.errors import FormatError
from adapterkit.train.loss import IGNORED, chunked_cross_entropy, rows_at_a_time, token_losses
from adapterkit.train.products import times_transposed

if TYPE_CHECKING:
    from adapterkit.train.data.tokenize import Example

ATTENTION = "adapterkit"  # the name under which transformers finds `attend`
FILL = 16  # rows are filled up to a multiple: CPU kernels are compiled, and kept, for every number of tokens
PROBE = (5, 3)  # the lengths of the sequences that a model is tried with


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences end to end: `ids (tokens,)`, and at each place the `label` of the token that is to follow."""

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """The sequences of `examples`; what does not count, and what follows a last token, is ignored."""
        ids = torch.cat([torch.from_numpy(one.ids) for one in examples]).long()
        counted = torch.cat([torch.from_numpy(one.counted) for one in examples])
        lengths = tuple(len(one.ids) for one in examples)
        labels = torch.where(counted, ids, IGNORED).roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORED
        return cls(ids.to(device), labels.to(device), lengths)

    def sequences(self) -> tuple[torch.Tensor, ...]:
        """The ids of each sequence."""
        return torch.split(self.ids, list(self.lengths))

    @property
    def counted(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORED).sum())


class CausalModel:
    """A causal model of transformers, with or without factors; `hidden (tokens, dim)` is what its logits come from."""

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, model.base_model
        if self.backbone is model or self.head is None:
            raise FormatError(f"{type(model).__name__}: is no causal language model, which this trains and evaluates")
        model.config.use_cache = False
        self.unpadded = self._takes_unpadded()
        self._plain_logits = self._has_plain_logits()

    @property
    def head(self) -> Any:
        """The output layer, which may have got factors since."""
        return self.model.get_output_embeddings()

    @property
    def plain_head(self) -> bool:
        """Whether the logits are `h·Wᵀ`."""
        return self._plain_logits and type(self.head) is torch.nn.Linear and self.head.bias is None

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states `(tokens, dim)`, as the output layer takes them; some models end in float32."""
        states = self._unpadded(batch) if self.unpadded else self._padded(batch)
        dtype: torch.dtype = self.head.weight.dtype
        return states.to(dtype) if dtype.is_floating_point else states

    def _padded(self, batch: Batch) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(list(batch.sequences()), batch_first=True)
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = places < torch.tensor(batch.lengths, device=ids.device)[:, None]
        states = self.backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        found: torch.Tensor = states[mask]
        return found

    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of the losses of all labels that count, in float32; logits are there some rows at a time."""
        h = self.hidden(batch)
        if self.plain_head:
            return chunked_cross_entropy(h, self.head.weight, batch.labels)
        counted = batch.labels != IGNORED
        h, labels, step = h[counted], batch.labels[counted], rows_at_a_time(self.model.config.vocab_size)
        parts = [
            checkpoint(self._summed, part, wanted, use_reentrant=False)
            for part, wanted in zip(torch.split(h, step), torch.split(labels, step), strict=True)
        ]
        return torch.stack(parts).sum() if parts else h.sum() * 0.0

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`−log p(label)` at every place `(tokens,)`, zero where none counts, and whether it is the likeliest token."""
        logits = partial(times_transposed, W=self.head.weight) if self.plain_head else self.logits
        return token_losses(self.hidden(batch), logits, batch.labels, self.model.config.vocab_size)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states, `(tokens, vocabulary)`."""
        z: torch.Tensor = self.head(h)
        cap, scale = self._changes()
        if cap:
            z = torch.tanh(z / cap) * cap
        return z if scale == 1.0 else z * scale

    def _changes(self) -> tuple[float | None, float]:
        """What the model does to its logits: a soft cap, and a factor."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return getattr(config, "final_logit_softcapping", None), scale

    @torch.no_grad()
    def complete(self, prompts: Sequence[torch.Tensor], most: int, end: int | None) -> list[list[int]]:
        """The likeliest continuation of each prompt `(tokens,)`, of up to `most` tokens, without what ends it."""
        model, longest = self.model, max(map(len, prompts))
        before, training = model.config._attn_implementation, model.training
        if before == ATTENTION:
            model.set_attn_implementation("sdpa")  # which knows of caches
        model.eval()
        ids = torch.stack([F.pad(ids, (longest - len(ids), 0), value=end or 0) for ids in prompts])
        mask = torch.stack([F.pad(torch.ones_like(ids), (longest - len(ids), 0)) for ids in prompts])
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most, do_sample=False,
            use_cache=True, eos_token_id=end, pad_token_id=end or 0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        if before == ATTENTION:
            model.set_attn_implementation(before)
        model.train(training)
        rows = made[:, longest:].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def _summed(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(h).float(), labels, reduction="sum")

    def _unpadded(self, batch: Batch) -> torch.Tensor:
        fill = -len(batch.ids) % FILL
        ids, lengths = F.pad(batch.ids, (0, fill)), (*batch.lengths, *([fill] if fill else []))
        places = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
        states = self.backbone(
            input_ids=ids[None], position_ids=places[None], use_cache=False, lengths=lengths
        ).last_hidden_state
        found: torch.Tensor = states[0, : len(batch.ids)]
        return found

    # --- what the model is able to, found out by trying -------------------------------------------------------------

    @torch.no_grad()
    def _takes_unpadded(self) -> bool:
        """Whether two sequences in one row come out as each alone."""
        if not getattr(self.model, "_supports_attention_backend", False):
            return False
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        try:
            batch = self._probe()
            alone = [self.backbone(input_ids=ids[None], use_cache=False) for ids in batch.sequences()]
            if _same(self._unpadded(batch), torch.cat([one.last_hidden_state[0] for one in alone])):
                return True
        except (TypeError, ValueError, RuntimeError, UnsupportedAttentionError):
            pass
        self.model.set_attn_implementation(before)
        return False

    @torch.no_grad()
    def _has_plain_logits(self) -> bool:
        """Whether the model's own logits are those of its output layer, unchanged."""
        batch = self._probe()
        h = self.hidden(batch)
        wanted = torch.cat([self.model(input_ids=ids[None]).logits[0] for ids in batch.sequences()])
        if not _same(self.logits(h), wanted):
            raise FormatError(f"{type(self.model).__name__}: makes logits in a way that is not known, or none at all")
        return self._changes() in ((None, 1.0), (0.0, 1.0))

    def _probe(self) -> Batch:
        ids = torch.arange(sum(PROBE), device=self.model.device) + 1
        return Batch(ids, torch.full_like(ids, IGNORED), PROBE)


class UnsupportedAttentionError(Exception):
    """A kind of attention that `attend` does not compute."""


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
    scaling: float | None = None, lengths: Sequence[int] | None = None, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each of the sequences that lie end to end, none looking into another.

    `query (1, heads, tokens, dim)`, `key` and `value` with as many heads or a divisor; the result is
    `(1, tokens, heads, dim)`, as transformers wants it.
    """
    if more.get("softcap") or more.get("s_aux") is not None or mask is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} attends in a way of its own")
    lengths = lengths or (query.shape[2],)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and len(lengths) > 1:
        at_once = _by_flash_attention(query, key, value, scaling, lengths, sliding_window)
        if at_once is not None:
            return at_once, None
    parts, first = [], 0
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (tokens, heads, dim)
    for length, run in groupby(lengths):  # sequences of one length go together
        count = len(list(run))
        part = slice(first, first + count * length)
        q, k, v = (one[part].reshape(count, length, *one.shape[1:]).transpose(1, 2) for one in rows)
        band = None
        if sliding_window and length > sliding_window:
            places = torch.arange(length, device=q.device)
            ago = places[:, None] - places
            band = (ago >= 0) & (ago < sliding_window)
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(found.transpose(1, 2).flatten(0, 1))
        first += count * length
    return torch.cat(parts)[None], None


def _by_flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, lengths: Sequence[int],
    window: int | None,
) -> torch.Tensor | None:  # fmt: skip
    """All sequences in one kernel, where torch has it (2.10 on)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    longest, (q, k, v) = max(lengths), (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    found: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=((window or 0) - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    rows: torch.Tensor = found
    return rows[None]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each row is the same but for rounding; even in models of float64, parts compute in float32."""
    close = 0.5 * max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return bool(((one - other).float().norm(dim=1) <= close * other.float().norm(dim=1)).all())
