"""Tied embeddings: whether a base's input embedding is also its head.

transformers leaves `tie_word_embeddings` out of config.json where it has the architecture's default, and for many
architectures the default is true: `architectures.py` has the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.base.architectures import ALWAYS, HEADS, INPUT_EMBEDDINGS, LFM2, OR_TEXT, TEXT, TIED, UNTIED
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.files.safetensors import TensorInfo

# --- the config ------------------------------------------------------------------------------------------------------


def declared(config: Mapping[str, Any]) -> bool | None:
    """Whether a model of this config has its head tied, as transformers resolves it; None where that is not known."""
    model, nested = config.get("model_type"), config.get("text_config")
    text = declared(nested) if isinstance(nested, dict) else None
    if model in TEXT:
        return text
    if model in ALWAYS:
        return True
    key = config.get("tie_embedding") if model in LFM2 else None
    key = config.get("tie_word_embeddings") if key is None else key
    default = True if model in TIED else False if model in UNTIED else None
    outer = bool(key) if key is not None else default
    if model in OR_TEXT:
        return outer or bool(text)
    return text if outer is None else outer


# --- the tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tie:
    """An input embedding and the head that is the same tensor, or, with `certain` false, may be."""

    base: Checkpoint
    embedding: str
    head: str
    others: tuple[str, ...]  # more embeddings, with which the head, or an encoder and a decoder, may be one
    stored: bool  # whether the head has a tensor of its own
    certain: bool

    @property
    def implied(self) -> bool:
        """Whether the base has a head without a tensor for it."""
        return self.certain and not self.stored

    @property
    def shared(self) -> bool:
        """Whether an encoder and a decoder have the embedding in common, or may have."""
        return bool(self.others) or self.embedding.endswith("shared.weight")

    def equal(self, other_name: str | None = None) -> bool:
        """Whether the head, or the other tensor, is the embedding bit for bit; transformers ties only such."""
        one, other = self.base.tensors[self.embedding], self.base.tensors[other_name or self.head]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and _same_bytes(one, other)

    def untie(self, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The config of an output that has both tensors, and a note about it.

        The key stays where more than the head goes by it: T5's scaling, BERT's biases, an encoder's embedding.
        """
        note = f"the base ties {self.head} to {self.embedding}, the adapter changes them apart: the output "
        inseparable = self.embedding.endswith("shared.weight") or self.head.endswith(".decoder.weight")
        if inseparable or config.get("model_type") in ALWAYS:
            return config, note + "stores both, which transformers 5 and later load"
        nested = config.get("text_config")
        if isinstance(nested, dict) and ("tie_word_embeddings" in nested or declared(nested)):
            config = config | {"text_config": nested | {"tie_word_embeddings": False}}
        keys = [key for key in ("tie_word_embeddings", "tie_embedding") if key != "tie_embedding" or key in config]
        return config | dict.fromkeys(keys, False), note + "unties them"


def tie_of(base: Checkpoint) -> Tie | None:
    """The embedding and the head that `base` ties, or may tie; None where it surely ties none."""
    tied = declared(base.config)
    found = [name for name in base.tensors if f".{name}".endswith(tuple(f".{end}" for end in INPUT_EMBEDDINGS))]
    found = [name for name in found if not any(part.isdecimal() for part in name.split("."))]  # else some layer's own
    if tied is False or not found:
        return None
    embedding = min(found, key=lambda name: (not name.endswith("shared.weight"), found.index(name)))
    head = HEADS.get(base.config.get("model_type", ""), "lm_head.weight")
    stored = next((name for name in base.tensors if f".{name}".endswith(f".{head}")), None)
    if stored is None and head.endswith(".decoder.weight"):  # one that has more tensors, without which there is none
        within = head.removesuffix("decoder.weight")
        if not any(name.startswith(within) for name in base.tensors):
            return None
    inner = "language_model." if embedding.startswith("language_model.model.") else ""
    others = tuple(name for name in found if name != embedding)
    return Tie(base, embedding, stored or inner + head, others, stored is not None, tied is True)


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes, compared some megabytes at a time."""
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


def undecided(tie: Tie) -> str:
    """Why it is not known whether the head is tied, and what to do."""
    unknown = f"whether {tie.base.name} ties {tie.head} to {tie.embedding} is not known: "
    if not tie.base.config:
        return f"{unknown}there is no config.json. Give the directory of the model, with its config."
    model = tie.base.config.get("model_type")
    known = f"model_type {model[:60]!r} is not known here" if model else "has no model_type"
    return (
        f"{unknown}its config.json has no tie_word_embeddings, and {known}. Add the key to config.json: true if the "
        "model's output embedding is its input embedding, else false."
    )
