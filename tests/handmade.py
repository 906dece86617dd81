"""Small files written by hand, byte for byte where that matters, and the command line run in this process."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jsondocs import undocumented
from safetensors.torch import save_file

from adapterkit.cli.main import main
from adapterkit.cli.output import SCHEMA
from adapterkit.files.staging import unfinished_work

ROWS, COLUMNS, RANK, LAYERS = 48, 32, 4, 2
MODULES = [f"model.layers.{layer}.self_attn.{leaf}" for layer in range(LAYERS) for leaf in ("q_proj", "o_proj")]
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}


def packed(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file, valid or not: the length, `header` as JSON or as raw bytes, the data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write_base(folder: Path, shards: int = 2, rows: int = ROWS) -> Path:
    """Write a Hugging Face directory: one layer per shard, an unmodified norm in each, a config and a tokenizer file."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(rows, COLUMNS, generator=rng).bfloat16() for name in MODULES}
    tensors |= {f"model.layers.{layer}.norm.weight": torch.ones(COLUMNS) for layer in range(LAYERS)}
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        where = {name: names[int(name.split(".")[2]) % shards] for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for i, file in enumerate(names):
        part = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[2]) % shards == i}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def factors(rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Return the tensors of a PEFT adapter for `write_base`."""
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for name in MODULES:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, COLUMNS, generator=rng)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=rng)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, config: Any = CONFIG) -> Path:
    """Write a PEFT adapter directory; `config` is None for no config, or raw bytes."""
    folder.mkdir(parents=True)
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(raw)
    return folder


def write_cache(folder: Path, cache: Path) -> Path:
    """Write a folder in the layout of the Hub cache: links to blobs, named by SHA-256 for weights, else by git's SHA-1."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()
        name = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below `folder` with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Terminal(io.TextIOWrapper):
    """The command's output stream; a test can declare it a terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "utf-8", write_through=True)

    def text(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


@dataclass(frozen=True)
class Outcome:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str

    def message(self, code: int) -> str:
        """Return the one line of an error with exit code `code`, with its hint after a semicolon."""
        error, *hints = lines = self.err.strip().splitlines()
        assert (self.code, len(hints) <= 1) == (code, True), self
        assert error.startswith("error: ") and all(hint.startswith("hint: ") for hint in hints), self
        assert all(map(str.isprintable, lines)), self
        return "; ".join(line.partition(": ")[2] for line in lines)

    def message_of_last(self, code: int) -> str:
        """Return the same if notes precede it."""
        _, found, error = self.err.rpartition("error: ")
        return replace(self, err=found + error).message(code)


def adapterkit(*args: str | Path) -> Outcome:
    """Run `adapterkit ARGS` in this process; the fields of its JSON have to be documented."""
    out, err, code = Terminal(), Terminal(), None
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["adapterkit", *map(str, args)]):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    outcome = Outcome(code, out.text(), err.text())
    if "--json" in args and not {"-V", "--version", "-h", "--help"} & set(args):
        facts = json.loads(outcome.out)
        missing = undocumented([*map(str, args)], facts)
        assert facts["schema"] == SCHEMA and not missing, f"not in docs/json.md: {missing}"
    return outcome


def interrupted_run(out: Path) -> Path:
    """Return the folder of an interrupted training run."""
    folder = unfinished_work(out, "train")
    assert folder is not None
    return folder
