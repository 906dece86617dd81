"""Fuzzed files: changed copies of valid files are read or refused, within limits of time and memory.

With `ADAPTERKIT_FUZZ=N` in the environment each reader gets N inputs, instead of a few hundred.

"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from io import BytesIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from handmade import COLUMNS, CONFIG, MODULES, ROWS, contents, factors, packed, write_adapter, write_base
from hostile import steering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import save_tiny_model

import adapterkit
from adapterkit.adapter.formats import load
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.algebra.residual import Residual
from adapterkit.api.options.merges import MergeOptions
from adapterkit.base import quant
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.models.config_check import check_described
from adapterkit.base.quant.schemes.bnb4.quantizer import Spec4bit
from adapterkit.base.quant.schemes.bnb8 import Spec8bit
from adapterkit.cli.recipe import read_recipe as read_options
from adapterkit.errors import AdapterkitError, FormatError
from adapterkit.files.safetensors import TORCH_NAMES, read_header, tensor_bytes
from adapterkit.files.staging import RECEIPT
from adapterkit.merging.blocks import residual_codec
from adapterkit.merging.plan.planner import make_plan
from adapterkit.merging.receipts.receipt import find_receipt
from adapterkit.options import parameters
from adapterkit.train.recipe import Recipe, read_recipe
from adapterkit.train.runs import checkpoints
from adapterkit.train.runs.checkpoints import Log, Progress, State
from adapterkit.train.runs.fingerprint import Origin

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

EXAMPLES = int(os.environ.get("ADAPTERKIT_FUZZ", 350))
SECONDS, BYTES = 10, 64 << 20  # limits for an input of a few KB

fuzzed = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

# --- JSON, and what is changed in it ---------------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """A JSON object that can have duplicate keys."""


Files = dict[str, Pairs]  # by name


class Raw(str):
    """JSON as it will be in the file, valid or not."""


def parsed(raw: str | bytes) -> Any:
    return json.loads(raw, object_pairs_hook=Pairs)


def text(node: Any) -> str:
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{text(value)}" for name, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(text, node)) + "]"
    return node if isinstance(node, Raw) else json.dumps(node)


DTYPES = ['"F4"', '"F16"', '"F32"', '"F64"', '"BF16"', '"U8"', '"I8"', '"F8_E4M3"']
ODD: dict[type, list[str]] = {
    int: ["0", "1", "-1", "2", "3", "4", "8", "16", "32", "63", "64", "-0.0", "0.5", "1e308", "1e999", "-1e999", "NaN",
          "9" * 400, "9" * 4000, *(str(2**power) for power in (20, 31, 32, 40, 53, 62, 63, 64))],
    str: ['""', *DTYPES, '"gpt2"', '"LORA"', '"IA3"', '"lora_only"',
          '"../x.safetensors"', '"/x.safetensors"', '"x"', f'"{"a" * 300}.safetensors"', '"\\u0000.safetensors"',
          '"\\ud800"', '"\\n"', '"weight"', '"a{9999999999}"', f'"({"|" * 460})*x"', '"(a|a)*b"', r'"\u001b]0;t\u0007\u202e[b]"', '"("', '"(?P<x>.)"', '"[[a]"', '"pissa"', '"fp4"'],
    list: ["[]", "[0]", "[1]", "[4]", "[0,0]", "[1,1]", "[4,32]", "[0,24]", "[24,48]", "[32,48]", "[0,32]",
           f"[{2**62},0]", f"[0,{2**62}]", "[2,2,2]", '[""]'],
    bool: ["true", "false", "null", "{}", '{"":0}', '{".*":4}'],
}  # fmt: skip
ANY = [value for values in ODD.values() for value in values]
ENDS = [
    "", "_scale_inv", ".SCB", ".absmax", ".nested_absmax", ".quant_map", ".quant_state.bitsandbytes__nf4",
    ".weight_format", ".lora_A.weight", ".lora_B.weight", ".lora_A.other.weight", ".lora_B.bias", ".lora_embedding_A",
    ".lora_embedding_B", ".lora_magnitude_vector", ".base_layer.weight", ".modules_to_save.default.weight",
    ".trainable_tokens_delta", ".weight", ".bias", "\n", "a" * 1000, ".gains", ".numbers",
]  # fmt: skip
NUMBERS = ["0", "00", "1", "2", "7", "16", "31", "47", "48", "49", "9" * 20]


def other_name(name: str, what: int) -> str:
    """Return the name with another suffix or another number in it."""
    numbers = [match.span() for match in re.finditer("[0-9]+", name)]
    if what % 3 == 2 and numbers:
        start, stop = numbers[what // 3 % len(numbers)]
        return name[:start] + NUMBERS[what // 9 % len(NUMBERS)] + name[stop:]
    return (name.rpartition(".")[0] if what % 3 else name) + ENDS[what // 3 % len(ENDS)]


class Place(NamedTuple):
    """The position of a value: its list or object, and the index or key."""

    node: list[Any]
    index: int

    @property
    def name(self) -> str:
        return self.node[self.index][0] if isinstance(self.node, Pairs) else "name"

    @property
    def value(self) -> Any:
        return self.node[self.index][1] if isinstance(self.node, Pairs) else self.node[self.index]

    def put(self, name: str, value: Any) -> None:
        self.node[self.index] = (name, value) if isinstance(self.node, Pairs) else value


def places(node: list[Any]) -> Iterator[Place]:
    for i in range(len(node)):
        yield (place := Place(node, i))
        if isinstance(place.value, list):
            yield from places(place.value)


Edit = tuple[str, int, int, int]
HOW = ["like"] * 6 + ["other"] * 4 + ["renamed", "copied", "traded", "odd", "deleted"] * 2 + ["nested", "twice"]
# The kind of change, the file, the position, and the new value.
edits = st.lists(
    st.tuples(st.sampled_from(HOW), st.integers(0, 99), st.integers(0, 9999), st.integers(0, 9999)), max_size=4
)


def edit(files: Files, changes: Iterable[Edit]) -> Files:
    """Change the JSON of some files."""
    files = deepcopy(files)
    for how, which, where, what in changes:
        inside = list(places(list(files.values())[which % len(files)]))
        if not inside:
            continue
        place = inside[where % len(inside)]
        name, value = place.name, place.value
        if how == "like":
            known = DTYPES if value in map(json.loads, DTYPES) else ODD.get(type(value), ANY)
            place.put(name, Raw(known[what % len(known)]))
        elif how == "odd":
            place.put(name, Raw(ANY[what % len(ANY)]))
        elif how == "nested":
            before, after = (("[", "]"), ('{"":', "}"))[what % 2]
            depth = what % (90, 1200)[what % 3 // 2]
            place.put(name, Raw(before * depth + "0" + after * depth))
        elif how == "other":
            alike = [other.value for other in inside if type(other.value) is type(value)]
            place.put(name, deepcopy(alike[what % len(alike)]))
        elif how == "renamed":
            place.put(other_name(name, what), value)
        elif how == "traded":
            other = Place(place.node, what % len(place.node))
            place.put(other.name, value)
            other.put(name, other.value)
        elif how == "copied":
            place.node.insert(place.index, deepcopy(place.node[place.index]))
            place.put(other_name(name, what), value)
        elif how == "twice":
            place.node.insert(place.index, deepcopy(place.node[place.index]))
        elif how == "deleted":
            del place.node[place.index]
    return files


# --- bytes, and what is changed in them ------------------------------------------------------------------------------

Cut = tuple[int, int, int, bytes | int]
# The file, the position, the number of bytes to remove, and the replacement: these bytes, or those at a position.
a_cut = st.tuples(
    st.integers(0, 99),
    st.integers(0, 1 << 16),
    st.sampled_from((0, 0, 1, 1, 2, 8, 40, 1 << 16)),
    st.one_of(st.binary(max_size=8), st.integers(0, 1 << 16)),
)
cuts = st.lists(a_cut, min_size=1, max_size=3)
seldom = st.sampled_from([True, False, False, False]).flatmap(lambda some: cuts if some else st.just([]))


def cut(raw: bytes, changes: Iterable[Cut]) -> bytes:
    """Replace some bytes of `raw`, by others or by bytes from elsewhere in it."""
    for _, at, length, new in changes:
        at %= len(raw) + 1
        if isinstance(new, int):
            new %= len(raw) + 1
            new = raw[new : new + 40]
        raw = raw[:at] + new + raw[at + length :]
    return raw


def parts_of(code: bytes) -> list[bytes]:
    """Return the counts and the planes of the output of `coding`."""
    parts, at = [code[:9]], 9
    while at < len(code):
        packed, size = struct.unpack_from("<II", code, at)
        at += 8 + packed
        size = min(size, 1 << 16)
        parts.append(zstd.ZstdDecompressor().decompress(code[at - packed : at], size) if packed else bytes(size))
    return parts


def cut_code(code: bytes, changes: Iterable[Cut]) -> bytes:
    """Change the counts or a plane in the output of `coding`, at the same length, or any bytes anywhere."""
    for change in changes:
        parts = []
        with suppress(struct.error, zstd.ZstdError):
            parts = parts_of(code)
        which = change[0] % (len(parts) + 1) - 1
        if which < 0:
            code = cut(code, [change])
            continue
        size = len(parts[which])
        parts[which] = cut(parts[which], [change])[:size].ljust(size, b"\0")
        planes = [(zstd.compress(plane), len(plane)) for plane in parts[1:]]
        code = parts[0] + b"".join(struct.pack("<II", len(plane), size) + plane for plane, size in planes)
    return code


def encoded(table: Pairs, data: Sequence[bytes] = ()) -> bytes:
    """Return a safetensors file of these tensors: zeros, the `data` of that number, or a tensor's JSON, its `state`.

    Without a shape a tensor has the size of its bytes; otherwise they are truncated or padded to it.

    """
    header, body = Pairs(), b""
    for name, entry in table:
        with suppress(Exception):  # invalid values are not changed
            fields = {field: json.loads(text(value)) for field, value in entry}
            new = data[fields["data"] % len(data)] if "data" in fields else b""
            if "state" in fields and (not new or json.loads(new) != fields["state"]):
                new = text(dict(entry)["state"]).encode()
            entry = Pairs(pair for pair in entry if pair[0] not in ("data", "state"))
            if "shape" in fields:
                size = tensor_bytes(fields["dtype"], tuple(fields["shape"]))
                new = new[:size].ljust(size, b" " if "state" in fields else b"\0") if size < 1 << 16 else b""
            else:
                entry += [("dtype", "U8"), ("shape", [len(new)])]
            entry.append(("data_offsets", [len(body), len(body) + len(new)]))
            body += new
        header.append((name, entry))
    return packed(text(header).encode(), body)


def write(folder: Path, files: Files, changes: list[Cut]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (name, content) in enumerate(files.items()):
        raw = encoded(content) if name.endswith(".safetensors") else text(content).encode()
        (folder / name).write_bytes(cut(raw, (change for change in changes if change[0] % len(files) == number)))
    return folder


# --- valid files -----------------------------------------------------------------------------------------------------


def table(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Pairs:
    return Pairs((name, Pairs([("dtype", dtype), ("shape", list(shape))])) for name, dtype, shape in tensors)


def described(folder: Path) -> Files:
    """Return the JSON of a directory's files, and of its tensors' name, dtype and shape."""
    files: Files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            files[file.name] = table((t.name, t.dtype, t.shape) for t in read_header(file).tensors.values())
        elif file.name != "tokenizer.json":
            files[file.name] = parsed(file.read_text())
    return files


def quantized(kind: str) -> Files:
    """Return a base of two matrices and a vector, stored quantized."""
    tensors = table([("model.norm.weight", "BF16", (COLUMNS,))])
    for name in (f"{module}.weight" for module in MODULES[:2]):
        if kind == "fp8":
            tensors += table([(name, "F8_E4M3", (ROWS, COLUMNS)), (f"{name}_scale_inv", "F32", (2, 1))])
        elif kind == "int8":
            tensors += table(Spec8bit((ROWS, COLUMNS), "BF16").layout(name))
        else:
            packing = Spec4bit((ROWS, COLUMNS), "BF16", kind, 64, nested=kind == "nf4")
            *parts, (state, _, _) = packing.layout(name)
            tensors += table(parts)
            tensors.append((state, Pairs([("state", parsed(packing.state(0.0)))])))
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": kind, "weight_block_size": [32, 32]}}
    return {"model.safetensors": tensors, "config.json": parsed(json.dumps(config))}


# A base with tied, fused and stacked tensors, and an adapter for all of them.
FUSED_BASE: Files = {
    "model.safetensors": table((f"model.{name}", "BF16", shape) for name, shape in {
        "embed_tokens.weight": (64, 32), "norm.weight": (32,), "conv.weight": (16, 8, 3, 3),
        "layers.0.self_attn.qkv_proj.weight": (64, 32), "layers.0.self_attn.o_proj.weight": (32, 32),
        "layers.0.self_attn.o_proj.bias": (32,), "layers.0.mlp.experts.gate_up_proj": (2, 24, 32),
        **{f"layers.1.mlp.experts.{e}.{part}.weight": (12, 32) for e in range(2) for part in ("w1", "w3")},
    }.items()),
    "config.json": parsed(json.dumps({
        "model_type": "llama", "tie_word_embeddings": True, "hidden_size": 32, "num_attention_heads": 4,
        "text_config": {"num_key_value_heads": 2, "head_dim": 8},
    })),
}  # fmt: skip
FUSED_ADAPTER: Files = {
    "adapter_model.safetensors": table((f"base_model.model.model.{name}", "F32", shape) for name, shape in {
        "layers.0.self_attn.q_proj.lora_A.weight": (2, 32), "layers.0.self_attn.q_proj.lora_B.weight": (32, 2),
        "layers.0.self_attn.o_proj.lora_A.weight": (2, 32), "layers.0.self_attn.o_proj.lora_B.weight": (32, 2),
        "layers.0.self_attn.o_proj.lora_B.bias": (32,), "norm.weight": (32,),
        "layers.0.mlp.experts.lora_A.weight": (4, 32), "layers.0.mlp.experts.lora_B.weight": (24, 4),
        "layers.1.mlp.experts.lora_A.weight": (4, 32), "layers.1.mlp.experts.lora_B.weight": (24, 4),
        "conv.lora_A.weight": (2, 8, 3, 3), "conv.lora_B.weight": (16, 2, 1, 1),
        "embed_tokens.token_adapter.trainable_tokens_delta": (2, 32),
    }.items()),
    "adapter_config.json": parsed(json.dumps({
        "r": 2, "lora_alpha": 6, "target_parameters": ["mlp.experts.gate_up_proj"], "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed_tokens": [1, 5]}, "rank_pattern": {"conv": 2}, "alpha_pattern": {"k.*": 3},
        "use_rslora": True, "use_dora": False, "bias": "none", "enable_lora": None, "layer_replication": None,
    })),
}  # fmt: skip


@cache
def bases() -> list[Files]:
    """Return plain, quantized and fused bases: the plain adapters match all but the last."""
    with TemporaryDirectory() as folder:
        plain = described(write_base(Path(folder, "base")))
    return [plain, *map(quantized, ("nf4", "fp4", "int8", "fp8")), FUSED_BASE]


@cache
def model() -> Files:
    """Return a model that transformers loads: its config and its weights."""
    with TemporaryDirectory() as folder:
        files = described(save_tiny_model(Path(folder)))
    return {name: files[name] for name in ("config.json", "model.safetensors")}


def tensors() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in factors().items() if any(module in name for module in MODULES[:2])}


@cache
def adapters() -> list[Files]:
    """Return LoRA and DoRA adapters, and one for the last base."""
    dora = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(ROWS) for name in MODULES[:2]}
    with TemporaryDirectory() as folder:
        plain = write_adapter(Path(folder, "plain"), tensors())
        other = write_adapter(Path(folder, "dora"), tensors() | dora, CONFIG | {"use_dora": True})
        return [described(plain), described(other), FUSED_ADAPTER]


@cache
def pickled(zipped: bool) -> bytes:
    file = BytesIO()
    torch.save(tensors(), file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@cache
def codes() -> list[tuple[Callable[..., None], bytes, list[torch.Tensor], torch.Tensor]]:
    """Return for each dtype a decoder, a code, its arguments, and the result."""
    torch.manual_seed(0)
    found: list[tuple[Callable[..., None], bytes, list[torch.Tensor], torch.Tensor]] = []
    at, reach = torch.arange(3, 90, 7), torch.tensor([1, 3, 9, 30, 60, 99, 2**14] * 2)[:13]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        before, after = torch.randn(2, 90, dtype=torch.float64).to(dtype)
        near = before.clone()
        near.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[at] += 1
        found.append(
            (residual_codec.correct, residual_codec.encode(Residual(at, before[at], reach.short())), [near], before)
        )
        found.append(
            (residual_codec.restore_difference, residual_codec.encode_difference(before, after), [after, near], before)
        )
    wanted = torch.randint(0, 256, (90,), dtype=torch.uint8)
    near = wanted.index_fill(0, at, 7)
    return [*found, (residual_codec.correct_bytes, residual_codec.encode_bytes(wanted, near), [near], wanted)]


class Made(NamedTuple):
    """A merge, in a folder with its adapter.

    `files` are the parts to change, by name: the JSON of the receipt and of files in `before`, and as JSON the tensors of
    sidecars, of merged files and of the `base`'s; `data` are their bytes, the first `recorded` those of the sidecars.

    """

    name: str
    files: Files
    data: list[bytes]
    recorded: int
    exact: dict[str, bytes]  # every file as it is
    base: dict[str, bytes]
    whole: dict[str, bytes]  # every file of the base, by the path that it has in the folder of its copy `out`

    def write(self, folder: Path, changes: list[Edit], within: list[Cut], bytes_changed: list[Cut]) -> None:
        """Write it with the JSON changed, what is recorded cut from within, and files cut."""
        files, data = edit(self.files, changes), list(self.data)
        for change in within:
            data[change[1] % self.recorded] = cut_code(data[change[1] % self.recorded], [change])
        sidecars = [name for name in files if name.endswith(".residuals")]
        receipt = min((name for name in files if name.endswith(RECEIPT)), key=len)
        for number, (name, sidecar) in enumerate(zip(self.base, sidecars, strict=True)):
            if files[name] != self.files[name]:  # the header in the sidecar, and the size in the receipt go with it
                raw = encoded(files[name])
                data[dict(dict(self.files[sidecar])["header"])["data"]] = zlib.compress(raw[: header_bytes(raw)])
                sizes = [place for place in places(files[receipt]) if place.name == "size"]
                for size in sizes[number : number + 1]:
                    size.put("size", len(raw) if size.value == len(self.base[name]) else size.value)
        for number, (name, raw) in enumerate(self.exact.items()):
            if name in sidecars or files.get(name) != self.files.get(name):
                raw = text(files[name]).encode() if name.endswith(".json") else encoded(files[name], data)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(cut(raw, (one for one in bytes_changed if one[0] % len(self.exact) == number)))


def header_bytes(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def stored(file: Path, data: list[bytes]) -> Pairs:
    """Return the tensors of a file; their bytes go to `data`."""
    found = Pairs()
    for info in sorted(read_header(file).tensors.values(), key=lambda info: (info.start, info.stop)):
        raw = bytes(info.read_bytes())
        entry = Pairs([("dtype", info.dtype), ("shape", list(info.shape)), ("data", len(data))])
        if file.suffix == ".residuals" and info.dtype == "U8" and not info.name.startswith("kept"):
            del entry[:2]  # as long as what it holds
        if raw.startswith(b'{"'):
            entry.append(("state", parsed(raw)))
        found.append((info.name, entry))
        data.append(raw)
    return found


def made(base: Path) -> Made:
    """Return the merge of `base` and the adapter beside it."""
    folder, files, data, exact = base.parent, Files(), list[bytes](), dict[str, bytes]()
    adapterkit.merge(base, [folder / "adapter"], base.with_stem("merged"), threads=1)
    for file in sorted(folder.rglob("*"), key=lambda file: (file.suffix != ".residuals", file)):
        name, in_before = str(file.relative_to(folder)), "before" in file.parts
        if file.is_file() and not name.startswith("base"):
            exact[name] = file.read_bytes()
            if file.suffix == ".json" and (in_before or file.name == RECEIPT):
                files[name] = parsed(exact[name])
                for part in (part for place in places(files[name]) if place.name == "parts" for part in place.value):
                    part += [(field, None) for field in ("rows", "of", "expert") if field not in dict(part)]
            elif name.startswith("merged") and file.suffix in (".residuals", ".safetensors") and not in_before:
                files[name] = stored(file, data)
    recorded = sum(len(content) for name, content in files.items() if name.endswith(".residuals"))
    shards = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    for file in shards:
        files[file.name] = Pairs((name, Pairs(entry[:2])) for name, entry in stored(file, []))
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0].startswith("base")
    ]
    whole = {str(path.relative_to(folder)).replace("base", "out", 1): path.read_bytes() for path in paths}
    weights = {file.name: file.read_bytes() for file in shards}
    return Made(f"merged{base.suffix}", files, data, recorded, exact, weights, whole)


def randomized(folder: Path, files: Files) -> Path:
    """Return files with these tensors, filled with random numbers, and magnitudes as large as rows."""
    folder.mkdir()
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(text(content))
            continue
        tensors = {}
        for tensor, entry in content:
            dtype, shape = entry[0][1], entry[1][1]
            values = torch.randn(shape) + (6 if "magnitude" in tensor else 0)
            tensors[tensor] = values.to(getattr(torch, TORCH_NAMES[dtype]))
        save_file(tensors, folder / name)
    return folder


MERGES = ["shards", "file", "dora", "transposed", "nf4", "int8", "fp8", "fused"]


@cache
def merge_of(kind: str) -> Made:
    """Yield merges: plain in two shards, plain from a single-file merge, DoRA by row or column, quantized bases, and all else."""
    torch.manual_seed(0)
    which = {"dora": 1, "transposed": 1, "fused": 2}.get(kind, 0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = folder / "base", randomized(folder / "adapter", adapters()[which])
        if kind == "file":
            [shard, *_] = (content for name, content in bases()[0].items() if name.endswith("1-of-00002.safetensors"))
            first, base = randomized(folder / "first", {"a.safetensors": shard}), base.with_suffix(".safetensors")
            adapterkit.merge(first / "a.safetensors", [adapter], base, threads=1)
            shutil.rmtree(first)
        elif kind == "transposed":
            tensors = table((f"{name}.weight", "BF16", (COLUMNS, ROWS)) for name in MODULES[:2])
            randomized(base, {"model.safetensors": tensors, "config.json": Pairs()})
        elif kind in ("nf4", "int8"):
            plain = randomized(folder / "plain", bases()[0])
            adapterkit.quantize(plain, base, to=kind, nested=kind == "nf4", threads=1)
            shutil.rmtree(plain)
        else:
            randomized(base, bases()[{"fp8": 4, "fused": 5}.get(kind, 0)])
        return made(base)


# --- what must hold --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the files of an example; files beside it must not change."""
    inside = tmp_path / "outside" / "inside"
    inside.mkdir(parents=True)
    before = contents(tmp_path)
    monkeypatch.chdir(inside)
    yield inside
    shutil.rmtree(inside)
    inside.mkdir()
    assert contents(tmp_path) == before


def hangs(*_: object) -> None:
    pytest.fail(f"took more than {SECONDS} seconds")


@contextmanager
def refusing(changed: object, kind: type[Exception] = AdapterkitError) -> Iterator[None]:
    """Allow only our errors of that kind, printable, and none for unchanged files; within limits of time and memory."""
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
    except kind as error:
        assert changed, error
        assert not steering(str(error))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak < BYTES


@fuzzed
@given(st.integers(0, 2), edits, seldom)
def test_headers(folder: Path, which: int, changes: list[Edit], bytes_changed: list[Cut]) -> None:
    raw = encoded(adapters()[which]["adapter_model.safetensors"])
    length = int.from_bytes(raw[:8], "little")
    header, data = parsed(raw[8 : 8 + length]), raw[8 + length :]
    file = folder / "t.safetensors"
    file.write_bytes(cut(packed(text(edit({"": header}, changes)[""]).encode(), data), bytes_changed))
    with refusing(changes or bytes_changed):
        found = read_header(file)
        assert found.nbytes + sum(info.nbytes for info in found.tensors.values()) == file.stat().st_size


@fuzzed
@given(st.integers(0, 5), edits, seldom)
def test_checkpoints(folder: Path, which: int, changes: list[Edit], bytes_changed: list[Cut]) -> None:
    path = write(folder / "base", edit(bases()[which], changes), bytes_changed)
    with refusing(changes or bytes_changed):
        base = open_checkpoint(path)
        assert all(info.file.parent == path for info in base.tensors.values())
        for weight in quant.weights(base.tensors, base.config).values():
            if isinstance(weight, quant.QuantizedWeight):
                weight.open(prod(weight.shape[1:]))(0, weight.shape[0])


@fuzzed
@given(st.integers(0, 2), edits, seldom)
def test_adapters(folder: Path, which: int, changes: list[Edit], bytes_changed: list[Cut]) -> None:
    path = write(folder / "adapter", edit(adapters()[which], changes), bytes_changed)
    with refusing(changes or bytes_changed):
        adapter = load(path)
        assert changes or bytes_changed or not adapter.problems


@fuzzed
@given(st.booleans(), cuts)
def test_pickles(folder: Path, zipped: bool, bytes_changed: list[Cut]) -> None:
    (folder / "adapter_model.bin").write_bytes(cut(pickled(zipped), bytes_changed))
    with refusing(bytes_changed):
        load(folder, alpha=6)


@fuzzed
@given(
    st.sampled_from([(base, adapter) for base in range(5) for adapter in range(2)] + [(5, 2)] * 5),
    edits,
    st.sampled_from([{}, {}, {"dtype": "fp16"}, *({"quantize": kind} for kind in (*quant.writable_kinds(), "same"))]),
    st.sampled_from([{}, {"allow_partial": True}, {"allow_partial": True}, {"rename": ("self_attn", "attn")}]),
)
def test_plans(
    folder: Path, which: tuple[int, int], changes: list[Edit], form: dict[str, Any], how: dict[str, Any]
) -> None:
    base, adapter = bases()[which[0]], adapters()[which[1]]
    files = edit(base | adapter, changes)
    write(folder / "base", {name: files[name] for name in base}, [])
    write(folder / "adapter", {name: files[name] for name in adapter}, [])
    with refusing(changes or form or how):
        one = WeightedAdapter(load(folder / "adapter"))
        plan = make_plan(open_checkpoint(folder / "base"), [one], folder / "out", **form, **how)
        for file in plan.files:  # what would be written can be read
            with open(folder / "out.safetensors", "wb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)
            assert tuple(read_header(folder / "out.safetensors").tensors) == file.tensors


@fuzzed
@given(
    st.integers(0, 8),
    st.sampled_from([0] * 8 + [1, 2]),
    st.sampled_from([90] * 8 + [0, 1, 89, 91]),
    st.lists(a_cut, max_size=3),
)
def test_codes(which: int, other: int, count: int, changes: list[Cut]) -> None:
    read, _, given, expected = codes()[which]
    code = cut_code(codes()[(which + other) % 9][1], changes)
    around = [torch.cat([tensor.new_ones(90), tensor, tensor.new_ones(90)]) for tensor in given]
    before, inside = around[-1].clone(), [tensor[90 : 90 + count] for tensor in around]
    with refusing(changes or other or count != 90, FormatError):
        read(code, *inside, "here")
        assert changes or other or torch.equal(inside[-1][:90], expected[:count])
    assert torch.equal(around[-1][:90], before[:90]) and torch.equal(around[-1][90 + count :], before[90 + count :])


@settings(fuzzed, max_examples=int(os.environ.get("ADAPTERKIT_FUZZ", 30)))
@given(edits)
def test_configs(folder: Path, changes: list[Edit]) -> None:
    """By transformers: whether a config matches its weights."""
    files = model()
    write(folder / "base", files | edit({"config.json": files["config.json"]}, changes), [])
    with refusing(changes):
        check_described(open_checkpoint(folder / "base"))


@settings(fuzzed, max_examples=int(os.environ.get("ADAPTERKIT_FUZZ", 15)))
@given(edits)
def test_recipes(folder: Path, changes: list[Edit]) -> None:
    """JSON is YAML."""
    recipe = parsed(json.dumps(asdict(Recipe(base="b", data="d", rank_pattern={"q": 2}, sample=("a", "b")))))
    (folder / "recipe.yaml").write_text(text(edit({"": recipe}, changes)[""]))
    with refusing(changes):
        read_recipe(folder / "recipe.yaml", {})
    merge = parsed(json.dumps({"base": "b", "adapters": ["a:0.7", {"b": 1}], "weights": {"a:q": 0.3}, "scale": 2}))
    (folder / "merge.yaml").write_text(text(edit({"": merge}, changes)[""]))
    with refusing(changes):
        read_options(folder / "merge.yaml", {one.name: one for one in parameters(MergeOptions)})


@settings(fuzzed, max_examples=int(os.environ.get("ADAPTERKIT_FUZZ", 60)))
@given(edits, seldom)
def test_training_checkpoints(folder: Path, changes: list[Edit], bytes_changed: list[Cut]) -> None:
    """Changed, with checksums updated by the attacker."""
    layout = {"A": torch.zeros(2, 8), "A.first": torch.zeros(2, 8, dtype=torch.bfloat16), "step": torch.zeros(())}
    names = {tensor: name for name, tensor in TORCH_NAMES.items()}
    tensors = table((name, names[str(one.dtype)[6:]], tuple(one.shape)) for name, one in layout.items())
    origin = Origin({"rank": 8}, "0" * 64, None, {"config.json": "0" * 64}, {})
    state = State(Progress(3, 90, 1.5, 0.5, 2, 0.4), origin, Log(12, "0" * 64))
    files = {checkpoints.TENSORS: tensors, checkpoints.STATE: parsed(json.dumps(asdict(state)))}
    path = write(folder / "step-000003", edit(files, changes), bytes_changed)
    sums = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (path / checkpoints.SUMS).write_text("".join(sums))
    with refusing(changes or bytes_changed):
        checkpoints.check(path, checkpoints.read(path), 9, layout)
        found = checkpoints.load(path)
        assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
            name: (one.dtype, one.shape) for name, one in layout.items()
        }


@settings(fuzzed, max_examples=int(os.environ.get("ADAPTERKIT_FUZZ", 150)))
@given(st.sampled_from(MERGES), edits, st.lists(a_cut, max_size=2), seldom)
def test_receipts(folder: Path, kind: str, changes: list[Edit], within: list[Cut], bytes_changed: list[Cut]) -> None:
    merge, result = merge_of(kind), None
    for left in folder.iterdir():
        shutil.rmtree(left)
    merge.write(folder / kind, changes, within, bytes_changed)
    source = folder / kind / merge.name
    out, before = source.with_stem("out"), contents(folder)
    with refusing(changes or within or bytes_changed):
        result = adapterkit.unmerge(source, out, threads=1)
    if result is not None:
        for name, raw in merge.base.items():
            assert (out / name if out.is_dir() else out).read_bytes() == raw
        if (
            json.loads((find_receipt(source) / RECEIPT).read_bytes())["adapterkit_receipt"] != 1
        ):  # else not all is hashed
            found = [
                path for path in source.parent.rglob("*") if path.relative_to(source.parent).parts[0].startswith("out")
            ]
            whole = {str(path.relative_to(source.parent)): path.read_bytes() for path in found if path.is_file()}
            assert whole == merge.whole
        for path in (out, out.with_name(f"{out.name}.receipt")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    assert contents(folder) == before
