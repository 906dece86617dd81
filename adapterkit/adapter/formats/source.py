"""What is on disk where an adapter should be: its weights file, the config beside it, and the tensors by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.formats.pickled import read_pickle
from adapterkit.errors import FormatError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.safetensors import TensorInfo, read_header
from adapterkit.files.stamps import Stamp, stamps_of

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
# The names that training tools give the weights file, best first.
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class Source:
    """The files of one adapter, opened but not interpreted."""

    weights: Path
    tensors: Mapping[str, TensorInfo | torch.Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    config_file: Path
    stamps: Mapping[Path, Stamp]  # of the files, before they were read

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.weights,) if self.config is None else (self.weights, self.config_file)


def open_source(path: Path) -> Source:
    """Find the weights and the config at `path` and read their headers."""
    weights = _find_weights(path)
    config_file = weights.parent / ADAPTER_CONFIG
    stamps = stamps_of(file for file in (weights, config_file) if os.path.exists(file))
    config = read_json(config_file) if os.path.lexists(config_file) else None
    if weights.suffix == ".safetensors":
        header = read_header(weights)
        return Source(weights, header.tensors, header.metadata, config, config_file, stamps)
    return Source(weights, read_pickle(weights), {}, config, config_file, stamps)


def _find_weights(path: Path) -> Path:
    if not path.exists():
        raise FormatError(f"{path}: there is no such file or directory")
    if path.is_file():
        if path.suffix == ".json":
            raise FormatError(f"{path}: is not a file of weights; give the directory that it lies in")
        return path
    for name in (*WEIGHTS, *PICKLED):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:4])
        raise FormatError(f"{path}: several files could be the adapter ({names}): name one of them")
    nested = sorted(path.glob(f"*/{ADAPTER_CONFIG}"))
    hint = f" Did you mean {nested[0].parent}?" if nested else f" Expected {WEIGHTS[0]}."
    raise FormatError(f"{path}: no adapter weights in this directory.{hint}")
