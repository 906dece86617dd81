"""PEFT: `adapter_config.json` beside `adapter_model.safetensors` (or a legacy `.bin`).

Keys are `base_model.model.<module>.lora_A.weight` and so on; the config's patterns, rsLoRA and DoRA flags affect the
update. Source: the saving and loading code of huggingface/peft, 0.3 to 0.21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter import fingerprint
from adapterkit.adapter.formats.foreign import is_of_diffusion
from adapterkit.adapter.formats.peft_config import BASE_KEY as BASE_KEY
from adapterkit.adapter.formats.peft_config import CONFIG as CONFIG
from adapterkit.adapter.formats.peft_config import PeftConfig, Strength
from adapterkit.adapter.formats.peft_config import describe_config as describe_config
from adapterkit.adapter.formats.peft_names import PREFIX, TASK_HEADS, SortedTensors, saves, sort_tensors
from adapterkit.adapter.formats.peft_parameters import Owner, owners_of, stored_names
from adapterkit.adapter.formats.peft_variants import initialization, plain, without_blocks
from adapterkit.adapter.weights import Adapter, Kind, LazyTensor, LoraWeights, Problem
from adapterkit.files.safetensors import FLOAT_DTYPES, write_tensors

if TYPE_CHECKING:
    import torch

    from adapterkit.adapter.formats.source import Source

NAME = LIBRARY = "peft"
# The names of the weights file in training tools, in order of preference.
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin")


def detect(source: Source) -> bool:
    """Return whether the config has a `peft_type`, or a tensor has a LoRA role."""
    if source.config and "peft_type" in source.config:
        return True
    if is_of_diffusion(source.tensors):  # diffusers writes PEFT's names, but no config
        return False
    return any(".lora_A" in name or ".lora_embedding_A" in name for name in source.tensors)


def read(source: Source, alpha: float | None = None, scaling: float | None = None) -> Adapter:
    """Read the headers of a PEFT adapter.

    Raises FormatError for configs with wrong types or another PEFT method, UnknownStrengthError if no config has the
    alpha.
    """
    config = PeftConfig.parse(source)
    scale = Strength(config, source, alpha, scaling)
    found = sort_tensors(source.tensors, config)
    owners, unowned = owners_of(found.modules, config)
    config.check_patterns([owner.name for owner in owners.values()])
    problems = [*config.problems(), *found.problems, *unowned]
    modules = {}
    for stored, owner in owners.items():
        weights = _weights(owner, without_blocks(stored, found.modules[stored], config.raw), config, scale)
        if isinstance(weights, Problem):
            problems.append(weights)
        else:
            modules[owner.name] = weights
    tokens = {name: (config.token_indices(name), delta) for name, delta in found.tokens.items()}
    problems += _token_problems(tokens)
    problems += config.left_out([name for name, weights in modules.items() if weights.kind != "parameter"])
    problems += _disagreements(config, modules, found)
    made_for, unreadable = fingerprint.decoded(source.metadata, source.weights.name)
    return Adapter(
        format=NAME,
        modules=modules,
        replaced=found.replaced,
        tokens=tokens,
        new_tensors=frozenset(found.saved),
        ensure_weight_tying=config.ensure_weight_tying,
        base_model=config.raw.get(BASE_KEY) or None,
        base_fingerprint=made_for,
        rslora=config.rslora,
        initialization=initialization(config.raw),
        peft_version=config.peft_version,
        task=config.task,
        config=plain(config.raw),
        files=source.files,
        problems=(*problems, *unreadable),
        unrecognized=tuple(found.unrecognized),
    )


def write(adapter: Adapter, directory: Path) -> None:
    """Write `adapter` to the new `directory`, so that PEFT computes the same Δ from it."""
    text = json.dumps(_config_for(adapter), indent=2, sort_keys=True)
    tensors: dict[str, torch.Tensor] = {}
    stored = stored_names({name: weights.kind == "parameter" for name, weights in adapter.modules.items()})
    for module, weights in adapter.modules.items():
        name = stored[module]
        a, b = (".lora_embedding_A", ".lora_embedding_B") if weights.kind == "embedding" else (
            ".lora_A.weight", ".lora_B.weight")  # fmt: skip
        tensors[PREFIX + name + a] = weights.A.read()
        tensors[PREFIX + name + b] = weights.B.read()
        if weights.magnitude is not None:
            magnitude = weights.magnitude.read()
            if weights.kind == "conv":
                magnitude = magnitude.reshape(1, -1, *(1,) * (len(weights.A.shape) - 2))
            tensors[PREFIX + name + ".lora_magnitude_vector"] = magnitude
        if weights.bias is not None:
            tensors[PREFIX + name + ".lora_B.bias"] = weights.bias.read()
    for name, tensor in adapter.replaced.items():
        tensors[PREFIX + _saved_name(name, adapter)] = tensor.read()
    for name, (_, delta) in adapter.tokens.items():
        tensors[PREFIX + name + ".token_adapter.trainable_tokens_delta"] = delta.read()
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS[0], tensors, {"format": "pt", **fingerprint.encoded(adapter.base_fingerprint)})
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def example(repo: str) -> list[str]:
    """Return Python code that loads the adapter from the Hub."""
    call = f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")'
    return ["from peft import AutoPeftModelForCausalLM", "", call]


# --- reading ---------------------------------------------------------------------------------------------------------


def _weights(
    owner: Owner, roles: dict[str, LazyTensor], config: PeftConfig, scale: Strength
) -> LoraWeights[LazyTensor] | Problem:
    """Convert the tensors of one module or parameter to LoraWeights, or return the problem."""
    name = owner.name
    embedding = "embedding_A" in roles or "embedding_B" in roles
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    missing = [f"lora_{role}" for role in (a, b) if role not in roles]
    if missing:
        return Problem(name, f"{' and '.join(missing)} missing, found {', '.join(sorted(roles))}")
    A, B = roles[a], roles[b]
    for role, tensor in roles.items():
        if tensor.dtype not in FLOAT_DTYPES or not tensor.shape:
            return Problem(name, f"{role} is {tensor.dtype} {tensor.shape}, expected floating point weights")
    if len(A.shape) < 2 or len(B.shape) < 2:
        return Problem(name, f"A is {A.shape} and B is {B.shape}: expected (rank, in) and (out, rank)")
    experts, configured = 1, config.rank(name)
    if owner.parameter and configured:
        experts, rest = divmod(A.shape[0], int(configured))
        if rest or not experts:
            return Problem(name, f"A is {A.shape}, which is no whole number of experts of rank {configured:g}")
    kind: Kind = (
        "parameter" if owner.parameter else "embedding" if embedding else "conv" if len(A.shape) > 2 else "linear"
    )
    enabled = config.raw.get("enable_lora")
    if isinstance(enabled, list) and len(A.shape) == 2 and len(B.shape) == 3:
        groups = sum(map(bool, enabled))
        if groups == 0 or B.shape[0] % groups or B.shape[1] * groups != A.shape[0]:
            return Problem(name, f"A {A.shape} and B {B.shape} do not match enable_lora {enabled}")
        B, rank = _merged_linear(B, tuple(map(bool, enabled))), B.shape[1]
    else:
        rank = A.shape[0] // experts
    magnitude = roles.get("magnitude")
    if magnitude is not None and len(magnitude.shape) > 1:
        magnitude = LazyTensor(magnitude.source, (prod(magnitude.shape),), magnitude.dtype, _flatten)
    if rank < 1:
        return Problem(name, f"A is {A.shape}: the rank is 0")
    scaling, alpha = scale.of(name, rank)
    weights = LoraWeights(
        A, B, scaling, alpha, magnitude, roles.get("bias"), kind, experts,
        bool(config.raw.get("fan_in_fan_out")),
    )  # fmt: skip
    if problem := weights.problem():
        return Problem(name, problem)
    if configured is not None and configured != rank and scale.scaling is None:
        return Problem(name, f"the tensors have rank {rank}, {CONFIG} says {configured:g}: the scaling is ambiguous")
    return weights


def _merged_linear(B: LazyTensor, enabled: tuple[bool, ...]) -> LazyTensor:
    """Convert loralib's MergedLinear, which has factors for each enabled part of a fused projection, to one block B."""
    groups = sum(enabled)
    shape = (B.shape[0] // groups * len(enabled), groups * B.shape[1])
    return LazyTensor(B.source, shape, B.dtype, partial(_block_rows, enabled))


def _block_rows(enabled: tuple[bool, ...], B: torch.Tensor) -> torch.Tensor:
    """Expand grouped `B (groups·part, r, 1)` to `(parts·part, groups·r)`, with zeros for disabled parts."""
    groups = sum(enabled)
    part, rank = B.shape[0] // groups, B.shape[1]
    full = B.new_zeros(len(enabled), part, groups, rank)
    for group, index in enumerate(i for i, on in enumerate(enabled) if on):
        full[index, :, group] = B[group * part : (group + 1) * part, :, 0]
    return full.reshape(len(enabled) * part, groups * rank)


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def _token_problems(tokens: Mapping[str, tuple[tuple[int, ...], LazyTensor]]) -> Iterable[Problem]:
    """Yield the trained tokens that contradict the config."""
    for name, (rows, delta) in tokens.items():
        if delta.dtype not in FLOAT_DTYPES or len(delta.shape) != 2:
            yield Problem(name, f"the trained tokens are {delta.dtype} {delta.shape}, expected (tokens, dim)")
        elif len(rows) != delta.shape[0]:
            yield Problem(name, f"has {delta.shape[0]} trained tokens, but trainable_token_indices lists {len(rows)}")


def _disagreements(
    config: PeftConfig, modules: Mapping[str, LoraWeights[LazyTensor]], found: SortedTensors
) -> Iterable[Problem]:
    """Yield the contradictions between the config and the tensors."""
    targets = config.raw.get("target_modules")
    names = [*modules, *found.tokens]
    listed = {"target_modules": targets if isinstance(targets, list) else [],
              "target_parameters": config.target_parameters}  # fmt: skip
    for field, entries in listed.items():
        for entry in entries:
            if not any(name == entry or name.endswith(f".{entry}") for name in names):
                yield Problem(f"{CONFIG}: {field}", f"{entry!r} has no tensors", fatal=False)
    stored = {entry for entry in config.saved if any(saves(entry, name.rpartition(".")[0]) for name in found.saved)}
    for entry in config.modules_to_save:
        if entry not in stored and entry not in config.task_heads:
            yield Problem(f"{CONFIG}: modules_to_save", f"{entry!r} has no tensors", fatal=False)
    if config.task_heads and not stored:
        heads = " or ".join(config.task_heads)
        yield Problem(f"{CONFIG}: task_type", f"is {config.task}, but no {heads} has tensors", fatal=False)
    with_magnitude = sum(weights.magnitude is not None for weights in modules.values())
    if config.present and config.dora and with_magnitude < len(modules):
        yield Problem(
            f"{CONFIG}: use_dora",
            f"{len(modules) - with_magnitude} of {len(modules)} modules have no magnitude",
        )
    if config.present and not config.dora and with_magnitude:
        yield Problem(f"{CONFIG}: use_dora", f"is false, but {with_magnitude} modules have a magnitude")


# --- writing ---------------------------------------------------------------------------------------------------------


def _config_for(adapter: Adapter) -> dict[str, Any]:
    """Return the config with which PEFT computes each module's scaling."""
    parameters = [name for name, weights in adapter.modules.items() if weights.kind == "parameter"]
    if adapter.format == NAME and "lora_alpha" in adapter.config:
        return adapter.config | ({"target_parameters": parameters} if parameters else {})
    ranks = {name: weights.rank for name, weights in adapter.modules.items()}
    alphas = {
        name: weights.scaling * (weights.rank**0.5 if adapter.rslora else weights.rank)
        for name, weights in adapter.modules.items()
    }
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    saved, biased = _saved_modules(adapter)
    config = {
        "peft_type": "LORA",
        BASE_KEY: adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": any(weights.magnitude is not None for weights in adapter.modules.values()),
        "modules_to_save": saved or None,
        "bias": "all" if biased else "none",
        "task_type": adapter.task,
        "fan_in_fan_out": any(weights.fan_in_fan_out for weights in adapter.modules.values()),
        "inference_mode": True,
    }
    if adapter.target_suffixes and not config["rank_pattern"] and not config["alpha_pattern"]:
        return config | {
            "target_modules": list(adapter.target_suffixes),
            "lora_dropout": adapter.dropout,
        }
    return config | {
        "target_modules": sorted(adapter.modules.keys() - {*parameters}),
        "target_parameters": parameters or None,
        **({"peft_version": adapter.peft_version} if parameters and adapter.peft_version else {}),
        "trainable_token_indices": {name: list(rows) for name, (rows, _) in adapter.tokens.items()} or None,
        "lora_bias": any(weights.bias is not None for weights in adapter.modules.values()),
        **({"ensure_weight_tying": True} if adapter.ensure_weight_tying else {}),
    }


def _saved_modules(adapter: Adapter) -> tuple[list[str], bool]:
    """Return modules_to_save for the replaced tensors, and whether there are biases of other modules."""
    whole = {name.rpartition(".")[0] for name in adapter.replaced}
    biased = whole - {name.rpartition(".")[0] for name in adapter.replaced if not name.endswith(".bias")}
    saved = whole - adapter.modules.keys() - adapter.tokens.keys() - biased
    heads = TASK_HEADS.get(adapter.task or "", ())
    others = {name for name in saved if not any(saves(head, name) for head in heads)}
    return sorted(others.union(heads) if others < saved else saved), bool(biased)  # PEFT can't load modules of heads


def _saved_name(tensor: str, adapter: Adapter) -> str:
    """Return PEFT's name for a replaced tensor: with base_layer, if its module also has factors or trained tokens."""
    module, _, leaf = tensor.rpartition(".")
    if module in adapter.tokens:
        return f"{module}.token_adapter.base_layer.{leaf}"
    return f"{module}.base_layer.{leaf}" if module in adapter.modules else tensor


def _commonest(values: Iterable[float]) -> float:
    values = list(values)
    return max(set(values), key=values.count) if values else 1


def _exactly(name: str) -> str:
    return "^" + re.escape(name)
