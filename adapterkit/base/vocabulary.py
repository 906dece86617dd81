"""The vocabulary of a base: the tensors with a row for each token, and their size in the model that an adapter is of.

Training with new tokens resizes the input embedding, the head and the head's biases together: transformers appends
rows, or removes the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.adapter.weights import Adapter
from adapterkit.base.architectures import HEADS, INPUT_EMBEDDINGS
from adapterkit.base.checkpoint_names import names_in_model
from adapterkit.base.quant import QuantizedWeight
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TensorInfo, tensor_bytes

Tensors = Mapping[str, TensorInfo | QuantizedWeight]
LM_HEADS = ("lm_head.weight", "embed_out.weight")  # names of a head in memory, whatever its name on disk
ZERO_BIAS = "final_logits_bias"  # (1, tokens), a buffer that transformers extends with zeros and PEFT doesn't save
PER_LAYER = "embed_tokens_per_layer.weight"  # Gemma 3n and 4: resized too, but PEFT doesn't save it
# Of a config, for the text model.
SECTIONS = ("text_config", "encoder", "decoder", "generator", "text_encoder", "thinker_config")
SIZE_KEYS = ("vocab_size", "decoder_vocab_size", "n_words", "vocab_size_per_layer_input")


def input_embeddings(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the names of input embeddings in a checkpoint with this config; others like them belong to a layer."""
    return _outside_layers(names, config, INPUT_EMBEDDINGS)


def heads_in(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the names of heads in a checkpoint with this config."""
    return _outside_layers(names, config, (head_suffix(config),))


def head_suffix(config: Mapping[str, Any]) -> str:
    """Return the last segments of the head's name."""
    return HEADS.get(config.get("model_type") or "", "lm_head.weight")


def _outside_layers(names: Iterable[str], config: Mapping[str, Any], suffixes: tuple[str, ...]) -> list[str]:
    """The names outside any layer that end so, on disk or in the model."""
    in_model, ends = names_in_model(config), tuple(f".{suffix}" for suffix in suffixes)
    outside = (name for name in names if not any(part.isdecimal() for part in name.split(".")))
    return [name for name in outside if f".{name}".endswith(ends) or f".{in_model(name)}".endswith(ends)]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tensors with a row for each of `size` tokens: embeddings, the head, and biases; `heads` are its suffixes.

    Embeddings and head have `width` columns.
    """

    size: int
    width: int
    embeddings: tuple[str, ...]
    head: str | None
    biases: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.embeddings, *([self.head] if self.head else []), *self.biases)

    def size_in(self, adapter: Adapter, label: str) -> int | None:
        """Return the size of the vocabulary that `adapter` was trained with; None if it changes none of its tensors.

        Raises FitError if its tensors have different numbers of rows.
        """
        shapes = [(name, values.shape) for name, values in adapter.replaced.items()]
        for module, weights in adapter.modules.items():
            delta = (weights.out_features, weights.in_features)
            shapes.append((f"{module}.weight", delta[::-1] if weights.kind == "embedding" else delta))
        rows = {
            rows_of(shape): name
            for name, shape in shapes
            if self._has(name) and (shape[1:] == (self.width,) or name.endswith(".bias"))
        }
        if len(rows) > 1 or 0 in rows:
            shown = ", ".join(f"{count} for {name}" for count, name in rows.items())
            raise FitError(f"{label}: has different numbers of tokens, or none: {shown}")
        trained = [
            max(tokens, default=-1) + 1 for name, (tokens, _) in adapter.tokens.items() if self._has(f"{name}.weight")
        ]
        return next(iter(rows), max(self.size, *trained) if trained else None)

    def _has(self, name: str) -> bool:
        """Whether an adapter's tensor, by its name in memory, is one of these."""
        weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
        return bool(_outside_layers([weight], {}, (*INPUT_EMBEDDINGS, *self.heads)))

    def resized(self, tensors: Tensors, size: int) -> dict[str, TensorInfo | QuantizedWeight]:
        """Return `tensors` with the shapes that they have for `size` tokens."""
        names = [name for name in self.tensors if name in tensors and size != self.size]
        return {
            **tensors,
            **{name: replace(tensors[name], shape=_with_rows(tensors[name].shape, size)) for name in names},
        }

    def resize_config(self, config: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Return `config` with another `vocab_size`, in the text model's section and wherever it has the old one."""
        sections = {name: config[name] for name in SECTIONS if isinstance(config.get(name), dict)}
        if not {"vocab_size", "text_config"} & sections.get("encoder", {}).keys():  # one of images
            sections.pop("encoder", None)
        changed = {name: self.resize_config(section, size) for name, section in sections.items()}
        keys = [key for key in SIZE_KEYS if config.get(key) == self.size]
        implied = [] if keys or sections or "vocab_size" in config else ["vocab_size"]  # omitted, as its default
        return {**config, **changed, **dict.fromkeys(keys + implied, size)}


def find_vocabulary(tensors: Tensors, config: Mapping[str, Any]) -> Vocabulary | None:
    """Return the vocabulary of a model; None if it has no embedding of a known name, or several of different sizes."""
    embeddings = input_embeddings(tensors, config)
    sizes = {rows_of(tensors[name].shape) for name in embeddings}
    if len(sizes) != 1:
        return None
    [size] = sizes
    heads = tuple(dict.fromkeys((head_suffix(config), *LM_HEADS)))
    stored = heads_in(tensors, config)
    head = next((name for name in stored if rows_of(tensors[name].shape) == size), None)
    stem = head.removesuffix("weight") if head else ""
    biases = [ZERO_BIAS, *dict.fromkeys(f"{part}bias" for part in (stem, stem.removesuffix("decoder.")) if part)]
    others = [name for name in tensors if name.endswith(PER_LAYER)]
    embeddings, biases = (
        [name for name in names if name in tensors and rows_of(tensors[name].shape) == size]
        for names in ((*embeddings, *others), biases)
    )
    width = tensors[embeddings[0]].shape[-1]
    return Vocabulary(size, width, tuple(embeddings), head, tuple(biases), heads if head or not stored else ())


def rows_of(shape: tuple[int, ...]) -> int:
    """Return the rows of a tensor with a row for each token; a row vector has one for each element."""
    return shape[-1] if _is_row_vector(shape) else shape[0] if shape else 0


def first_rows(info: TensorInfo, rows: int) -> TensorInfo:
    """Return the first rows of a tensor, or all if it has fewer; those of a row vector as a vector."""
    shape = (min(rows, rows_of(info.shape)), *(() if _is_row_vector(info.shape) else info.shape[1:]))
    return replace(info, shape=shape, stop=info.start + tensor_bytes(info.dtype, shape))


def _with_rows(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return (1, rows) if _is_row_vector(shape) else (rows, *shape[1:])


def _is_row_vector(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == 1
