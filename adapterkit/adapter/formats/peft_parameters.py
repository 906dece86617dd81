"""PEFT's names of factors that apply to a parameter instead of a module (`target_parameters`), as of stacked experts.

PEFT saves them under the module that declares the parameter, and nests them if it declares several, the first one
innermost: `experts.base_layer` has the factors of `gate_up_proj`, and `experts` those of `down_proj`. In an `Adapter`
they have the parameter's full name, which is also what PEFT matches `rank_pattern` and `alpha_pattern` against.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from adapterkit.adapter.formats.peft_names import NAMES
from adapterkit.adapter.weights import Problem

if TYPE_CHECKING:
    from adapterkit.adapter.formats.peft_config import PeftConfig

NESTED = ".base_layer"

# Parameters in the order in which a model's module declares them.
DECLARED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "w2", "down_proj", "down_proj_bias",
    "weight", "bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Owner:
    """The module, or with `parameter` the parameter, to which factors in a file apply."""

    name: str
    parameter: bool = False


def owners_of(stored: Iterable[str], config: PeftConfig) -> tuple[dict[str, Owner], list[Problem]]:
    """Return the owner of each module name in a file, in natural order, and the names that have none."""
    nested: defaultdict[str, dict[int, str]] = defaultdict(dict)  # module -> depth -> name in the file
    owners, problems = {}, []
    for name in sorted(stored, key=_natural):
        module = re.sub(r"\.base_layer(?=\.|$)", "", name)
        depth = len(re.search(r"(\.base_layer)*$", name).group()) // len(NESTED)  # type: ignore[union-attr]
        if depth in nested[module]:
            problems.append(Problem(name, f"{nested[module][depth]} has the same module"))
        nested[module].setdefault(depth, name)
    for module, by_depth in nested.items():
        depths = sorted(by_depth, reverse=True)
        parameters, unsure = _parameters_of(module, depths[0] + 1, config)
        if not parameters and len(depths) == 1:
            owners[by_depth[depths[0]]] = Owner(module)
        elif depths[0] >= len(parameters):
            problems.append(Problem(
                by_depth[depths[0]], f"is nested {depths[0] + 1} deep, but target_parameters in adapter_config.json "
                f"names {len(parameters)} of the module's parameters; name each by its full path",
            ))  # fmt: skip
        else:
            problems += [unsure] if unsure else []
            for depth in depths:
                owners[by_depth[depth]] = Owner(f"{module}.{parameters[-1 - depth]}", parameter=True)
    return owners, problems


def _parameters_of(module: str, depth: int, config: PeftConfig) -> tuple[list[str], Problem | None]:
    """Return the parameters of `module` that PEFT wraps, in the order of their declaration; none if it wraps itself.

    A bare entry of target_parameters names the parameter of every module that has it, which only the base knows.
    """
    if not config.target_parameters or (depth == 1 and config.targets(module)):
        return [], None
    entries = [entry.rpartition(".") for entry in config.target_parameters]
    known = dict.fromkeys(leaf for path, _, leaf in entries if path and f".{module}".endswith(f".{path}"))
    if len(known) < depth:
        known |= dict.fromkeys(leaf for path, _, leaf in entries if not path)
    unsure = None
    if len(known) > 1 and not set(known) <= set(DECLARED):
        listed = ", ".join(known)
        unsure = Problem(
            module, f"assumed to declare its parameters in the order of target_parameters ({listed}); if the model "
            "declares them in another order, reorder that list", fatal=False,
        )  # fmt: skip
        return list(known), unsure
    return sorted(known, key=DECLARED.index) if len(known) > 1 else list(known), None


def stored_names(owners: Mapping[str, bool]) -> dict[str, str]:
    """Return the module name under which PEFT saves each name; the value tells whether it is a parameter."""
    wrapped: defaultdict[str, list[str]] = defaultdict(list)
    for name, parameter in owners.items():
        if parameter:
            wrapped[name.rpartition(".")[0]].append(name)
    stored = {}
    for names in wrapped.values():
        if {name.rpartition(".")[2] for name in names} <= set(DECLARED):
            names.sort(key=lambda name: DECLARED.index(name.rpartition(".")[2]))
    for name, parameter in owners.items():
        module = name.rpartition(".")[0] if parameter else name
        nesting = len(wrapped[module]) - 1 - wrapped[module].index(name) if parameter else 0
        stored[name] = _inside(module, wrapped) + NESTED * nesting
    return stored


def _inside(module: str, wrapped: Mapping[str, list[str]]) -> str:
    """Return the path of `module`, which is inside PEFT's wrappers of its parents."""
    parts = module.split(".")
    path = parts[0]
    for at, part in enumerate(parts[1:], 1):
        path += NESTED * len(wrapped.get(".".join(parts[:at]), ())) + f".{part}"
    return path


@lru_cache(NAMES)
def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split("."))
