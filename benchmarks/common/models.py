"""Benchmark inputs with the shapes of real models, written straight to disk without building a model."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.paths import CACHE

SEED = 0
WEIGHT_STD = 0.02
DELTA_RATIO = 0.015  # ‖Δ‖/‖W‖, typical for a short fine-tuning
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}

Shape = tuple[int, ...]
Fill = Callable[[str, Shape], np.ndarray]


@dataclass(frozen=True)
class Llama:
    """The sizes that define the shapes of a Llama model's weights, without the number of layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def linears(self) -> dict[str, Shape]:
        """Return the shape, (out, in), of each linear layer of a decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def weights(self, layers: int) -> dict[str, Shape]:
        """Return the shape of every weight of the model, in file order."""
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            shapes |= {f"{prefix}{name}.weight": shape for name, shape in self.linears().items()}
            shapes[f"{prefix}input_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes


TINYLLAMA = Llama(hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=32000)
SMOLLM2 = Llama(hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152)
LLAMA2_7B = Llama(hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000)
LLAMA3_8B = Llama(hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)


def cached_llama(layers: int = 22, shards: int = 5, shape: Llama = TINYLLAMA) -> Path:
    """Return the directory of a Llama-shaped bf16 base model, writing it if needed."""
    return _cached(f"llama-h{shape.hidden}-l{layers}-s{shards}", write_llama, layers, shards, shape)


def cached_nf4(layers: int = 22, shards: int = 5) -> Path:
    """Return the same base in NF4 with nested scales, quantizing it if needed."""
    base = cached_llama(layers, shards)
    path = base.with_name(f"{base.name}-nf4")
    if not path.is_dir():
        import adapterkit

        adapterkit.quantize(base, path, to="nf4", nested=True)
    return path


def cached_adapter(
    layers: int = 22, rank: int = 16, shape: Llama = TINYLLAMA, dtype: str = "F32", number: int = 1
) -> Path:
    """Return the directory of the `number`-th PEFT LoRA adapter for a shape, writing it if needed."""
    name = f"adapter-h{shape.hidden}-l{layers}-r{rank}-{dtype.lower()}{f'-{number}' if number > 1 else ''}"
    return _cached(name, write_adapter, layers, rank, shape, dtype, number)


def write_llama(directory: Path, layers: int = 22, shards: int = 5, shape: Llama = TINYLLAMA) -> None:
    """Write a Llama-shaped bf16 model as a sharded Hugging Face directory."""
    rng = np.random.default_rng(SEED)

    def fill(name: str, sizes: Shape) -> np.ndarray:
        return np.ones(sizes, np.float32) if name.endswith("norm.weight") else _normal(rng, sizes, WEIGHT_STD)

    shapes = shape.weights(layers)
    total_size = sum(prod(shape) for shape in shapes.values()) * ITEM_SIZE["BF16"]
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_split(shapes, shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_safetensors(directory / file, part, "BF16", fill)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", _llama_config(shape, layers))


def write_adapter(
    directory: Path,
    layers: int = 22,
    rank: int = 16,
    shape: Llama = TINYLLAMA,
    dtype: str = "F32",
    number: int = 1,
) -> None:
    """Write a LoRA adapter of all seven linear layers, in PEFT's layout, for a Llama of this shape."""
    rng = np.random.default_rng(SEED + number)
    alpha = 2 * rank
    # Every entry of (alpha/rank)·B·A then has the standard deviation DELTA_RATIO * WEIGHT_STD.
    a_std = WEIGHT_STD
    b_std = DELTA_RATIO * WEIGHT_STD / (alpha / rank * a_std * sqrt(rank))

    def fill(name: str, shape: Shape) -> np.ndarray:
        return _normal(rng, shape, a_std if name.endswith("lora_A.weight") else b_std)

    factors: dict[str, Shape] = {}
    for layer in range(layers):
        for name, (rows, columns) in shape.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{prefix}.lora_A.weight"] = (rank, columns)
            factors[f"{prefix}.lora_B.weight"] = (rows, rank)
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [name.rpartition(".")[2] for name in shape.linears()],
        "task_type": "CAUSAL_LM",
    }
    directory.mkdir(parents=True)
    _write_safetensors(directory / "adapter_model.safetensors", factors, dtype, fill)
    _write_json(directory / "adapter_config.json", config)


def _cached(name: str, write: Callable[..., None], *args: Any) -> Path:
    """Return CACHE/name; writes to a temporary name and renames, so that it is always complete."""
    directory = CACHE / name
    if not directory.exists():
        print(f"writing {name}", file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".partial-") as partial:
            # In another process, since measured commands inherit the memory peak of this one.
            with ProcessPoolExecutor(max_workers=1) as pool:
                pool.submit(write, Path(partial, name), *args).result()
            Path(partial, name).rename(directory)
    return directory


def _split(shapes: dict[str, Shape], shards: int) -> list[dict[str, Shape]]:
    """Cut the weights, in order, into shards of about equal size."""
    total = sum(prod(shape) for shape in shapes.values())
    parts: list[dict[str, Shape]] = [{} for _ in range(shards)]
    start = 0
    for name, shape in shapes.items():
        size = prod(shape)
        parts[(start + size // 2) * shards // total][name] = shape  # by the middle of the weight
        start += size
    if not all(parts):
        raise ValueError(f"{shards} shards are too many: one would be empty")
    return parts


def _write_safetensors(path: Path, shapes: dict[str, Shape], dtype: str, fill: Fill) -> None:
    """Write a safetensors file tensor by tensor: header length, JSON header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(_encode(fill(name, shape), dtype).data)


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 values to the stored dtype."""
    if dtype == "BF16":  # NumPy has no bf16; dropping the low half rounds towards zero, fine for random data
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype], copy=False)


def _normal(rng: np.random.Generator, shape: Shape, std: float) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= std
    return values


def _llama_config(shape: Llama, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
