"""PEFT: `adapter_config.json` beside `adapter_model.safetensors` (or a legacy `.bin`).

Keys are `base_model.model.<module>.lora_A.weight` and so on; the config's patterns, rsLoRA and DoRA flags change the
numbers. Source: the saving and loading code of huggingface/peft, 0.3 to 0.21.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter import Adapter, Kind, LazyTensor, LoraWeights, Problem
from adapterkit.errors import FitError, FormatError, OutputExistsError, UsageError
from adapterkit.formats.source import CONFIG, WEIGHTS, Source
from adapterkit.tensorfile import FLOAT_DTYPES, TensorInfo, write_tensors

if TYPE_CHECKING:
    import torch

NAME = "peft"
PREFIX = "base_model.model."

# What wrappers leave in a name: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# The tensors of one module by their role; a raw training state still carries the adapter's name before the leaf.
ROLES = {
    "A": r"\.lora_A(?:\.(?P<name>[^.]+))?\.weight",
    "B": r"\.lora_B(?:\.(?P<name>[^.]+))?\.weight",
    "bias": r"\.lora_B(?:\.(?P<name>[^.]+))?\.bias",
    "embedding_A": r"\.lora_embedding_A(?:\.(?P<name>[^.]+))?",
    "embedding_B": r"\.lora_embedding_B(?:\.(?P<name>[^.]+))?",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?P<name>(?!weight$)[^.]+))?(?:\.weight)?",
    "tokens": r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?",
}
ROLE_PATTERNS = {role: re.compile(r"(?P<module>.+?)" + pattern) for role, pattern in ROLES.items()}
SAVED = re.compile(r"(?P<module>.+)\.(?:modules_to_save\.[^.]+|base_layer)\.(?P<leaf>[^.]+)")

# Fields that change what the factors mean in ways that no merged weight can express.
UNMERGEABLE = {
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens, so no merged weight equals it",
    "layer_replication": "the adapter belongs to a model with repeated layers, which the base does not have",
    "megatron_config": "its factors are split over Megatron ranks",
    "use_qalora": "QA-LoRA pools its input by groups",
    "arrow_config": "Arrow routes between adapters at run time",
    "use_bdlora": "BD-LoRA's factors are block diagonal",
    "velora_config": "VeLoRA is not LoRA at inference",
    "kasa_config": "KaSA brings singular values of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# Initializations that also change the base weights, unless PEFT converted the adapter when saving it.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")

# Configs come from strangers, and Python's matcher backtracks: repeating a group can take exponential time, and n other
# choices (repetitions, groups) the n-th power of the name's length. These bounds keep a match within seconds.
REPEATED_GROUP = re.compile(r"\)[+*{]")
CHOICE = re.compile(r"\((?:\?.)?|[+*?]\??|\{")
MAX_CHOICES = 4
MAX_MATCHED = 150  # characters of a module's name


def detect(source: Source) -> bool:
    """Any tensor with a PEFT role, or a config that says so."""
    if source.config and "peft_type" in source.config:
        return True
    return any(".lora_A" in name or ".lora_embedding_A" in name for name in source.tensors)


def read(source: Source, alpha: float | None = None, scaling: float | None = None) -> Adapter:
    """Read the headers of a PEFT adapter.

    Raises FormatError for configs with wrong types or another PEFT method, UsageError where no config says the alpha.
    """
    config = _Config.parse(source)
    scale = _Scaling(config, source, alpha, scaling)
    found = _sort_tensors(source.tensors, config)
    problems = [*config.problems(), *found.problems]
    modules = {}
    for name, roles in sorted(found.modules.items(), key=lambda item: _natural(item[0])):
        weights = _weights(name, roles, config, scale)
        if isinstance(weights, Problem):
            problems.append(weights)
        else:
            modules[name] = weights
    tokens = {}
    for name, delta in found.tokens.items():
        indices = config.token_indices(name)
        if delta.dtype not in FLOAT_DTYPES or len(delta.shape) != 2:
            problems.append(
                Problem(name, f"the trained tokens are {delta.dtype} {delta.shape}, expected (tokens, dim)")
            )
        elif len(indices) != delta.shape[0]:
            problems.append(
                Problem(name, f"{delta.shape[0]} trained tokens, trainable_token_indices names {len(indices)}")
            )
        tokens[name] = (indices, delta)
    problems += _disagreements(config, modules, found)
    return Adapter(
        format=NAME,
        modules=modules,
        replaced=found.replaced,
        tokens=tokens,
        new_modules=frozenset(config.modules_to_save),
        keeps_tie=bool(config.raw.get("ensure_weight_tying")),
        base_model=config.raw.get("base_model_name_or_path") or None,
        config=config.raw,
        files=source.files,
        problems=tuple(problems),
        unread=tuple(found.unread),
    )


def write(adapter: Adapter, directory: Path) -> None:
    """Write `adapter` to the new `directory` so that PEFT loads it and gets the same Δ.

    Raises OutputExistsError where the directory is there already and not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise OutputExistsError(f"{directory}: is not empty; choose another directory for the adapter")
    tensors: dict[str, torch.Tensor] = {}
    for name, weights in adapter.modules.items():
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
    write_tensors(directory / WEIGHTS[0], tensors, {"format": "pt"})
    text = json.dumps(_config_for(adapter), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


# --- the config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """The fields of adapter_config.json that change numbers, with their types checked."""

    raw: dict[str, Any]
    r: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    tokens: Any = None
    present: bool = False

    @classmethod
    def parse(cls, source: Source) -> _Config:
        raw, where = source.config, source.config_file
        if raw is None:
            return cls({})

        def get(name: str, kinds: type | tuple[type, ...], default: Any) -> Any:
            value = raw.get(name)
            if value is None:
                return default
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                found = f"{str(value)[:60]!r}, a {type(value).__name__}"
                raise FormatError(f"{where}: {name} is {found}; expected {expected}")
            return value

        def number(name: str, kinds: type | tuple[type, ...], above: float) -> Any:
            value = get(name, kinds, None)
            if value is not None and not above < value < 1e9:  # NaN is refused too
                raise FormatError(
                    f"{where}: {name} is {str(value)[:60]}; expected a number above {above:g} and below 1e9"
                )
            return value

        def pattern(name: str, kinds: type | tuple[type, ...]) -> dict[str, float]:
            value: dict[str, float] = get(name, dict, {})
            for key, number in value.items():
                if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number < 1e9:
                    raise FormatError(
                        f"{where}: {name}[{key[:60]!r}] is {str(number)[:60]!r}, expected a positive number"
                    )
                _compile(key, where)
            return value

        def names(name: str) -> tuple[str, ...]:
            value = get(name, list, [])
            if not all(isinstance(entry, str) for entry in value):
                raise FormatError(f"{where}: {name} is {str(value)[:60]}; expected a list of names")
            return tuple(value)

        kind = get("peft_type", str, "LORA")
        if kind.upper() != "LORA":
            raise FormatError(f"{where}: peft_type is {kind[:40]!r}; adapterkit reads LORA (with rsLoRA and DoRA)")
        for name in ("base_model_name_or_path", "bias"):
            get(name, str, None)
        for name in ("fan_in_fan_out", "ensure_weight_tying"):
            get(name, bool, None)
        if not isinstance(raw.get("target_modules"), str):
            names("target_modules")
        return cls(
            raw,
            r=number("r", int, 0),
            alpha=number("lora_alpha", (int, float), -1e9),
            rslora=get("use_rslora", bool, False),
            dora=get("use_dora", bool, False),
            rank_pattern=pattern("rank_pattern", int),
            alpha_pattern=pattern("alpha_pattern", (int, float)),
            modules_to_save=names("modules_to_save"),
            target_parameters=names("target_parameters"),
            tokens=get("trainable_token_indices", (list, dict), None),
            present=True,
        )

    def rank(self, module: str) -> float | None:
        return _match_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float | None:
        return _match_pattern(self.alpha_pattern, module, self.alpha)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """The rows of `module` that were trained; a bare list in the config means the input embedding."""
        rows = self.tokens
        if isinstance(rows, dict):
            rows = next((rows[key] for key in rows if module == key or module.endswith("." + key)), ())
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            return ()
        return tuple(dict.fromkeys(rows))  # a row named twice is one row: the counts then disagree

    def problems(self) -> Iterable[Problem]:
        for name, reason in UNMERGEABLE.items():
            if self.raw.get(name):
                yield Problem(f"{CONFIG}: {name}", reason)
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            yield Problem(
                f"{CONFIG}: init_lora_weights",
                f"{init[:40]!r} changes the base when training starts; unless the adapter was converted on saving "
                "(PEFT's path_initial_model_for_weight_conversion), merging it into the original base is wrong",
                fatal=False,
            )


@dataclass(frozen=True)
class _Scaling:
    """How strong each module is: from the config, or from the caller where there is none; never guessed."""

    config: _Config
    source: Source
    alpha: float | None
    scaling: float | None

    def __post_init__(self) -> None:
        for option, value in (("--alpha", self.alpha), ("--scaling", self.scaling)):
            if value is not None and not isfinite(value):
                raise UsageError(f"{option} {value}: expected a finite number")
        given = self.alpha is not None or self.scaling is not None
        if self.config.present and self.config.alpha is not None and given:
            raise UsageError(
                f"{self.source.config_file} already gives the alpha: leave --alpha and --scaling away, "
                "or change the strength with --scale"
            )
        if not given and self.config.alpha is None:
            where = self.source.config_file
            missing = "has no lora_alpha" if self.config.present else "is missing"
            raise UsageError(f"{where} {missing}, so the strength of {self.source.weights.name} is unknown: "
                             "give --alpha (scaling = alpha / rank) or --scaling")  # fmt: skip

    def of(self, module: str, rank: int) -> tuple[float, float | None]:
        """(scaling, alpha) of `module`: alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732)."""
        if self.scaling is not None:
            return self.scaling, None
        alpha = self.alpha if self.alpha is not None else self.config.alpha_of(module)
        assert alpha is not None
        return alpha / (rank**0.5 if self.config.rslora else rank), alpha


def _compile(key: str, where: object) -> re.Pattern[str]:
    if len(key) > 500 or REPEATED_GROUP.search(key) or len(CHOICE.findall(key)) > MAX_CHOICES:
        raise FormatError(f"{where}: the pattern {key[:60]!r} could take for ever to match; refused")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: {key[:60]!r} is not a regular expression: {error}") from error


def _match_pattern(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    """The first pattern that matches, in the order of the file, as PEFT does it."""
    if patterns and len(module) > MAX_MATCHED:
        raise FormatError(f"{CONFIG}: a module name of {len(module)} characters is too long to match patterns against")
    for key, value in patterns.items():
        if _compile(key, CONFIG).match(module):
            return value
    return default


# --- the tensors -----------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The tensors of a file, sorted by what they are for."""

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    tokens: dict[str, LazyTensor] = field(default_factory=dict)
    unread: list[TensorInfo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _sort_tensors(tensors: Mapping[str, TensorInfo | torch.Tensor], config: _Config) -> _Found:
    """Give every tensor its module and role; what fits nowhere is kept in `unread`."""
    found, adapter_names = _Found(), set()
    for key, stored in tensors.items():
        tensor = LazyTensor.of(stored)
        name = WRAPPERS.sub("", key)
        name = name.removeprefix("module.") if PREFIX in name else name
        name = name.removeprefix(PREFIX)
        match = next(((role, m) for role, pattern in ROLE_PATTERNS.items() if (m := pattern.fullmatch(name))), None)
        if match is not None:
            role, parts = match
            adapter_names.add(parts["name"])
            if role == "tokens":
                found.tokens[parts["module"]] = tensor
            elif role in found.modules[parts["module"]]:
                found.problems.append(Problem(key, "a second adapter for the same module in one file"))
            else:
                found.modules[parts["module"]][role] = tensor
        elif (target := _replaces(name, config)) is not None and target not in found.replaced:
            found.replaced[target] = tensor
        else:
            found.unread.append(stored if isinstance(stored, TensorInfo) else _described(key, tensor))
    if len(adapter_names) > 1:
        shown = ", ".join(sorted(str(name) for name in adapter_names)[:4])
        found.problems.append(Problem("tensor names", f"the file holds several adapters ({shown}): split it first"))
    return found


def _replaces(name: str, config: _Config) -> str | None:
    """The base tensor that takes this one's place, or None where nothing in the config explains it."""
    if match := SAVED.fullmatch(name):
        return f"{match['module']}.{match['leaf']}"
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    saved = any(f".{module}.".find(f".{entry}.") >= 0 for entry in config.modules_to_save)
    bias = leaf == "bias" and config.raw.get("bias", "none") != "none"
    embedding = leaf == "weight" and parts[-1] in EMBEDDINGS  # saved along when the vocabulary grew
    return name if saved or bias or embedding else None


# The embeddings that PEFT saves whole when they are targeted or resized.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")


def _weights(
    name: str, roles: dict[str, LazyTensor], config: _Config, scale: _Scaling
) -> LoraWeights[LazyTensor] | Problem:
    """Bring the tensors of one module into adapterkit's form, or say why they do not make one."""
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
    parameters = _parameters(name, config)
    experts = _experts(A, config.rank(name)) if parameters != ("weight",) else 1
    kind: Kind = "embedding" if embedding else "experts" if experts > 1 else "conv" if len(A.shape) > 2 else "linear"
    enabled = config.raw.get("enable_lora")
    if isinstance(enabled, list) and len(A.shape) == 2 and len(B.shape) == 3:
        groups = sum(map(bool, enabled))
        if groups == 0 or B.shape[0] % groups or B.shape[1] * groups != A.shape[0]:
            return Problem(name, f"A {A.shape} and B {B.shape} do not split into enable_lora {enabled}")
        B, rank = _merged_linear(B, tuple(map(bool, enabled))), B.shape[1]
    else:
        rank = A.shape[0] // experts
    magnitude = roles.get("magnitude")
    if magnitude is not None and len(magnitude.shape) > 1:
        magnitude = LazyTensor(magnitude.source, (prod(magnitude.shape),), magnitude.dtype, _flatten)
    if rank < 1:
        return Problem(name, f"A is {A.shape}: a rank of 0")
    scaling, alpha = scale.of(name, rank)
    weights = LoraWeights(
        A, B, scaling, alpha, magnitude, roles.get("bias"), kind, experts,
        bool(config.raw.get("fan_in_fan_out")), parameters,
    )  # fmt: skip
    if problem := weights.problem():
        return Problem(name, problem)
    configured = config.rank(name)
    if configured is not None and configured != rank and scale.scaling is None:
        return Problem(name, f"the tensors have rank {rank}, {CONFIG} says {configured:g}: the scaling is unclear")
    return weights


def _parameters(name: str, config: _Config) -> tuple[str, ...]:
    """The parameters a module's factors may be meant for: `weight`, or those that target_parameters names."""
    bare = name.replace(".base_layer", "")
    named = [path.rpartition(".") for path in config.target_parameters]
    hits = tuple(leaf for module, _, leaf in named if bare == module or bare.endswith("." + module) or not module)
    return hits or ("weight",)


def _experts(A: LazyTensor, rank: float | None) -> int:
    """How many experts are stacked in `A (experts·rank, in)`, given the configured rank."""
    return A.shape[0] // int(rank) if rank and A.shape[0] % int(rank) == 0 else 1


def _merged_linear(B: LazyTensor, enabled: tuple[bool, ...]) -> LazyTensor:
    """loralib's MergedLinear: one group of factors for each enabled part of a fused projection, as one block B."""
    groups = sum(enabled)
    shape = (B.shape[0] // groups * len(enabled), groups * B.shape[1])
    return LazyTensor(B.source, shape, B.dtype, partial(_block_rows, enabled))


def _block_rows(enabled: tuple[bool, ...], B: torch.Tensor) -> torch.Tensor:
    """Spread grouped `B (groups·part, r, 1)` to `(parts·part, groups·r)`: zero where a part is not enabled."""
    groups = sum(enabled)
    part, rank = B.shape[0] // groups, B.shape[1]
    full = B.new_zeros(len(enabled), part, groups, rank)
    for group, index in enumerate(i for i, on in enumerate(enabled) if on):
        full[index, :, group] = B[group * part : (group + 1) * part, :, 0]
    return full.reshape(len(enabled) * part, groups * rank)


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def _described(key: str, tensor: LazyTensor) -> TensorInfo:
    return TensorInfo(key, tensor.dtype, tensor.shape, Path(), 0, tensor.nbytes)


def _disagreements(config: _Config, modules: Mapping[str, LoraWeights[LazyTensor]], found: _Found) -> Iterable[Problem]:
    """Where the config and the tensors tell different stories."""
    targets = config.raw.get("target_modules")
    names = [*modules, *found.tokens]
    if isinstance(targets, list):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                yield Problem(f"{CONFIG}: target_modules", f"{target!r} has no tensors", fatal=False)
    for entry in config.modules_to_save:
        if not any(f".{name}.".find(f".{entry}.") >= 0 for name in found.replaced):
            yield Problem(f"{CONFIG}: modules_to_save", f"{entry!r} has no tensors", fatal=False)
    with_magnitude = sum(weights.magnitude is not None for weights in modules.values())
    if config.present and config.dora and with_magnitude < len(modules):
        yield Problem(
            f"{CONFIG}: use_dora", f"{len(modules) - with_magnitude} of {len(modules)} modules have no magnitude"
        )
    if config.present and not config.dora and with_magnitude:
        yield Problem(f"{CONFIG}: use_dora", f"is false, but {with_magnitude} modules have a magnitude")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]


# --- writing ---------------------------------------------------------------------------------------------------------


def _config_for(adapter: Adapter) -> dict[str, Any]:
    """The config with which PEFT computes each module's own scaling."""
    if adapter.format == NAME and "lora_alpha" in adapter.config:
        return adapter.config
    ranks = {name: weights.rank for name, weights in adapter.modules.items()}
    alphas = {name: weights.scaling * weights.rank for name, weights in adapter.modules.items()}
    if any(weights.kind == "experts" for weights in adapter.modules.values()):
        raise FitError("writing stacked experts needs the target_parameters of the original config")
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
        "use_dora": any(weights.magnitude is not None for weights in adapter.modules.values()),
        "lora_bias": any(weights.bias is not None for weights in adapter.modules.values()),
        "target_modules": sorted(adapter.modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.replaced} - set(adapter.modules))
        or None,
        "trainable_token_indices": {name: list(rows) for name, (rows, _) in adapter.tokens.items()} or None,
        "fan_in_fan_out": any(weights.fan_in_fan_out for weights in adapter.modules.values()),
        "inference_mode": True,
    }


def _saved_name(tensor: str, adapter: Adapter) -> str:
    """PEFT's name for a replaced tensor: one of a module that also has factors is that module's base layer."""
    module, _, leaf = tensor.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in adapter.modules else tensor


def _commonest(values: Iterable[float]) -> float:
    values = list(values)
    return max(set(values), key=values.count) if values else 1


def _exactly(name: str) -> str:
    return "^" + re.escape(name)
