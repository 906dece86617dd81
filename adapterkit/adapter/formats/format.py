"""The interface of a format's module, which is all that code outside `adapter/formats` uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from adapterkit.adapter.formats.source import Source
    from adapterkit.adapter.weights import Adapter


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """The facts about an adapter in its config alone, unchecked; unknown ones are empty."""

    kind: str = "LoRA"
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None  # on the Hub


class Format(Protocol):
    """A module with these attributes; its files, on the Hub and in folders, are recognized by their names."""

    @property
    def NAME(self) -> str:
        """The name of the format, for users."""

    @property
    def WEIGHTS(self) -> Sequence[str]:
        """The names of its weights file, in order of preference."""

    @property
    def PICKLED(self) -> Sequence[str]:
        """The names of pickled weights files: read only if there is no other, and never opened for listings."""

    @property
    def CONFIG(self) -> str | None:
        """The name of the JSON config beside the weights, if the format has one."""

    @property
    def BASE_KEY(self) -> str | None:
        """The config key of the base model, in which `push` stores its Hub id."""

    @property
    def LIBRARY(self) -> str:
        """The library that loads it, as in model cards and tags on the Hub."""

    def detect(self, source: Source) -> bool:
        """Return whether `source` is in this format; called with tensors only to distinguish adapters from models."""

    def read(self, source: Source, alpha: float | None, scaling: float | None) -> Adapter:
        """Read the headers; raises UnknownStrengthError if neither the files nor the caller define the scaling."""

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write `adapter` to `directory`, which is empty or new; raises FitError if the format can't represent it."""

    def describe_config(self, config: Mapping[str, Any]) -> ConfigFacts | None:
        """Return the facts in `config`, or None if it belongs to another format with the same config name."""

    def example(self, repo: str) -> Sequence[str]:
        """Return lines of Python that load the adapter from the Hub, for its model card."""
