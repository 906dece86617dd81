"""Find the targets of modules that are single experts where the base stacks them.

`experts.3.gate_proj` is a range of rows of `experts.gate_up_proj`, as in adapters of transformers 4 and of quantized
models with a linear layer per expert; `experts.gate_up_projs.3` is a whole expert of it (Unsloth).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapterkit.adapter.weights import LazyTensor, LoraWeights
from adapterkit.base.architectures import PER_EXPERT, experts_in_out
from adapterkit.base.target import Target
from adapterkit.errors import FitError
from adapterkit.files.safetensors import Weight

PART = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)")
WHOLE = re.compile(r"(?P<experts>.+\.experts)\.(?P<name>\w+)s\.(?P<number>\d+)")


def place_in_stack(
    module: str, weights: LoraWeights[LazyTensor], find: Callable[[str], Weight | None], config: Mapping[str, Any]
) -> tuple[Target, ...]:
    """Return the target of a module that is (part of) one expert of a stack; nothing if the base has no such stack.

    Raises FitError if the stack has fewer experts, if shapes differ, or if nothing tells how the stack is oriented.
    """
    for name, number, index, parts in _stacks(module):
        stack = find(name) or find(f"{name}.weight")
        if stack is None or len(stack.shape) != 3:
            continue
        experts, height, width = stack.shape
        delta = (weights.out_features, weights.in_features)
        if number >= experts:
            raise FitError(f"{module}: the base has {experts} experts, {stack.name} {stack.shape}")
        rows, plain, turned = height // parts, (height // parts, width) == delta, (width, height) == delta
        in_out = experts_in_out(config)
        if parts == 1 and turned and (in_out or not plain):
            if weights.magnitude is not None:
                raise FitError(f"{module}: DoRA of an expert of {stack.name}, stored (in, out), is not supported")
            return (Target(stack.name, (number * height, (number + 1) * height), expert=0, transposed=True),)
        if not plain or in_out:
            stored = "as (in, out), of which parts are not supported" if in_out else "which has other shapes"
            raise FitError(f"{module}: Δ is {delta}; the base stacks experts in {stack.name} {stack.shape}, {stored}")
        if turned and parts == 1 and in_out is None:
            raise FitError(
                f"{module}: Δ is square, and it is unknown whether {stack.name} stores (in, out). Put the base's "
                "config.json beside its weights, so that the architecture is known."
            )
        start = number * height + index * rows
        return (Target(stack.name, (start, start + rows), expert=0),)
    return ()


def _stacks(module: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield the stacks that a module may be in: name, number of the expert, index and number of its parts."""
    if found := PART.fullmatch(module):
        for stack, layouts in PER_EXPERT.items():
            for parts in layouts:
                if found["name"] in parts:
                    at = f"{found['experts']}.{stack}"
                    yield at, int(found["number"]), parts.index(found["name"]), len(parts)
    elif found := WHOLE.fullmatch(module):
        yield f"{found['experts']}.{found['name']}", int(found["number"]), 0, 1
