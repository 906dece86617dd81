"""Find whether a base's input embedding is also its head.

transformers omits `tie_word_embeddings` from config.json if it has the architecture's default, which for many
architectures is true; `architectures.py` has the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.base.architectures import (
    ALWAYS_TIED,
    LFM2_MODELS,
    NEVER_TIED,
    OTHER_HEADS,
    TEXT_CONFIG_DECIDES,
    TIED,
    TIED_IF_EITHER,
    UNTIED,
)
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.vocabulary import head_suffix, heads_in, input_embeddings
from adapterkit.files.safetensors import TensorInfo

# --- the config ------------------------------------------------------------------------------------------------------


def declared(config: Mapping[str, Any]) -> bool | None:
    """Return whether a model with this config ties its head, as transformers resolves it; None if unknown."""
    model, nested = config.get("model_type"), config.get("text_config")
    text = declared(nested) if isinstance(nested, dict) else None
    classes = config.get("architectures")
    if model in NEVER_TIED or (isinstance(classes, list) and not NEVER_TIED.isdisjoint(map(str, classes))):
        return False
    if model in TEXT_CONFIG_DECIDES:
        return text
    if model in ALWAYS_TIED:
        return True
    key = config.get("tie_embedding") if model in LFM2_MODELS else None
    key = config.get("tie_word_embeddings") if key is None else key
    default = True if model in TIED else False if model in UNTIED else None
    outer = bool(key) if key is not None else default
    if model in TIED_IF_EITHER:
        return outer or bool(text)
    return text if outer is None else outer


# --- the tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tie:
    """An input embedding and the head tied to it; unless `certain`, it is unknown whether they are tied."""

    base: Checkpoint
    embedding: str
    head: str
    others: tuple[str, ...]  # more embeddings, which may be tied to it too, as those of an encoder and a decoder
    stored: bool  # whether the head has a tensor of its own
    certain: bool

    @property
    def implied(self) -> bool:
        """Whether the head exists only as the embedding."""
        return self.certain and not self.stored

    @property
    def follows_tokens(self) -> bool:
        """Whether PEFT trains tokens in the head too: it reads the outer config alone."""
        return self.base.config.get("model_type") not in TEXT_CONFIG_DECIDES

    @property
    def shared(self) -> bool:
        """Whether an encoder and a decoder share the embedding, or may."""
        return bool(self.others) or self.embedding.endswith("shared.weight")

    def equal(self, other_name: str | None = None) -> bool:
        """Return whether the head, or another tensor, equals the embedding bit for bit, as transformers requires."""
        return equal_tensors(self.base.tensors[self.embedding], self.base.tensors[other_name or self.head])

    def untie(self, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the config of an output that stores both tensors, and a note about it.

        The key is unchanged if it controls more than the head: T5's scaling, BERT's biases, an encoder's embedding.
        """
        note = f"the base ties {self.head} to {self.embedding}, but the adapter changes them separately: the output "
        inseparable = self.embedding.endswith("shared.weight") or self.head.endswith(".decoder.weight")
        if inseparable or config.get("model_type") in ALWAYS_TIED:
            return config, note + "stores both, which transformers 5 and later load"
        nested = config.get("text_config")
        if isinstance(nested, dict) and ("tie_word_embeddings" in nested or declared(nested)):
            config = config | {"text_config": nested | {"tie_word_embeddings": False}}
        keys = [key for key in ("tie_word_embeddings", "tie_embedding") if key != "tie_embedding" or key in config]
        return config | dict.fromkeys(keys, False), note + "unties them"


def _classifies(config: Mapping[str, Any]) -> bool:
    """Whether the model is a classifier, which has no head with a row for each token."""
    classes = config.get("architectures")
    return isinstance(classes, list) and bool(classes) and all(str(name).endswith("Classification") for name in classes)


def find_tie(base: Checkpoint) -> Tie | None:
    """Return the embedding and the head that `base` ties, or may tie; None if it certainly ties none."""
    tied = declared(base.config)
    found = input_embeddings(base.tensors, base.config)
    if tied is False or not found:
        return None
    embedding = min(found, key=lambda name: (not name.endswith("shared.weight"), found.index(name)))
    head = head_suffix(base.config)
    stored = next(iter(heads_in(base.tensors, base.config)), None)
    if stored is None and not embedding.endswith("shared.weight") and _classifies(base.config):
        return None
    if stored is None and head.endswith(".decoder.weight"):  # a head with more tensors, without which it doesn't exist
        within = head.removesuffix("decoder.weight")
        if not any(name.startswith(within) for name in base.tensors):
            return None
    inner = "language_model." if embedding.startswith("language_model.model.") else ""
    others = tuple(name for name in found if name != embedding)
    tie = Tie(base, embedding, stored or inner + head, others, stored is not None, tied is True)
    classes = base.config.get("architectures")
    headless = isinstance(classes, list) and any(str(name).endswith(OTHER_HEADS) for name in classes)
    return None if headless and not (tie.shared or tie.stored) else tie


def equal_tensors(one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors are equal bit for bit; they are compared a few megabytes at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 24
    for at in range(0, one.nbytes, step):
        pieces = []
        for info in (one, other):
            stop = min(info.stop, info.start + at + step)
            pieces.append(replace(info, start=info.start + at, stop=stop).read_bytes())
        if pieces[0] != pieces[1]:
            return False
    return True


# --- an adapter's changes --------------------------------------------------------------------------------------------


def unknown_tie(tie: Tie) -> str:
    """Return the error message for a head that may or may not be tied, with the remedy."""
    unknown = f"it is unknown whether {tie.base.name} ties {tie.head} to {tie.embedding}: "
    if not tie.base.config:
        return f"{unknown}it has no config.json. Give the model's directory, with its config."
    model = tie.base.config.get("model_type")
    reason = f"its model_type {model[:60]!r} is unknown" if model else "no model_type"
    return (
        f"{unknown}its config.json has no tie_word_embeddings, and {reason}. Add the key to config.json: true if the "
        "model's output embedding is its input embedding, otherwise false."
    )
