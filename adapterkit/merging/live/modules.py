"""The modules of a model in memory: their parameters as `fit` sees them, dense replacements, and tied weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import nn

from adapterkit.adapter.weights import Adapter
from adapterkit.base.architectures import ALWAYS_TIED, TEXT_CONFIG_DECIDES
from adapterkit.base.models.quantized_layers import dequantized
from adapterkit.base.targets import Fit
from adapterkit.base.tied_embeddings import declared
from adapterkit.files.safetensors import TORCH_NAMES


@dataclass(frozen=True, slots=True)
class Parameter:
    """A model's parameter as `targets.fit` reads it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def parameters_of(model: nn.Module) -> dict[str, Parameter]:
    """The model's parameters by name, tied ones under each name."""
    return {name: _described(name, model) for name, _ in model.named_parameters(remove_duplicate=False)}


def _described(name: str, model: nn.Module) -> Parameter:
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    parameter: torch.Tensor = getattr(layer, leaf)
    dtypes = {f"torch.{torch_name}": stored for stored, torch_name in TORCH_NAMES.items()}
    return Parameter(name, dtypes.get(str(parameter.dtype), "U8"), shape_of(layer, parameter))


def shape_of(layer: nn.Module, parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a weight, unpacked if it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return (
        tuple(state.shape) if state is not None and parameter.numel() != prod(state.shape) else tuple(parameter.shape)
    )


def dense_layer(layer: nn.Module) -> nn.Linear:
    """A linear layer with the dequantized weight of a bitsandbytes layer."""
    values = dequantized(layer)
    dense = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(values, requires_grad=False)
    dense.bias = cast(Any, layer).bias
    return dense.train(layer.training)


def set_module(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace the module at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def is_nf4(model: nn.Module) -> bool:
    """Whether any layer of the model is quantized to NF4."""
    return any(getattr(parameter, "quant_type", None) == "nf4" for parameter in model.parameters())


def config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


# --- tied weights ----------------------------------------------------------------------------------------------------


def untie(model: nn.Module, adapter: Adapter, found: Fit, undo: list[Callable[[], object]]) -> None:
    """Give a tied tensor a parameter of its own, if the adapter changes it alone.

    Trained tokens change all tied tensors, and with `ensure_weight_tying` everything does.
    """
    factors = (target.tensor for targets in found.targets.values() for target in targets)
    alone = (
        getattr(getattr(model, "config", None), "model_type", None) in TEXT_CONFIG_DECIDES
    )  # PEFT reads the outer one
    tokens = found.tokens.values() if alone else ()
    changed = dict.fromkeys((*factors, *found.replaced.values(), *found.biases.values(), *tokens))
    for name in changed:
        parameter = model.get_parameter(name)
        tied = [other for other, value in model.named_parameters(remove_duplicate=False) if value is parameter]
        others = [other for other in tied if other != name]
        if others and not (adapter.ensure_weight_tying and changed.keys().isdisjoint(others)):
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            undo.append(partial(_tie, model, layer, leaf, others[0]))
            setattr(layer, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            _declare_untied(model, undo)


def _tie(model: nn.Module, layer: nn.Module, leaf: str, other: str) -> None:
    setattr(layer, leaf, model.get_parameter(other))


def _declare_untied(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Set the config's tie_word_embeddings to false, so that a saved model loads untied."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and getattr(config, "model_type", None) not in ALWAYS_TIED:
        undo.append(partial(setattr, config, "tie_word_embeddings", True))
        config.tie_word_embeddings = False


def separate_head(model: nn.Module, config: dict[str, Any], tensor: str, found: Fit) -> str | None:
    """The head that needs what was trained in the embedding `tensor` too, although it is another parameter.

    PEFT follows the config alone, for trained tokens and with `ensure_weight_tying`, while transformers does not tie a
    head that was stored with other weights. None if there is no such head, or if the adapter itself changes it.
    """
    embedding, head = (
        getattr(getattr(model, name, lambda: None)(), "weight", None)
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    if not declared(config) or head is None or head is embedding or model.get_parameter(tensor) is not embedding:
        return None
    name = next(name for name, parameter in model.named_parameters() if parameter is head)
    return None if name in (*found.replaced.values(), *found.tokens.values()) else name


def with_separate_head(model: nn.Module, config: dict[str, Any], adapter: Adapter, found: Fit) -> Fit:
    """Let the factors of the embedding target a separate head too."""
    targets = dict(found.targets)
    known = {target.tensor for places in found.targets.values() for target in places}
    for module, places in found.targets.items():
        if adapter.modules[module].kind == "embedding":
            heads = [(place, separate_head(model, config, place.tensor, found)) for place in places]
            targets[module] += tuple(replace(place, tensor=head) for place, head in heads if head and head not in known)
    return replace(found, targets=targets)
