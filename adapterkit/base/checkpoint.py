"""A base model on disk: its config, its index, and the headers of its shards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.adapter.formats.table import config_names, find_weights, has_adapter_file
from adapterkit.errors import FormatError, MissingFileError, UnsafeFileError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import cache_blob, files_below
from adapterkit.files.safetensors import Header, TensorInfo, read_header
from adapterkit.files.staging import MAX_NAME_BYTES, RECEIPT
from adapterkit.files.stamps import Stamp, stamps_of
from adapterkit.reprs import Displayed
from adapterkit.text import counted

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# Weights in other formats, which aren't copied, since they would still be of the unmerged model.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".ot", ".npz", ".tflite",
    ".safetensors",
)  # fmt: skip
# Their names and those of indexes, such as `model.safetensors.index.fp16.json`.
OTHER_WEIGHTS_NAME = re.compile(
    rf"({'|'.join(map(re.escape, OTHER_WEIGHTS))}|\.index(\.[\w-]+)?\.json)$", re.IGNORECASE
)


@dataclass(frozen=True, repr=False)
class Checkpoint(Displayed):
    """A safetensors checkpoint: a Hugging Face directory, or a single file."""

    path: Path
    name: str  # for messages: a Hub id, or the last part of the path
    shards: tuple[Header, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] = field(default_factory=dict)
    index: Path | None = None
    stamps: dict[Path, Stamp] = field(default_factory=dict)  # taken before the files were read

    def brief(self) -> str:
        return f"{self.name}, {counted(len(self.tensors), 'tensor')} in {counted(len(self.shards), 'file')}"

    @property
    def is_directory(self) -> bool:
        return all(shard.file != self.path for shard in self.shards)

    @property
    def quantization(self) -> str | None:
        """The quantization method and format declared in the config, if any."""
        declared = self.config.get("quantization_config")
        if not isinstance(declared, dict):
            return None
        kind = declared.get("quant_algo") or declared.get("format")
        method = str(declared.get("quant_method", "an unnamed scheme"))
        return f"{method} {kind}" if isinstance(kind, str) else method

    def other_files(self) -> tuple[list[Path], dict[Path, str]]:
        """List the files beside the weights, by relative path: those to copy, and the others with the reason."""
        copied: list[Path] = []
        left_out: dict[Path, str] = {}
        read = {CONFIG, *(shard.file.name for shard in self.shards), *([self.index.name] if self.index else [])}
        for file, kind in files_below(self.path) if self.is_directory else ():
            first, *inner = file.parts
            if str(file) in read or (first == Path(RECEIPT).stem and inner):  # copied with the receipt
                continue
            # transformers would load an adapter that lies beside the model.
            if OTHER_WEIGHTS_NAME.search(file.name) or has_adapter_file([file.name]):
                left_out[file] = "it belongs to the unmerged model"
            elif first == Path(RECEIPT).stem:
                left_out[file] = "the name is reserved for a receipt's folder"
            elif kind is not None:
                left_out[file] = f"it is {kind}"
            else:
                copied.append(file)
        return copied, left_out

    def notes(self) -> list[str]:
        """List notes for the user: weights that are links, and files that are not copied."""
        linked = [shard.file for shard in self.shards if shard.file.is_symlink() and cache_blob(shard.file) is None]
        return [
            *(f"{file.name}: is a link; the weights were read from its target" for file in linked),
            *(f"{file}: not copied: {why}" for file, why in self.other_files()[1].items()),
        ]


def is_base(path: Path) -> bool:
    """Return whether the directory at `path` holds a model rather than an adapter, which may lack its config."""
    if not (path / CONFIG).is_file() or any((path / name).is_file() for name in config_names()):
        return False
    return find_weights(path) is None or (path / SINGLE).exists() or any(path.glob(f"*{INDEX_SUFFIX}"))


def is_adapter(path: Path) -> bool:
    """Return whether the directory at `path` holds an adapter rather than a model."""
    return path.is_dir() and not is_base(path) and has_adapter_file(os.listdir(path))


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Open the base model at `path` by reading its headers.

    Raises FormatError if a shard is missing or corrupt, two shards hold the same tensor, or the index disagrees with
    the shards; UnsafeFileError if the index lists files outside the directory.
    """
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for symlink loops
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"{path}: no such file or directory") from error
        raise FormatError(f"{path}: {error}") from error
    if path.is_file():
        if path.suffix == ".json":
            raise FormatError(f"{path}: is not a weights file; give its directory")
        stamps = stamps_of([path])
        header = read_header(path)
        return Checkpoint(path, name or path.name, (header,), header.tensors, stamps=stamps)
    if not path.is_dir():
        raise FormatError(f"{path}: is neither a file nor a directory")
    stamps = stamps_of(file for file in (path / CONFIG, *path.glob(f"*{INDEX_SUFFIX}")) if os.path.exists(file))
    config = read_json(path / CONFIG) if os.path.lexists(path / CONFIG) else {}
    if not isinstance(config.get("model_type", ""), str | None):
        raise FormatError(f"{path / CONFIG}: model_type is {str(config['model_type'])[:60]!r}, expected a name")
    index, weight_map, names = _weight_files(path)
    _check_named(path, config, index or path / names[0])
    for file in names:
        if not os.path.exists(path / file):
            missing = f"the shard listed in {index.name}" if index else "the weights file"
            raise FormatError(f"{path / file}: {missing} is missing. Download it again.")
    stamps |= stamps_of(path / file for file in names)
    shards = [read_header(path / file) for file in names]
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor, info in shard.tensors.items():
            if tensor in tensors:
                raise FormatError(f"{info.file}: {tensor} is also in {tensors[tensor].file.name}")
            tensors[tensor] = info
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != file:
            raise FormatError(f"{index}: {tensor} should be in {file}, but is not")
    return Checkpoint(path, name or path.resolve().name, tuple(shards), tensors, config, index, stamps)


def _weight_files(path: Path) -> tuple[Path | None, dict[str, str], list[str]]:
    """Return the index, its weight map and the weight files that transformers would load.

    Raises FormatError if that is ambiguous.
    """
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise FormatError(f"{path}: has two indexes, {indexes[0].name} and {indexes[1].name}; remove the wrong one")
    if not indexes:
        return None, {}, [_only_file(path).name]
    weight_map = _read_index(indexes[0])
    names = sorted(set(weight_map.values()))
    if names != [SINGLE] and os.path.lexists(path / SINGLE):
        raise FormatError(
            f"{path}: has {SINGLE}, which transformers loads, and {indexes[0].name}, which lists other files; remove "
            "the wrong one"
        )
    return indexes[0], weight_map, names


def _check_named(path: Path, config: Mapping[str, Any], entry: Path) -> None:
    """Raise FormatError if the config makes transformers load other weights than those of `entry`."""
    named = config.get("transformers_weights")
    if named is not None and named != entry.name:
        raise FormatError(
            f"{path / CONFIG}: transformers_weights is {str(named)[:80]!r}, but the directory has {entry.name}; remove "
            "the wrong one"
        )


def _only_file(path: Path) -> Path:
    """Return the weight file of a directory without an index."""
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.name == SINGLE]
    if len(files) == 1 or named:
        return (named or files)[0]
    if files:
        shown = ", ".join(file.name for file in files[:3])
        raise FormatError(f"{path}: has several safetensors files ({shown} …) but no index")
    others = [file.name for file in sorted(path.iterdir()) if file.name.endswith(OTHER_WEIGHTS)]
    hint = f" It holds {others[0]}: convert it to safetensors first." if others else ""
    raise FormatError(f"{path}: no safetensors weights in this directory.{hint}")


def _read_index(file: Path) -> dict[str, str]:
    """Read the weight map; raises unless every file in it is a plain name of a safetensors file."""
    weight_map = read_json(file, large=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{file}: weight_map must map tensor names to file names")
    for name in set(weight_map.values()):
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise UnsafeFileError(f"{file}: lists the shard {name[:80]!r}, expected a file name without a path")
        if not name.endswith(".safetensors") or len(name.encode()) > MAX_NAME_BYTES:
            raise FormatError(f"{file}: lists the shard {name[:80]!r}, expected a .safetensors file name")
    return weight_map
