"""Base checkpoints: opening them, and refusing untrusted indexes, links and configs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import adapterkit, packed, write_adapter, write_base
from safetensors.torch import save_file

from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.errors import FormatError, UnsafeFileError

INDEX = "model.safetensors.index.json"


def write(folder: Path, shards: dict[str, list[str]], weight_map: Any = None, config: Any = None) -> Path:
    """Write a directory of shards with these tensors, and an index if a weight map is given."""
    folder.mkdir(exist_ok=True)
    for file, names in shards.items():
        save_file({name: torch.zeros(2) for name in names}, folder / file)
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "a\0.safetensors", "..\\x.safetensors"],
)
def test_an_index_may_not_leave_its_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"x.safetensors": ["a"]}, {"a": name})
    with pytest.raises(UnsafeFileError, match="expected a file name without a path"):
        open_checkpoint(tmp_path)


TWO = {"1.safetensors": ["a"], "2.safetensors": ["b"]}
BROKEN_INDEXES = {
    "a shard is missing": (TWO, {"a": "1.safetensors", "c": "3.safetensors"}, "3.safetensors: the shard .* is missing"),
    "a tensor in two shards": (
        TWO | {"2.safetensors": ["a", "b"]}, {"a": "1.safetensors", "b": "2.safetensors"}, "a is also in 1.safetensors"
    ),
    "a tensor elsewhere": (TWO, {"a": "2.safetensors", "b": "1.safetensors"}, "a should be in 2.safetensors, but is not"),
    "a tensor nowhere": (TWO, {"a": "1.safetensors", "c": "1.safetensors"}, "c should be in 1.safetensors, but is not"),
    "a name too long for a file": (TWO, {"a": "a" * 300 + ".safetensors"}, "expected a .safetensors file name"),
    "another format": (TWO, {"a": "pytorch_model.bin"}, "'pytorch_model.bin', expected a .safetensors file name"),
    "no weight map": (TWO, {}, "weight_map must map"),
    "a list": (TWO, ["a"], "weight_map must map"),
    "numbers": (TWO, {"a": 1}, "weight_map must map"),
}  # fmt: skip


@pytest.mark.parametrize(("shards", "weight_map", "message"), BROKEN_INDEXES.values(), ids=BROKEN_INDEXES)
def test_an_index_that_disagrees_with_its_shards(
    tmp_path: Path, shards: dict[str, list[str]], weight_map: Any, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        open_checkpoint(write(tmp_path, shards, weight_map))


def test_two_indexes(tmp_path: Path) -> None:
    write(tmp_path, TWO, {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match="two indexes, model.safetensors.index.json and other"):
        open_checkpoint(tmp_path)


def test_an_index_that_matches_its_shards(tmp_path: Path) -> None:
    write(tmp_path, TWO | {"left-over.safetensors": ["a"]}, {"a": "1.safetensors", "b": "2.safetensors"})
    base = open_checkpoint(tmp_path)
    assert {name: info.file.name for name, info in base.tensors.items()} == {"a": "1.safetensors", "b": "2.safetensors"}


# --- directories without an index ------------------------------------------------------------------------------------


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no safetensors weights in this directory\.$"):
        open_checkpoint(tmp_path)


def test_only_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="It holds pytorch_model.bin: convert it to safetensors first"):
        open_checkpoint(tmp_path)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="several safetensors files .* no index"):
        open_checkpoint(write(tmp_path, TWO))


def test_model_safetensors_among_others(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"], "adapter_model.safetensors": ["b"]})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_single_file(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]}, config={"model_type": "gpt2"})
    base = open_checkpoint(tmp_path / "x.safetensors")
    assert (list(base.tensors), base.name, base.is_directory) == (["a"], "x.safetensors", False)


@pytest.mark.parametrize("kind", ["missing", "fifo", "device"])
def test_paths_that_are_not_a_base(tmp_path: Path, kind: str) -> None:
    path = Path(os.devnull) if kind == "device" else tmp_path / "base"
    if kind == "fifo":
        os.mkfifo(path)  # opening it would block forever
    with pytest.raises(FormatError, match="no such file|is neither a file nor a directory"):
        open_checkpoint(path)


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--o--n"
    repo.mkdir()
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0a1b"
    write_base(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    base = open_checkpoint(snapshot)
    assert len(base.shards) == 2
    assert base.config == {"model_type": "llama"}
    assert [str(file) for file in base.other_files()[0]] == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["base", "base/model.safetensors", f"base/{INDEX}", "base/config.json"])
def test_a_link_to_itself(tmp_path: Path, name: str) -> None:
    if name != "base":
        write_base(tmp_path / "base", shards=1)
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match="(?i)symlink loop|symbolic links|is missing|is a link"):
        open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_link_to_nothing(tmp_path: Path, name: str) -> None:
    """As in the Hub cache after its blobs were deleted."""
    base = write_base(tmp_path / "base", shards=1 if name == "model.safetensors" else 2)
    (base / name).unlink()
    (base / name).symlink_to("../blobs/gone")
    with pytest.raises(FormatError, match=f"{name}: .* is missing. Download it again"):
        open_checkpoint(base)


# --- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["[]", "null", "1", "{", "\x00"])
def test_a_config_of_the_wrong_type(tmp_path: Path, config: str) -> None:
    with pytest.raises(FormatError, match=r"config.json: (expected a JSON object|is not valid JSON)"):
        open_checkpoint(write(tmp_path, {"model.safetensors": ["a"]}, config=config))


@pytest.mark.parametrize(
    ("declared", "scheme"),
    [(None, None), ({"quant_method": "gptq"}, "gptq"), ({}, "an unnamed scheme"), ("gptq", None)],
)
def test_quantization(tmp_path: Path, declared: Any, scheme: str | None) -> None:
    write(tmp_path, {"model.safetensors": ["a"]}, config={"quantization_config": declared})
    assert open_checkpoint(tmp_path).quantization == scheme


def test_weights_in_other_formats_are_not_copied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", ".gitattributes", "LICENSE"):
        (base / name).touch()
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").touch()
    (base / "onnx" / "notes.txt").touch()
    keep, skipped = open_checkpoint(base).other_files()
    assert [str(file) for file in keep] == ["LICENSE", "tokenizer.json", "onnx/notes.txt"]
    assert [str(file) for file in skipped] == [
        "model.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx"
    ]  # fmt: skip


def test_every_file_that_is_not_copied_is_noted(tmp_path: Path) -> None:
    """Unsupported weights, links and pipes are not copied; the plan of a merge notes each."""
    base = write_base(tmp_path / "base")
    weights = [
        "consolidated.safetensors", "model-00009-of-00002.safetensors", "model.fp16.SAFETENSORS", "__0_0.distcp",
        "model.safetensors.index.fp16.json", "pytorch_model.bin.index.json", "inner/model.safetensors",
    ]  # fmt: skip
    (base / "inner").mkdir()
    for name in weights:
        (base / name).touch()
    os.mkfifo(base / "pipe")
    for name, to in {"notes.dat": "/proc/self/environ", "up": "/", "inner/x": "../tokenizer.json"}.items():
        (base / name).symlink_to(to)
    found = open_checkpoint(base)
    copied, left_out = found.other_files()
    assert [str(file) for file in copied] == ["tokenizer.json"]
    reasons = dict.fromkeys(weights, "it belongs to the unmerged model")
    reasons |= {"pipe": "it is a named pipe"} | dict.fromkeys(["notes.dat", "up", "inner/x"], "it is a link")
    assert {str(file): why for file, why in left_out.items()} == reasons
    told = [f"{name}: not copied: {why}" for name, why in reasons.items()]
    assert sorted(found.notes()) == sorted(told)
    dry = adapterkit("merge", base, write_adapter(tmp_path / "a"), "-o", tmp_path / "out", "--dry-run", "--json")
    assert sorted(json.loads(dry.out)["notes"]) == sorted(told)
    assert all(f"note: {one}" in dry.err for one in told)


def test_weights_through_a_link_are_read_with_a_note(tmp_path: Path) -> None:
    """They are parsed as safetensors, so that no other file of the user gets into the output; links are common."""
    base = write_base(tmp_path / "base", shards=1)
    (base / "model.safetensors").rename(tmp_path / "elsewhere")
    (base / "model.safetensors").symlink_to("../elsewhere")
    found = open_checkpoint(base)
    assert len(found.tensors) == 6
    assert found.notes() == ["model.safetensors: is a link; the weights were read from its target"]


@pytest.mark.parametrize("named", [["model.safetensors", "2.safetensors"], ["2.safetensors"]])
def test_an_index_beside_the_file_that_transformers_loads(tmp_path: Path, named: list[str]) -> None:
    shards = {"model.safetensors": ["a"], "2.safetensors": ["b"]}
    write(tmp_path, shards, {tensor: file for file in named for tensor in shards[file]})
    with pytest.raises(
        FormatError, match="has model.safetensors, which transformers loads, and model.safetensors.index"
    ):
        open_checkpoint(tmp_path)


def test_an_index_of_the_file_that_transformers_loads(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"], "2.safetensors": ["b"]}, {"a": "model.safetensors"})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_config_with_the_name_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path, TWO, {"a": "1.safetensors", "b": "2.safetensors"}, {"transformers_weights": INDEX})
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    (tmp_path / "config.json").write_text('{"transformers_weights": "adapter_model.bin"}')
    with pytest.raises(FormatError, match=f"transformers_weights is 'adapter_model.bin', but .* has {INDEX}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_a_pipe_in_a_base(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", shards=2 if name == INDEX else 1)
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(FormatError, match=f"{name}: cannot be read: a named pipe, expected a regular file"):
        open_checkpoint(base)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(packed({"a": None}))
    with pytest.raises(FormatError, match=r"model.safetensors: the header entry of 'a' is malformed"):
        open_checkpoint(tmp_path)
