"""A causal language model for training: takes a batch of sequences, returns the sum of their losses.

The sequences of a batch are concatenated in one row without padding, and attention stops at sequence boundaries. So a
batch of uneven records and a packed batch are the same thing, and no compute is spent on padding. Each model is probed:
one that does not support this gets padded batches, and one whose logits are not plainly `h·Wᵀ` is recognized too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
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
FILL = 16  # pad rows to a multiple: CPU kernels are compiled and cached for each number of tokens
PROBE = (5, 3)  # sequence lengths of the probe batch


@dataclass(frozen=True, slots=True)
class Batch:
    """Concatenated sequences: `ids (tokens,)`, and `labels (tokens,)`, the next token at each position."""

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """Concatenate `examples`; labels that do not count, and those after a last token, are ignored."""
        ids = torch.cat([torch.from_numpy(example.ids) for example in examples]).long()
        counted = torch.cat([torch.from_numpy(example.counted) for example in examples])
        lengths = tuple(len(example.ids) for example in examples)
        labels = torch.where(counted, ids, IGNORED).roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORED
        return cls(ids.to(device), labels.to(device), lengths)

    def sequences(self) -> tuple[torch.Tensor, ...]:
        """The ids of each sequence."""
        return torch.split(self.ids, list(self.lengths))

    @property
    def counted(self) -> int:
        """The number of labels that count."""
        return int((self.labels != IGNORED).sum())


class CausalModel:
    """A transformers causal language model, with or without factors.

    Raises FormatError where the model is not a causal language model, or computes logits in an unknown way.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, model.base_model
        if self.backbone is model or self.head is None:
            raise FormatError(f"{type(model).__name__}: is not a causal language model; only those are supported")
        model.config.use_cache = False
        self.unpadded = self._takes_unpadded()
        self._plain_logits = self._has_plain_logits()

    @property
    def head(self) -> Any:
        """The output layer; looked up each time, since it may have been given factors."""
        return self.model.get_output_embeddings()

    @property
    def plain_head(self) -> bool:
        """Whether the logits are `h·Wᵀ`."""
        return self._plain_logits and type(self.head) is torch.nn.Linear and self.head.bias is None

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states `(tokens, dim)`, in the dtype of the output layer (some models end in float32)."""
        states = self._unpadded(batch) if self.unpadded else self._padded(batch)
        return self._in_dtype_of_head(states)

    def _in_dtype_of_head(self, states: torch.Tensor) -> torch.Tensor:
        dtype: torch.dtype = self.head.weight.dtype
        return states.to(dtype) if dtype.is_floating_point else states

    def _padded(self, batch: Batch) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(list(batch.sequences()), batch_first=True)
        positions = torch.arange(ids.shape[1], device=ids.device)
        mask = positions < torch.tensor(batch.lengths, device=ids.device)[:, None]
        states = self.backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        unpadded: torch.Tensor = states[mask]
        return unpadded

    def loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss over all labels that count, float32; logits exist for some rows at a time only."""
        h = self.hidden(batch)
        if self.plain_head:
            return chunked_cross_entropy(h, self.head.weight, batch.labels)
        counted = batch.labels != IGNORED
        h, labels, step = h[counted], batch.labels[counted], rows_at_a_time(self.model.config.vocab_size)
        parts = [
            checkpoint(self._summed, states, targets, use_reentrant=False)
            for states, targets in zip(torch.split(h, step), torch.split(labels, step), strict=True)
        ]
        return torch.stack(parts).sum() if parts else h.sum() * 0.0

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`−log p(label)` `(tokens,)`, zero where no label counts, and whether the label is the likeliest token."""
        logits = partial(times_transposed, W=self.head.weight) if self.plain_head else self.logits
        return token_losses(self.hidden(batch), logits, batch.labels, self.model.config.vocab_size)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states, `(tokens, vocabulary)`."""
        z: torch.Tensor = self.head(h)
        cap, scale = self._cap_and_scale()
        if cap:
            z = torch.tanh(z / cap) * cap
        return z if scale == 1.0 else z * scale

    def _cap_and_scale(self) -> tuple[float | None, float]:
        """The soft cap and the factor that the model applies to its logits."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return getattr(config, "final_logit_softcapping", None), scale

    @torch.no_grad()
    def complete(self, prompts: Sequence[torch.Tensor], max_new_tokens: int, eos: int | None) -> list[list[int]]:
        """The greedy completion of each prompt `(tokens,)`, without the end token `eos`."""
        model, longest = self.model, max(map(len, prompts))
        attention, training = model.config._attn_implementation, model.training
        if attention == ATTENTION:
            model.set_attn_implementation("sdpa")  # `attend` does not support caches
        model.eval()
        ids = torch.stack([F.pad(ids, (longest - len(ids), 0), value=eos or 0) for ids in prompts])
        mask = torch.stack([F.pad(torch.ones_like(ids), (longest - len(ids), 0)) for ids in prompts])
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
            do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=eos or 0, temperature=None, top_p=None,
            top_k=None,
        )  # fmt: skip
        if attention == ATTENTION:
            model.set_attn_implementation(attention)
        model.train(training)
        completions = output[:, longest:].tolist()
        return [ids[: ids.index(eos)] if eos in ids else ids for ids in completions]

    def _summed(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(h).float(), labels, reduction="sum")

    def _unpadded(self, batch: Batch) -> torch.Tensor:
        fill = -len(batch.ids) % FILL
        ids, lengths = F.pad(batch.ids, (0, fill)), (*batch.lengths, *([fill] if fill else []))
        positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
        states = self.backbone(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, lengths=lengths
        ).last_hidden_state
        filled: torch.Tensor = states[0, : len(batch.ids)]
        return filled

    # --- probes -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _takes_unpadded(self) -> bool:
        """Whether two sequences in one row give the same states as each alone."""
        if not getattr(self.model, "_supports_attention_backend", False):
            return False
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        try:
            batch = self._probe()
            alone = [self.backbone(input_ids=ids[None], use_cache=False) for ids in batch.sequences()]
            if _same(self._unpadded(batch), torch.cat([output.last_hidden_state[0] for output in alone])):
                return True
        except (TypeError, ValueError, RuntimeError, UnsupportedAttentionError):
            pass
        self.model.set_attn_implementation(previous)
        return False

    @torch.no_grad()
    def _has_plain_logits(self) -> bool:
        """Whether the model's logits are the output of its output layer, unchanged."""
        for ids in self._probe().sequences():  # each as the model computes it: other shapes may use other kernels
            h = self._in_dtype_of_head(self.backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0])
            if not _same(self.logits(h), self.model(input_ids=ids[None]).logits[0]):
                name = type(self.model).__name__
                raise FormatError(f"{name}: unsupported model: it computes logits in an unknown way")
        return self._cap_and_scale() in ((None, 1.0), (0.0, 1.0))

    def _probe(self) -> Batch:
        ids = torch.arange(sum(PROBE), device=self.model.device) + 1
        return Batch(ids, torch.full_like(ids, IGNORED), PROBE)


class UnsupportedAttentionError(Exception):
    """A kind of attention that `attend` does not support."""


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
    scaling: float | None = None, lengths: Sequence[int] | None = None, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each of the concatenated sequences.

    Args:
        query: `(1, heads, tokens, dim)`.
        key, value: The same shape, with as many heads or a divisor of them.
        lengths: The lengths of the sequences.

    Returns:
        `(1, tokens, heads, dim)`, the layout that transformers expects, and no attention weights.
    """
    if more.get("softcap") or more.get("s_aux") is not None or mask is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__}: unsupported kind of attention")
    lengths = lengths or (query.shape[2],)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and len(lengths) > 1:
        output = _by_flash_attention(query, key, value, scaling, lengths, sliding_window)
        if output is not None:
            return output, None
    parts, first = [], 0
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (tokens, heads, dim)
    for length, run in groupby(lengths):  # one call for neighbouring sequences of the same length
        count = len(list(run))
        part = slice(first, first + count * length)
        q, k, v = (tensor[part].reshape(count, length, *tensor.shape[1:]).transpose(1, 2) for tensor in rows)
        band = None
        if sliding_window and length > sliding_window:
            positions = torch.arange(length, device=q.device)
            distance = positions[:, None] - positions
            band = (distance >= 0) & (distance < sliding_window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(attended.transpose(1, 2).flatten(0, 1))
        first += count * length
    return torch.cat(parts)[None], None


def _by_flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, lengths: Sequence[int],
    window: int | None,
) -> torch.Tensor | None:  # fmt: skip
    """All sequences in one kernel, or None if torch lacks it, or its window (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    longest, (q, k, v) = max(lengths), (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    shared: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            shared["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    window_size = (window or 0) - 1, 0
    output: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window_size, **shared)
    rows: torch.Tensor = output
    return rows[None]


def _same(rows: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the rows are equal up to rounding; parts of float64 models compute in float32."""
    close = 0.5 * max(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return bool(((rows - expected).float().norm(dim=1) <= close * expected.float().norm(dim=1)).all())
