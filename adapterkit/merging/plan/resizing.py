"""Grown and shrunk vocabularies: the output has a row for each token that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.base.tied_embeddings import equal_tensors
from adapterkit.base.vocabulary import PER_LAYER, ZERO_BIAS, Tensors, Vocabulary, first_rows, rows_of
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TensorInfo
from adapterkit.merging.plan.changes import Changes
from adapterkit.merging.plan.edits import ModuleUpdate


@dataclass(frozen=True)
class Resizing:
    """The vocabulary of a base, and the `size` that the output has; `sizes` and `labels` are those of the adapters."""

    vocabulary: Vocabulary | None
    size: int
    sizes: tuple[int | None, ...]  # None for an adapter that changes no tensor of the vocabulary
    labels: tuple[str, ...]

    @classmethod
    def of(cls, vocabulary: Vocabulary | None, given: Sequence[WeightedAdapter]) -> Resizing:
        """Choose the output's size. Raises FitError for adapters that were trained with different vocabularies."""
        labels = tuple(one.label for one in given)
        if vocabulary is None:
            return cls(None, 0, (None,) * len(given), labels)
        sizes = tuple(vocabulary.size_in(one.adapter, one.label) for one in given)
        by_size = {size: label for size, label in zip(sizes, labels, strict=True) if size is not None}
        new = [size for size in by_size if size != vocabulary.size]
        if len(new) > 1 or (new and new[0] < vocabulary.size and vocabulary.size in by_size):
            shown = ", ".join(f"{label} with {size}" for size, label in by_size.items())
            raise FitError(
                f"the adapters were trained with different numbers of tokens: {shown}",
                hint="merge only those with the same vocabulary",
            )
        return cls(vocabulary, new[0] if new else vocabulary.size, sizes, labels)

    def seen_by(self, number: int, tensors: Tensors) -> Tensors:
        """The base's tensors with the shapes that they had when adapter `number` was trained."""
        size = self.sizes[number]
        return tensors if self.vocabulary is None or size is None else self.vocabulary.resized(tensors, size)

    def after(self, tensors: Tensors) -> Tensors:
        """The base's tensors with the output's shapes."""
        return tensors if self.vocabulary is None else self.vocabulary.resized(tensors, self.size)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The output's config."""
        if self.vocabulary is None or self.size == self.vocabulary.size:
            return config
        return self.vocabulary.resize_config(config, self.size)

    def notes(self, base: Checkpoint) -> list[str]:
        if self.vocabulary is None or self.size == self.vocabulary.size:
            return []
        done = "vocab_size is set" if base.config else "set vocab_size in the model's config"
        return [f"the vocabulary changes from {self.vocabulary.size} to {self.size} tokens: {done}"]

    def apply(self, changes: Changes, base: Checkpoint, implied: str | None) -> None:
        """Check that every row of the output is known; `implied` is a head that exists only as the embedding.

        Updates by adapters that were trained with fewer tokens get their rows.
        """
        if self.vocabulary is None or self.size == self.vocabulary.size:
            return
        for name in self.vocabulary.tensors:
            if name in changes.deltas:
                changes.deltas[name] = [self._on_own_rows(delta) for delta in changes.deltas[name]]
            if name not in (implied, ZERO_BIAS) and not self._is_known(changes, name):
                raise self._unknown_rows(name, base)
        self._check_separate_embeddings(changes, base)

    def _check_separate_embeddings(self, changes: Changes, base: Checkpoint) -> None:
        """Check that the old rows of different embeddings are known: a resize gives all the rows of the first."""
        assert self.vocabulary is not None
        names = [name for name in self.vocabulary.embeddings if not name.endswith(PER_LAYER) and name in base.tensors]
        for name in names:
            if any(change.rows is None for change in changes.replaced.get(name, [])):
                continue
            if not all(equal_tensors(base.tensors[name], base.tensors[other]) for other in names):
                raise FitError(
                    f"{self.labels[self.sizes.index(self.size)]}: was trained with {self.size} tokens, {base.name} has "
                    f"{self.vocabulary.size} and stores different values in {', '.join(names)}, which transformers "
                    f"makes one embedding when it resizes the base; the rows of {name} are not in the adapter",
                    hint="merge into the resized base",
                )

    def _on_own_rows(self, delta: ModuleUpdate) -> ModuleUpdate:
        size = self.sizes[delta.adapter]
        if size == self.size or size is None or delta.target.rows is not None:
            return delta
        return replace(delta, target=replace(delta.target, rows=(0, size)))

    def _is_known(self, changes: Changes, name: str) -> bool:
        assert self.vocabulary is not None
        replaced = changes.replaced.get(name, [])
        trained = {row for change in replaced for row in change.rows or ()}
        new = range(self.vocabulary.size, self.size)
        return any(change.rows is None for change in replaced) or trained.issuperset(new)

    def _unknown_rows(self, name: str, base: Checkpoint) -> FitError:
        assert self.vocabulary is not None
        old, label = self.vocabulary.size, self.labels[self.sizes.index(self.size)]
        saved = "" if name.endswith(PER_LAYER) else ", or save the adapter again with PEFT's save_embedding_layers=True"
        return FitError(
            f"{label}: was trained with {self.size} tokens, {base.name} has {old}; rows {old} to {self.size - 1} of "
            f"{name} are not in the adapter, because they were initialized when the base was resized",
            hint=f"merge into the resized base{saved}",
        )


def kept_rows(source: TensorInfo | QuantizedWeight, shape: tuple[int, ...]) -> TensorInfo | QuantizedWeight:
    """The rows of a tensor that the output, of another shape, keeps. Raises FitError if they can't be separated."""
    if isinstance(source, TensorInfo):
        return first_rows(source, rows_of(shape))
    if rows_of(shape) < rows_of(source.shape):
        raise FitError(f"{source.name}: shortening a weight that is quantized ({source.scheme}) is not supported")
    return source
