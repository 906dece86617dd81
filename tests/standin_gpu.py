"""A stand-in for a GPU: it computes on the CPU, but like a GPU does not mix its tensors with the CPU's.

It is a backend of torch written in Python (torch's PrivateUse1), so it works in every thread and in TorchScript.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

NAME = "standin"
LIBRARY = torch.library.Library("_", "IMPL")
INDEXED = ("aten::index", "aten::_index", "aten::_unsafe_index")  # with indices from the CPU, as on a GPU


@cache
def standin() -> torch.device:
    """Register the device, once a process; as unavailable, so that no library chooses it by itself."""
    from torch.utils import backend_registration as backends  # not in every version that the tests on a GPU run with

    class Module(backends._DummyBackendModule):
        def is_available(self) -> bool:
            return False

    class Hooks(backends._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return False

    backends._setup_privateuseone_for_python_backend(NAME, Module(), Hooks())
    LIBRARY.fallback(run, "PrivateUse1")  # operations that only create tensors
    return torch.device(NAME, 0)


class OnGpu(torch.Tensor):
    """A tensor on the stand-in; `raw` is its data, on the CPU."""

    raw: torch.Tensor
    is_cuda = True

    @classmethod
    def of(cls, raw: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=standin()
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, *args, **(kwargs or {}))

    # What torch does not offer for tensors like this one.

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> OnGpu:
        return OnGpu.of(torch.tensor(data, dtype=dtype or self.dtype))

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.raw!r})"


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of torch on the data. Raises RuntimeError if some of its tensors are on the CPU."""
    name, known, elsewhere = operation._schema.name, {}, []

    def take(value: Any) -> Any:
        if isinstance(value, OnGpu):
            known[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.Tensor) and value.dim():
            elsewhere.append(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def give(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnGpu.of(value)

    given, options = tree_map(take, args), tree_map(take, kwargs)
    if name in ("aten::copy_", "aten::_copy_from"):
        source, target = (1, 0) if name == "aten::copy_" else (0, 1)
        given[target].copy_(given[source])
        return args[target]
    if known and elsewhere and not name.startswith(INDEXED):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {NAME} and cpu")
    made = operation(*given, **options)
    if name == "aten::_to_copy" and kwargs.get("device", args[0].device).type == "cpu":
        return made
    return tree_map(give, made)
