"""What the module of a format offers. Nothing outside `adapter/formats` knows more of a format than this."""

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
    """The facts that a config alone gives about its adapter, unchecked; unknown ones are empty."""

    kind: str = "LoRA"
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    base_model: str | None = None


class Format(Protocol):
    """A module with these names; its files, on the Hub and in folders, are known by their names."""

    @property
    def NAME(self) -> str:
        """The name that users give it."""

    @property
    def WEIGHTS(self) -> Sequence[str]:
        """The names of its weights file, best first."""

    @property
    def PICKLED(self) -> Sequence[str]:
        """The names of weights files that are pickles: read where there are no others, never opened to be listed."""

    @property
    def CONFIG(self) -> str | None:
        """The JSON file beside the weights, if the format has one."""

    @property
    def BASE_KEY(self) -> str | None:
        """The key of the config that names the base, which `push` makes a Hub id."""

    @property
    def LIBRARY(self) -> str:
        """The library that loads it, as cards name it and as the Hub tags its adapters."""

    def detect(self, source: Source) -> bool:
        """Whether `source` is in this format; called with the tensors alone to tell adapters from models."""

    def read(self, source: Source, alpha: float | None, scaling: float | None) -> Adapter:
        """Read the headers; raises UnknownStrengthError where neither the files nor the caller give the strength."""

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write `adapter` to `directory`, which is empty or not there yet; raises FitError for what it cannot hold."""

    def describe_config(self, config: Mapping[str, Any]) -> ConfigFacts | None:
        """What `config` says; None where it is of another format whose config has the same name."""

    def example(self, repo: str) -> Sequence[str]:
        """Lines of Python that load the adapter from the Hub, for its card."""
