"""A base model on disk: its shards, its index, its config, and every tensor by name. Only headers are read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.tensorfile import Header, TensorInfo, read_header, read_json

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_NAME_BYTES = 255  # of a file, on every common file system
# Weights in other formats: never copied along, since they would still hold the unmerged model.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint: a Hugging Face directory, or a single file."""

    path: Path
    name: str  # what to call it: a Hub id, or the last part of its path
    shards: tuple[Header, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] = field(default_factory=dict)
    index: Path | None = None

    @property
    def is_directory(self) -> bool:
        return self.path.is_dir()

    @property
    def quantization(self) -> str | None:
        """The name of the scheme its config declares, if any."""
        declared = self.config.get("quantization_config")
        if not isinstance(declared, dict):
            return None
        return str(declared.get("quant_method", "an unnamed scheme"))

    def other_files(self) -> tuple[list[Path], list[Path]]:
        """The files beside the weights, relative to the directory: those to keep, and weights in other formats."""
        if not self.is_directory:
            return [], []
        keep: list[Path] = []
        skipped: list[Path] = []
        for folder, folders, names in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                file = (Path(folder) / name).relative_to(self.path)
                if name.startswith(".") or name.endswith(INDEX_SUFFIX) or str(file) == CONFIG:
                    continue
                if name.endswith(".safetensors") and file.parent == Path():
                    continue  # a shard
                if name == "adapter_config.json":  # beside a model, transformers would load the adapter it speaks of
                    skipped.append(file)
                    continue
                (skipped if name.endswith((*OTHER_WEIGHTS, ".bin.index.json")) else keep).append(file)
        return keep, skipped


def is_base(path: Path) -> bool:
    """Whether the directory at `path` holds a model, and not an adapter."""
    return (path / CONFIG).is_file() and not (path / "adapter_config.json").is_file()


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Open the base model at `path` by reading its headers.

    Raises FormatError where a shard is missing or broken, two shards hold one tensor, or the index disagrees with
    them; UnsafeFileError where the index names files outside the directory.
    """
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for symlink loops
        reason = "there is no such file or directory" if isinstance(error, FileNotFoundError) else str(error)
        raise FormatError(f"{path}: {reason}") from error
    if path.is_file():
        header = read_header(path)
        return Checkpoint(path, name or path.name, (header,), header.tensors)
    if not path.is_dir():
        raise FormatError(f"{path}: is neither a file nor a directory")
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise FormatError(f"{path}: two indexes, {indexes[0].name} and {indexes[1].name}: keep the one that is right")
    weight_map = _read_index(indexes[0]) if indexes else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [_only_file(path).name]
    shards = []
    for file in names:
        if not os.path.isfile(path / file):
            named = f"the shard that {indexes[0].name} names" if indexes else "the file of the weights"
            raise FormatError(f"{path / file}: {named} is missing. Download it again.")
        shards.append(read_header(path / file))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor, info in shard.tensors.items():
            if tensor in tensors:
                raise FormatError(f"{info.file}: {tensor} is also in {tensors[tensor].file.name}")
            tensors[tensor] = info
    for tensor, file in (weight_map or {}).items():
        if tensor not in tensors or tensors[tensor].file.name != file:
            raise FormatError(f"{indexes[0]}: {tensor} should be in {file}, but is not")
    config = read_json(path / CONFIG) if os.path.lexists(path / CONFIG) else {}
    if not isinstance(config.get("model_type", ""), str | None):
        raise FormatError(f"{path / CONFIG}: model_type is {str(config['model_type'])[:60]!r}, expected a name")
    return Checkpoint(
        path, name or path.resolve().name, tuple(shards), tensors, config, indexes[0] if indexes else None
    )


def _only_file(path: Path) -> Path:
    """The weights of a directory without an index."""
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.name == "model.safetensors"]
    if len(files) == 1 or named:
        return (named or files)[0]
    if files:
        shown = ", ".join(file.name for file in files[:3])
        raise FormatError(f"{path}: several safetensors files ({shown} …) and no index that says which belong together")
    others = [file.name for file in sorted(path.iterdir()) if file.name.endswith(OTHER_WEIGHTS)]
    hint = f" It holds {others[0]}: convert it to safetensors first." if others else ""
    raise FormatError(f"{path}: no safetensors weights in this directory.{hint}")


def _read_index(file: Path) -> dict[str, str]:
    """The weight map, with every file name checked to be a plain name inside the directory."""
    weight_map = read_json(file, large=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{file}: weight_map must map tensor names to file names")
    for name in set(weight_map.values()):
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise UnsafeFileError(f"{file}: names the shard {name[:80]!r}, which is not a plain file name beside it")
        if not name.endswith(".safetensors") or len(name.encode()) > MAX_NAME_BYTES:
            raise FormatError(f"{file}: names the shard {name[:80]!r}, which is not a safetensors file")
    return weight_map
