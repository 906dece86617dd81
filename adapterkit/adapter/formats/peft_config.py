"""PEFT's `adapter_config.json`: the fields that affect the update, checked, and the scaling computed from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.formats.format import ConfigFacts
from adapterkit.adapter.formats.peft_names import TASK_HEADS
from adapterkit.adapter.formats.peft_selection import left_out
from adapterkit.adapter.formats.peft_variants import BLOCKS, variant_problems
from adapterkit.adapter.safe_regex import Patterns, compile_pattern
from adapterkit.adapter.weights import Problem
from adapterkit.errors import FormatError, UnknownStrengthError, UsageError

if TYPE_CHECKING:
    from adapterkit.adapter.formats.source import Source

CONFIG = "adapter_config.json"
BASE_KEY = "base_model_name_or_path"
# Methods that train inputs of the model.
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
EMBEDDINGS = ("embed_tokens", "lm_head")  # the names by which PEFT recognizes an embedding or a head


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that affect the update, with their types checked."""

    raw: dict[str, Any]
    r: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: Patterns[float | None] = field(default_factory=Patterns)
    alpha_pattern: Patterns[float | None] = field(default_factory=Patterns)
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    peft_version: str | None = None
    tokens: Any = None
    present: bool = False

    @classmethod
    def parse(cls, source: Source) -> PeftConfig:
        """Parse the config beside the weights; raises FormatError for wrong types or other PEFT methods."""
        if source.config is None:
            return cls({})
        given = _Fields(source.config, source.config_file)
        kind = given.value("peft_type", str, "LORA")
        if kind.upper() != "LORA":
            prompt = kind.upper() in PROMPTS
            raise FormatError(
                f"{given.file}: peft_type is {kind[:40]!r}"
                f"{', which changes no weights, so that it has nothing to merge' if prompt else ''}; "
                "only LORA (with rsLoRA and DoRA) is supported",
                hint="" if prompt else "merge it with PEFT: `merge_and_unload()`",
            )
        for name in (BASE_KEY, "bias"):
            given.value(name, str, None)
        for name in ("fan_in_fan_out", "ensure_weight_tying"):
            given.value(name, bool, None)
        given.value(BLOCKS, dict, None)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if not isinstance(given.raw.get(name), str):
                given.names(name)
        given.layers("layers_to_transform")
        return cls(
            given.raw,
            r=given.number("r", int, above=0),
            alpha=given.number("lora_alpha", (int, float), above=-1e9),
            rslora=given.value("use_rslora", bool, False),
            dora=given.value("use_dora", bool, False),
            rank_pattern=given.pattern("rank_pattern", int),
            alpha_pattern=given.pattern("alpha_pattern", (int, float)),
            modules_to_save=given.names("modules_to_save"),
            target_parameters=tuple(dict.fromkeys(given.names("target_parameters"))),
            peft_version=given.value("peft_version", str, None),
            tokens=given.value("trainable_token_indices", (list, dict), None),
            present=True,
        )

    @property
    def task(self) -> str | None:
        task = self.raw.get("task_type")
        return None if task is None else str(task)

    @property
    def saved(self) -> tuple[str, ...]:
        """The endings of the names of saved modules: modules_to_save, and the heads that PEFT adds by task."""
        return tuple(dict.fromkeys((*self.modules_to_save, *self.task_heads)))

    @property
    def task_heads(self) -> tuple[str, ...]:
        """The heads that PEFT saves for the task; it loads them even if modules_to_save does not list them."""
        return TASK_HEADS.get(self.task or "", ())

    @property
    def ensure_weight_tying(self) -> bool:
        """Whether PEFT trains tied embeddings as one; it finds them by the names in EMBEDDINGS only."""
        if not self.raw.get("ensure_weight_tying"):
            return False
        targets = self.raw.get("target_modules") or []
        if isinstance(targets, str):
            with _errors_in(CONFIG):
                targets = [name for name in EMBEDDINGS if compile_pattern(targets).matches(name)]
        return any(name.split(".")[-1] in EMBEDDINGS for name in (*targets, *self.modules_to_save))

    @cached_property
    def target_modules(self) -> str | frozenset[str]:
        """A pattern for names of modules, or suffixes of them."""
        targets = self.raw.get("target_modules") or ()
        return targets if isinstance(targets, str) else frozenset(targets)

    def targets(self, module: str) -> bool:
        """Return whether target_modules selects `module`, as PEFT does."""
        if isinstance(self.target_modules, str):
            with _errors_in(f"{CONFIG}: target_modules"):
                return compile_pattern(self.target_modules).matches(module)
        parts = module.split(".")
        return any(".".join(parts[at:]) in self.target_modules for at in range(len(parts)))

    def check_patterns(self, modules: Collection[str]) -> None:
        """Raise FormatError if matching the patterns against all module names could take minutes."""
        for patterns in (self.rank_pattern, self.alpha_pattern):
            with _errors_in(CONFIG):
                patterns.check(modules)

    def rank(self, module: str) -> float | None:
        return self.rank_pattern.first(module, self.r)

    def alpha_of(self, module: str) -> float | None:
        return self.alpha_pattern.first(module, self.alpha)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of `module`; a bare list in the config means the input embedding.

        PEFT may store a tied head too, without listing it: it has the rows of the only module that is listed.
        """
        rows = self.tokens
        if isinstance(rows, dict):
            named = [rows[key] for key in rows if module == key or module.endswith("." + key)]
            rows = next(iter(named or (rows.values() if len(rows) == 1 else ())), ())
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            return ()
        return tuple(dict.fromkeys(rows))  # without duplicates, so that a mismatch with the tensor shows

    def left_out(self, modules: Collection[str]) -> list[Problem]:
        """Return the contradictions between the fields that leave out modules and the `modules` in the file."""
        with _errors_in(CONFIG):
            return list(left_out(modules, self.raw, CONFIG))

    def problems(self) -> Iterable[Problem]:
        return variant_problems(self.raw, CONFIG)


@dataclass(frozen=True)
class Strength:
    """The scaling of each module, from the config or from the caller, but never guessed."""

    config: PeftConfig
    source: Source
    alpha: float | None
    scaling: float | None

    def __post_init__(self) -> None:
        for option, value in (("`alpha`", self.alpha), ("`scaling`", self.scaling)):
            if value is not None and not isfinite(value):
                raise UsageError(f"{option} {value}: expected a finite number")
        given = self.alpha is not None or self.scaling is not None
        if self.config.present and self.config.alpha is not None and given:
            raise UsageError(
                f"{self.source.config_file} already defines lora_alpha",
                hint="omit `alpha` and `scaling`",
            )
        if not given and self.config.alpha is None:
            where, present = self.source.config_file, self.config.present
            missing = "has no lora_alpha" if present else "is missing"
            raise UnknownStrengthError(
                f"{where} {missing}, so the strength of {self.source.weights.name} is unknown",
                hint="give `alpha` (scaling = alpha / rank) or `scaling`",
                reason=f"no lora_alpha in {CONFIG}" if present else f"no {CONFIG}",
            )

    def of(self, module: str, rank: int) -> tuple[float, float | None]:
        """Return (scaling, alpha) of `module`: alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732)."""
        if self.scaling is not None:
            return self.scaling, None
        alpha = self.alpha if self.alpha is not None else self.config.alpha_of(module)
        assert alpha is not None
        return alpha / (rank**0.5 if self.config.rslora else rank), alpha


def describe_config(config: Mapping[str, Any]) -> ConfigFacts:
    """Return the facts in `config`, ignoring values of the wrong type."""
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    enabled = config.get("enable_lora")  # parts of a fused layer, each of this rank
    if isinstance(rank, int) and isinstance(enabled, list):
        rank *= sum(part is True for part in enabled)
    base, revision = config.get(BASE_KEY), config.get("revision")
    return ConfigFacts(
        "DoRA" if config.get("use_dora") else "LoRA",
        ranks=(rank,) if isinstance(rank, int) and 0 <= rank < 1 << 30 else (),
        alphas=(float(alpha),) if isinstance(alpha, int | float) and abs(alpha) < 1e9 else (),
        targets=tuple(map(str, targets)) if isinstance(targets, Sequence) and not isinstance(targets, str) else (),
        base_model=base if isinstance(base, str) else None,
        base_revision=revision if isinstance(revision, str) and revision else None,
    )


Kinds = type | tuple[type, ...]


@dataclass(frozen=True)
class _Fields:
    """Reads the raw config with type checks; every method raises FormatError with the field's name."""

    raw: dict[str, Any]
    file: Path

    def value(self, name: str, kinds: Kinds, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            found = f"{str(value)[:60]!r}, a {type(value).__name__}"
            raise FormatError(f"{self.file}: {name} is {found}; expected {expected}")
        return value

    def number(self, name: str, kinds: Kinds, above: float) -> Any:
        value = self.value(name, kinds, None)
        if value is not None and not above < value < 1e9:  # NaN is refused too
            raise FormatError(
                f"{self.file}: {name} is {str(value)[:60]}; expected a number above {above:g} and below 1e9"
            )
        return value

    def pattern(self, name: str, kinds: Kinds) -> Patterns[Any]:
        value: dict[str, float] = self.value(name, dict, {})
        for key, number in value.items():
            if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number < 1e9:
                raise FormatError(
                    f"{self.file}: {name}[{key[:60]!r}] is {str(number)[:60]!r}, expected a positive number"
                )
        with _errors_in(f"{self.file}: {name}"):
            return Patterns.of(value)

    def layers(self, name: str) -> None:
        """Check a layer or a list of layers."""
        value = self.value(name, (int, list), [])
        if isinstance(value, list) and not all(type(layer) is int for layer in value):
            raise FormatError(f"{self.file}: {name} is {str(value)[:60]}; expected layers")

    def names(self, name: str) -> tuple[str, ...]:
        value = self.value(name, list, [])
        if not all(isinstance(entry, str) for entry in value):
            raise FormatError(f"{self.file}: {name} is {str(value)[:60]}; expected a list of names")
        return tuple(value)


@contextmanager
def _errors_in(where: object) -> Iterator[None]:
    """Prefix `where` to the FormatError of an invalid pattern."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
