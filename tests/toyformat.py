"""A test-only format, with file names, keys, factors and scaling unlike those of any other.

`twigs.json` is `{"percent": 150, "size": 4, "on": "ORG/BASE"}`, `twigs.safetensors` holds `<module>/in` (in, r) and
`<module>/out` (r, out): `Δ = percent / 100 · (in · out)ᵀ`.

"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from adapterkit.adapter.formats.format import ConfigFacts
from adapterkit.adapter.formats.source import Source
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.errors import FitError, UnknownStrengthError, UsageError
from adapterkit.files.safetensors import write_tensors

NAME, LIBRARY = "toy", "toylib"
WEIGHTS, PICKLED = ("twigs.safetensors",), ("twigs.pickle",)
CONFIG, BASE_KEY = "twigs.json", "on"


class Unread(dict[str, Any]):
    """A config that no code may use."""

    def _refuse(self, *_: object) -> NoReturn:
        raise AssertionError("an adapter's config was read outside its format")

    __getitem__ = __contains__ = __iter__ = __len__ = __or__ = get = items = keys = values = _refuse  # type: ignore[assignment]


def detect(source: Source) -> bool:
    return any(name.endswith("/in") for name in source.tensors)


def read(source: Source, alpha: float | None, scaling: float | None) -> Adapter:
    config = source.config or {}
    given, percent = alpha is not None or scaling is not None, config.get("percent")
    if percent is None and not given:
        raise UnknownStrengthError(f"{source.config_file}: has no percent", reason=f"no percent in {CONFIG}")
    if percent is not None and given:
        raise UsageError(f"{source.config_file}: already gives the percent")
    modules = {}
    for key in source.tensors:
        name, _, part = key.rpartition("/")
        if part == "in":
            A, B = (_turned(LazyTensor.of(source.tensors[f"{name}/{half}"])) for half in ("in", "out"))
            strength = percent / 100 if percent is not None else scaling if scaling is not None else alpha / A.shape[0]
            modules[name] = LoraWeights(A, B, strength, strength * A.shape[0])
    return Adapter(NAME, modules, base_model=config.get(BASE_KEY), config=Unread(config), files=source.files)


def write(adapter: Adapter, directory: Path) -> None:
    weights, scalings = adapter.modules.items(), {one.scaling for one in adapter.modules.values()}
    if adapter.replaced or adapter.tokens or len(scalings) != 1 or any(one.magnitude is not None for _, one in weights):
        raise FitError("a toy holds factors of one scaling, and nothing else")
    directory.mkdir(parents=True, exist_ok=True)
    halves = {f"{name}/in": _turn(one.A.read()) for name, one in weights}
    write_tensors(directory / WEIGHTS[0], halves | {f"{name}/out": _turn(one.B.read()) for name, one in weights}, {})
    (directory / CONFIG).write_text(json.dumps({"percent": scalings.pop() * 100, BASE_KEY: adapter.base_model}))


def describe_config(config: Mapping[str, Any]) -> ConfigFacts:
    return ConfigFacts("Toy", ranks=(config["size"],) if "size" in config else (), base_model=config.get(BASE_KEY))


def example(repo: str) -> list[str]:
    return ["import toylib", f'toylib.grow("{repo}")']


def _turned(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.source, tensor.shape[::-1], tensor.dtype, _turn)


def _turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous()
