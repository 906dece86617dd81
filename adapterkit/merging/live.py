"""Adapters merged into a model that is already in memory, in place, and taken out again bit for bit.

Plain updates of 16- and 32-bit weights are undone by a residual, a few percent of the weights' size. What else an
adapter changes (DoRA, biases, replaced tensors) is kept as it was. A layer in 4 or 8 bits is replaced by a dense one,
since quantizing the sum again would erase the update; taking the adapter out puts the quantized layer back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import isfinite, prod
from numbers import Real
from typing import Any, cast

import torch
from torch import nn

from adapterkit.adapter.weights import Adapter, load_weights
from adapterkit.algebra.residual import Residual, record, restore
from adapterkit.algebra.rounding import as_bfloat16, round_once
from adapterkit.algebra.updates import Update, add_updates, update_for
from adapterkit.base.architectures import ALWAYS_TIED
from adapterkit.base.quant.quantized_layers import dequantized, is_quantized
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.targets import Fit, Target, fit
from adapterkit.base.ties import declared
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import TORCH_NAMES
from adapterkit.merging.blocks.device import exact_products
from adapterkit.merging.blocks.overflow import check_finite, check_overflow

BLOCK_ELEMENTS = 1 << 22  # of a weight, at a time
GPU_FACTOR = 4  # so many times that on a GPU, where every launch costs some µs


@dataclass(frozen=True, slots=True)
class _Seen:
    """A tensor as an adapter left it, by its fingerprint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fingerprint: int


@dataclass
class AppliedAdapter:
    """One adapter in a model: which, what takes it out again, to be run backwards, and what must not have changed."""

    adapter: Adapter
    undo: list[Callable[[], object]] = field(default_factory=list)
    after: dict[str, _Seen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A model's tensor as `targets.fit` looks at it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


RECEIPTS = "_adapterkit_receipts"  # the attribute of a model that holds them, oldest first


@torch.no_grad()
@exact_products()
def apply(model: nn.Module, adapter: Adapter, weight: float = 1.0) -> None:
    """Merge `weight · adapter` into `model`, in place: `W + weight · s · B·A`, rounded once.

    Raises FitError where anything of the adapter has no place or does not fit; the model is then as it was.
    """
    if not isinstance(model, nn.Module) or not isinstance(adapter, Adapter):
        found = f"{type(model).__name__} and {type(adapter).__name__}"
        raise UsageError(f"apply: expected a torch.nn.Module and an Adapter (see adapterkit.load), found {found}")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not isfinite(weight):
        raise UsageError(f"weight {weight!r}: expected a finite number")
    receipts: list[AppliedAdapter] = getattr(model, RECEIPTS, [])
    if any(receipt.adapter is adapter for receipt in receipts):
        raise UsageError("this adapter is in the model already: remove it before applying it again")
    found = {name: _described(name, model) for name, _ in model.named_parameters(remove_duplicate=False)}
    config = _config_of(model)
    places = fit(adapter, found, config)
    if places.missing:
        raise FitError(
            f"{len(places.missing)} modules not found in the model: {explain_missing(places.missing, found)}"
        )
    targeted = dict.fromkeys(target.tensor for targets in places.targets.values() for target in targets)
    tokens = [(tensor, *adapter.tokens[module]) for module, tensor in places.tokens.items()]
    tokens += [(head, *rest) for tensor, *rest in tokens if (head := _head_of(model, config, tensor, places))]
    others = (*places.replaced.values(), *(tensor for tensor, *_ in tokens), *places.biases.values())
    receipt = AppliedAdapter(adapter)
    try:
        _untie(model, adapter, places, receipt.undo)
        for name, tensor in places.replaced.items():
            _replace(model, tensor, adapter.replaced[name].read(), weight, None, receipt.undo)
        for tensor, rows, values in tokens:
            _replace(model, tensor, values.read(), weight, rows, receipt.undo)
        for tensor in targeted:
            _merge_into(model, tensor, _updates(adapter, places.targets, tensor, model, weight), receipt.undo)
        for module, bias in places.biases.items():
            weights = adapter.modules[module]
            assert weights.bias is not None
            _add_to(model, bias, weights.bias.read(), weight * weights.scaling, receipt.undo)
        receipt.after = {name: _seen(model.get_parameter(name).data) for name in dict.fromkeys((*targeted, *others))}
    except BaseException:
        _run_backwards(receipt)
        raise
    setattr(model, RECEIPTS, [*receipts, receipt])


@torch.no_grad()
@exact_products()
def remove(model: nn.Module, adapter: Adapter) -> None:
    """Take `adapter` out of `model` again, which may have moved to another device: every bit is as before `apply`.

    Raises UsageError where it is not in the model, another was applied after it, or the weights have changed since.
    """
    receipts: list[AppliedAdapter] = getattr(model, RECEIPTS, [])
    if not any(receipt.adapter is adapter for receipt in receipts):
        raise UsageError("this adapter is not in the model")
    if receipts[-1].adapter is not adapter:
        raise UsageError("another adapter was applied after this one: remove that first")
    for name, then in receipts[-1].after.items():
        _check_unchanged(model, name, then)
    _run_backwards(receipts.pop())


def _run_backwards(receipt: AppliedAdapter) -> None:
    while receipt.undo:
        receipt.undo.pop()()


# --- one weight ------------------------------------------------------------------------------------------------------


def _merge_into(model: nn.Module, name: str, updates: list[Update], undo: list[Callable[[], object]]) -> None:
    """Add `updates` to the weight `name`."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if is_quantized(layer):
        dense = _dense(layer)
        undo.append(lambda: _set(model, path, layer))
        _set(model, path, dense)
        _add(dense.weight.data, updates, name)
        return
    data = getattr(layer, leaf).data
    if any(update.renormalizes for update in updates):
        _keep(model, name, undo)
        _add(data, updates, name)
        return
    matrix = _matrix(data, updates)
    done: list[tuple[int, int, Residual]] = []  # rows, and what restores them

    def run() -> None:
        now = _matrix(model.get_parameter(name).data, updates)
        here = [update.to(now.device) for update in updates]
        for first, last, residual in done:
            now[first:last] = restore(now[first:last], first, here, residual.to(now.device))

    undo.append(run)
    add = adder(matrix, updates)
    for first, last in _blocks(matrix):
        before = matrix[first:last].clone()
        try:
            add(first, last)
            check_overflow(before, matrix[first:last], name)
            done.append((first, last, record(before, matrix[first:last], first, updates)))
        except BaseException:
            matrix[first:last] = before
            raise


def _seen(tensor: torch.Tensor) -> _Seen:
    return _Seen(tensor.dtype, tuple(tensor.shape), fingerprint(tensor))


def _check_unchanged(model: nn.Module, name: str, then: _Seen) -> None:
    """Refuse a weight of which a bit has changed; another device is fine."""
    try:
        now = model.get_parameter(name).data
    except AttributeError as error:
        raise UsageError(f"{name}: is not in the model any more, so the adapter cannot be taken out of it") from error
    if (now.dtype, tuple(now.shape)) != (then.dtype, then.shape):
        raise UsageError(f"{name}: is {now.dtype} {tuple(now.shape)} now; the adapter was applied to {then.dtype}")
    if fingerprint(now) != then.fingerprint:
        raise UsageError(f"{name}: has changed since the adapter was applied, so the old bits cannot be restored")


def fingerprint(values: torch.Tensor) -> int:
    """`Σ aᵢ·bⱼ·wᵢⱼ` modulo 2⁶⁴ over words of 16 bits, with random odd numbers a by row and b by column.

    One changed word always changes it, any other change (rows or elements that are swapped) but for a chance of some
    2⁻⁴⁰. It takes one pass, on any device.
    """
    rows = values.contiguous().flatten(1) if values.dim() > 1 else values.reshape(1, -1)
    words = rows.view(torch.int8 if values.element_size() == 1 else torch.int16)
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**62), 2**62, (size,), generator=rng).to(values.device) * 2 + 1 for size in words.shape)
    total = sum(int(((words[i:j] * b).sum(1) * a[i:j]).sum()) for i, j in _blocks(words))
    return total % 2**64


def _add(data: torch.Tensor, updates: list[Update], name: str) -> None:
    matrix = _matrix(data, updates)
    add = adder(matrix, updates)
    for first, last in _blocks(matrix):
        before = matrix[first:last].clone()
        add(first, last)
        check_overflow(before, matrix[first:last], name)


def adder(matrix: torch.Tensor, updates: list[Update]) -> Callable[[int, int], None]:
    """What adds `updates` to rows `first:last` of `matrix` in place, rounded once.

    On a bf16 weight a GPU sums, adds and rounds in one pass: within half a unit in the last place and 2⁻⁹ of one, as
    what it rounds is a sum in float32. Updates of the same rows would so be rounded one after the other.
    """

    def add(first: int, last: int) -> None:
        sums = matrix[first:last].to(updates[0].left.dtype, copy=True)
        add_updates(sums, first, updates)
        matrix[first:last] = round_once(sums, matrix.dtype) if sums.dtype is torch.float64 else sums.to(matrix.dtype)

    def add_in_one_pass(first: int, last: int) -> None:
        for update, (left, right) in zip(updates, factors, strict=True):
            start, stop = max(first, update.start), min(last, update.stop)
            if start < stop:
                rows, share = matrix[start:stop], left[start - update.start : stop - update.start]
                torch.addmm(rows, share, right, alpha=update.strength, out=rows)

    spans = sorted((update.start, update.stop) for update in updates)
    meet = any(start < stop for (_, stop), (start, _) in pairwise(spans))
    if not _sums_in_float32(matrix) or meet or any(update.renormalizes for update in updates):
        return add
    factors = [as_bfloat16(update.left, update.right) for update in updates]
    return add_in_one_pass


def _sums_in_float32(matrix: torch.Tensor) -> bool:
    """Whether a product of bf16 factors is summed and added to such a weight in float32."""
    return matrix.is_cuda and matrix.dtype is torch.bfloat16


def _updates(
    adapter: Adapter, places: dict[str, tuple[Target, ...]], tensor: str, model: nn.Module, weight: float
) -> list[Update]:
    """The updates of every module that lands in `tensor`, on its device."""
    path, _, leaf = tensor.rpartition(".")
    layer = model.get_submodule(path)
    parameter: torch.Tensor = getattr(layer, leaf)
    shape = _shape(layer, parameter)
    updates = []
    for module, targets in places.items():
        for target in (target for target in targets if target.tensor == tensor):
            weights = adapter.modules[module]
            if weights.magnitude is not None and target.transposed:
                raise FitError(f"{module}: DoRA on a weight stored transposed is not supported in a live model")
            depth = shape[0] * shape[1] if target.expert is not None and target.rows is not None else shape[0]
            wide = parameter.dtype in (torch.float32, torch.float64) or weights.magnitude is not None
            update = update_for(
                load_weights(weights), weight, target.rows or (0, depth), target.delta_rows, target.expert,
                target.transposed, torch.float64 if wide else torch.float32, where=module,
            )  # fmt: skip
            updates.append(update.to(parameter.device))
    return updates


def _matrix(data: torch.Tensor, updates: list[Update]) -> torch.Tensor:
    """`data` seen as rows as long as the updates' are."""
    return data.view(-1, updates[0].right.shape[1]) if data.is_contiguous() else _refuse_strides(data)


def _refuse_strides(data: torch.Tensor) -> torch.Tensor:
    raise FitError(f"a weight of {tuple(data.shape)} is not contiguous in memory; make it so first")


def _blocks(matrix: torch.Tensor) -> list[tuple[int, int]]:
    elements = BLOCK_ELEMENTS * (GPU_FACTOR if matrix.is_cuda else 1)
    step = max(1, elements // max(1, matrix.shape[1]))
    return [(first, min(len(matrix), first + step)) for first in range(0, len(matrix), step)]


# --- whole tensors ---------------------------------------------------------------------------------------------------


def _add_to(model: nn.Module, name: str, vector: torch.Tensor, scale: float, undo: list[Callable[[], object]]) -> None:
    data = model.get_parameter(name).data
    _keep(model, name, undo)
    before = data.double()
    data.copy_(round_once(before + vector.to(data.device).double() * scale, data.dtype))
    check_overflow(before, data, name)


def _replace(
    model: nn.Module,
    name: str,
    values: torch.Tensor,
    weight: float,
    rows: tuple[int, ...] | None,
    undo: list[Callable[[], object]],
) -> None:
    """Go `weight` of the way to `values`, for some rows or all."""
    data = model.get_parameter(name).data
    at = slice(None) if rows is None else list(rows)
    if data[at].shape != values.shape:
        raise FitError(f"{name}: the adapter brings {tuple(values.shape)}, the model has {tuple(data[at].shape)}")
    _keep(model, name, undo)
    old, new = data[at].double(), values.to(data.device).double()
    check_finite(new, name)
    data[at] = round_once(old + weight * (new - old) if weight != 1.0 else new, data.dtype)
    check_overflow(new if weight == 1.0 else old + new, data[at], name)


def _keep(model: nn.Module, name: str, undo: list[Callable[[], object]]) -> None:
    """Keep a tensor as it is, to put it back."""
    before = model.get_parameter(name).data.clone()
    undo.append(lambda: model.get_parameter(name).data.copy_(before))


# --- layers ----------------------------------------------------------------------------------------------------------


def _described(name: str, model: nn.Module) -> _Parameter:
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    parameter: torch.Tensor = getattr(layer, leaf)
    names = {f"torch.{torch_name}": stored for stored, torch_name in TORCH_NAMES.items()}
    return _Parameter(name, names.get(str(parameter.dtype), "U8"), _shape(layer, parameter))


def _shape(layer: nn.Module, parameter: torch.Tensor) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)
    return (
        tuple(state.shape) if state is not None and parameter.numel() != prod(state.shape) else tuple(parameter.shape)
    )


def _dense(layer: nn.Module) -> nn.Linear:
    """A linear layer with what a bitsandbytes layer computes with."""
    values = dequantized(layer)
    dense = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(values, requires_grad=False)
    dense.bias = cast(Any, layer).bias
    return dense.train(layer.training)


def _set(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


# --- tied weights ----------------------------------------------------------------------------------------------------


def _untie(model: nn.Module, adapter: Adapter, places: Fit, undo: list[Callable[[], object]]) -> None:
    """Give a tensor that is tied to others its own parameter, where the adapter changes it alone.

    Trained tokens are the same in all that are tied, and so is everything with `ensure_weight_tying`.
    """
    factors = (target.tensor for targets in places.targets.values() for target in targets)
    changed = dict.fromkeys((*factors, *places.replaced.values(), *places.biases.values()))
    for name in changed:
        parameter = model.get_parameter(name)
        tied = [other for other, one in model.named_parameters(remove_duplicate=False) if one is parameter]
        others = [other for other in tied if other != name]
        if others and not (adapter.ensure_weight_tying and changed.keys().isdisjoint(others)):
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            undo.append(partial(_tie, model, layer, leaf, others[0]))
            setattr(layer, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            _declare_untied(model, undo)


def _config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _head_of(model: nn.Module, config: dict[str, Any], tensor: str, places: Fit) -> str | None:
    """The head that tokens trained in the embedding `tensor` are for, too, though it is another parameter.

    PEFT goes by the config alone, and transformers ties no head that was stored with other weights. None where there is
    no such head, or where the adapter says itself what becomes of it.
    """
    embedding, head = (
        getattr(getattr(model, name, lambda: None)(), "weight", None)
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    if not declared(config) or head is None or head is embedding or model.get_parameter(tensor) is not embedding:
        return None
    name = next(name for name, parameter in model.named_parameters() if parameter is head)
    return None if name in (*places.replaced.values(), *places.tokens.values()) else name


def _tie(model: nn.Module, layer: nn.Module, leaf: str, other: str) -> None:
    setattr(layer, leaf, model.get_parameter(other))


def _declare_untied(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Have the model's config say so, by which a saved model is loaded again."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and getattr(config, "model_type", None) not in ALWAYS_TIED:
        undo.append(partial(setattr, config, "tie_word_embeddings", True))
        config.tie_word_embeddings = False
