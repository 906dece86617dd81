"""Adapters in a live model: the same weights as `merge` writes, and removed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from standin_gpu import standin
from test_merge import weights
from torch import nn

import adapterkit
from adapterkit.algebra.updates import Update
from adapterkit.errors import FitError, UsageError
from adapterkit.kernels import gpu
from adapterkit.merging.live import weights as live
from adapterkit.merging.live.weights import adder, fingerprint

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
KINDS = [torch.bfloat16, torch.float16, torch.float32]


class Model(nn.Module):
    """A few layers, with names that adapters target."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.q = nn.Linear(40, 24, dtype=dtype)
        self.k = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.embed = nn.Embedding(17, 40, dtype=dtype)
        self.conv = nn.Conv2d(3, 5, 2, dtype=dtype)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["tiny-rslora", "tiny-patterns", "tiny-dora", "tiny-embed-save"])
def test_apply_equals_merge_and_remove_restores(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    base, adapter = FIXTURES / "bases" / "tiny-llama", adapterkit.load(FIXTURES / name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = bits(model)
    adapterkit.merge(base, [FIXTURES / name], tmp_path / "out")
    adapterkit.apply(model, adapter)
    after, merged = model.state_dict(), weights(tmp_path / "out")
    changed = 0
    for tensor, expected in merged.items():
        if tensor in after:
            close = torch.isclose(after[tensor].float(), expected.float(), rtol=2**-7, atol=0)
            assert bool(close.all()) and (after[tensor] != expected).float().mean() < 1e-3
            changed += not torch.equal(after[tensor].view(torch.uint8), before[tensor])
    assert changed >= 4
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_remove_restores_every_bit(make_adapter: Callable[..., Path], dtype: torch.dtype, size: float) -> None:
    model = Model(dtype)
    with torch.no_grad():
        model.q.weight[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7]).to(dtype)
    tensors = factors("q", 24, 40, size=size) | factors("k", 24, 40, size=size)
    tensors |= {"embed.lora_embedding_A": torch.randn(4, 17) * size, "embed.lora_embedding_B": torch.randn(40, 4)}
    tensors |= {"conv.lora_A.weight": torch.randn(4, 3, 2, 2) * size, "conv.lora_B.weight": torch.randn(5, 4, 1, 1)}
    adapter = adapterkit.load(make_adapter(tensors))
    before = bits(model)
    adapterkit.apply(model, adapter, 0.7)
    exact = model.k.weight.data.double()
    delta = adapter["k"].B.double() @ adapter["k"].A.double() * adapter.modules["k"].scaling * 0.7
    original = before["k.weight"].view(dtype).view(24, 40).double()
    assert torch.allclose(exact, original + delta, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * size**2 + 1e-6)
    assert not same(bits(model), before)
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)


def test_adapters_stack_and_swap(make_adapter: Callable[..., Path]) -> None:
    model = Model()
    a, b = (adapterkit.load(make_adapter(factors("q", 24, 40), name)) for name in ("a", "b"))
    before = bits(model)
    adapterkit.apply(model, a)
    with_a = bits(model)
    adapterkit.apply(model, b, 0.5)
    with pytest.raises(UsageError, match="another adapter was applied after"):
        adapterkit.remove(model, a)
    with pytest.raises(UsageError, match="already in the model"):
        adapterkit.apply(model, b)
    adapterkit.remove(model, b)
    assert same(bits(model), with_a)
    adapterkit.remove(model, a)
    assert same(bits(model), before)
    with pytest.raises(UsageError, match="not in the model"):
        adapterkit.remove(model, a)
    adapterkit.apply(model, b)
    adapterkit.remove(model, b)
    assert same(bits(model), before)


def test_biases_tokens_and_replaced_tensors(make_adapter: Callable[..., Path]) -> None:
    model = Model()
    before = bits(model)
    lora_bias = factors("q", 24, 40) | {"q.lora_B.bias": torch.randn(24)}
    saved = {"k.weight": torch.randn(24, 40), "q.bias": torch.randn(24)}
    adapter = adapterkit.load(make_adapter(lora_bias, "biased", lora_bias=True))
    adapterkit.apply(model, adapter)
    expected = before["q.bias"].view(torch.bfloat16).double() + adapter["q"].bias.double() * 1.5
    assert torch.equal(model.q.bias.data, expected.bfloat16())
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)
    whole = adapterkit.load(make_adapter(factors("q", 24, 40) | {"k.weight": saved["k.weight"]}, modules_to_save=["k"]))
    adapterkit.apply(model, whole)
    assert torch.equal(model.k.weight.data, saved["k.weight"].bfloat16())
    adapterkit.remove(model, whole)
    assert same(bits(model), before)


def test_an_adapter_that_does_not_fit_leaves_the_model_unchanged(make_adapter: Callable[..., Path]) -> None:
    model = Model()
    before = bits(model)
    for tensors, message in [
        (factors("q", 24, 40) | factors("nowhere", 24, 40), "1 module not found in the model: nowhere"),
        (factors("q", 24, 40) | factors("k", 25, 40), "the base weight is"),
        (factors("q", 24, 40) | {"k.lora_A.weight": torch.full((4, 40), torch.nan), "k.lora_B.weight": torch.ones(24, 4)},
         "is NaN or Inf"),
    ]:  # fmt: skip
        adapter = adapterkit.load(make_adapter(tensors, message.replace(" ", "-").replace(":", "")))
        with pytest.raises(FitError, match=message):
            adapterkit.apply(model, adapter)
        assert same(bits(model), before)


def test_a_tied_weight_is_untied_and_tied_again(make_adapter: Callable[..., Path]) -> None:
    model = Model()
    model.k.weight = model.q.weight
    before = bits(model)
    for tensors, config in (
        (factors("q", 24, 40), {}),
        ({"q.weight": torch.randn(24, 40)}, {"modules_to_save": ["q"]}),
    ):
        adapter = adapterkit.load(make_adapter(tensors, "saved" if config else "factors", **config))
        adapterkit.apply(model, adapter)
        after = bits(model)
        assert torch.equal(after["k.weight"], before["k.weight"])
        assert not torch.equal(after["q.weight"], before["q.weight"])
        adapterkit.remove(model, adapter)
        assert model.k.weight is model.q.weight and same(bits(model), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layers_become_dense_and_are_put_back(make_adapter: Callable[..., Path], kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Model()
    if kind == "nf4":
        layer: Any = bitsandbytes.nn.Linear4bit(40, 24, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        layer.weight = bitsandbytes.nn.Params4bit(
            model.k.weight.data.clone(), requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(model.k.weight.data.clone(), requires_grad=False)
    model.k = layer.to("cpu")
    adapter = adapterkit.load(make_adapter(factors("k", 24, 40)))
    x = torch.randn(3, 40).bfloat16()
    before = model.k(x)
    stored = model.k.weight.data.clone()
    adapterkit.apply(model, adapter)
    assert type(model.k) is nn.Linear
    delta = adapter["k"].B.double() @ adapter["k"].A.double() * 1.5
    got = nn.functional.linear(x.double(), model.k.weight.double() - delta)
    assert torch.allclose(got, before.double(), atol=0.15)
    adapterkit.remove(model, adapter)
    assert model.k is layer and torch.equal(model.k.weight.data, stored)


def test_remove_accepts_a_moved_model_and_refuses_a_changed_one(make_adapter: Callable[..., Path]) -> None:
    model = Model()
    adapter = adapterkit.load(make_adapter(factors("q", 24, 40) | factors("k", 24, 40)))
    before = bits(model)
    adapterkit.apply(model, adapter)
    for parameter in model.parameters():  # as `to` another device does: the parameters stay, their memory does not
        parameter.data = parameter.data.clone()
    with_adapter = bits(model)
    model.float()
    with pytest.raises(UsageError, match=r"is torch\.float32 .*, was torch\.bfloat16"):
        adapterkit.remove(model, adapter)
    model.bfloat16()
    with torch.no_grad():
        model.k.weight[3, 3] += 1
    changed = bits(model)
    with pytest.raises(UsageError, match=r"k\.weight: has changed since"):
        adapterkit.remove(model, adapter)
    assert same(bits(model), changed)
    with torch.no_grad():
        model.k.weight.copy_(with_adapter["k.weight"].view(torch.bfloat16).view(24, 40))
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", ["plain", "dora", "bias", "replaced", "int8"])
def test_an_overflow_leaves_the_model_unchanged(make_adapter: Callable[..., Path], kind: str) -> None:
    model, tensors, config = Model(torch.float16), factors("q", 24, 40), {}
    if kind == "plain":
        tensors["q.lora_B.weight"] *= 1e7
    elif kind == "dora":
        tensors["q.lora_magnitude_vector"], config = torch.full((24,), 1e7), {"use_dora": True}
    elif kind == "bias":
        tensors["q.lora_B.bias"], config = torch.full((24,), 6e4), {"lora_bias": True}
    elif kind == "replaced":
        tensors, config = {"k.weight": torch.full((24, 40), 7e4)}, {"modules_to_save": ["k"]}
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear8bitLt(40, 24, bias=True, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(model.q.weight.data.clone(), requires_grad=False)
        layer.bias = model.q.bias
        model.q, tensors["q.lora_B.weight"] = layer.to("cpu"), tensors["q.lora_B.weight"] * 1e7
    before, layers = bits(model), dict(model.named_modules())
    with pytest.raises(FitError, match="(weight|bias): a weight would exceed 65504, the maximum of float16"):
        adapterkit.apply(model, adapterkit.load(make_adapter(tensors, **config)))
    assert same(bits(model), before) and dict(model.named_modules()) == layers


def swap(tensor: torch.Tensor, one: Any, other: Any) -> None:
    tensor[one], tensor[other] = tensor[other].clone(), tensor[one].clone()


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "swapped rows": lambda weight: swap(weight, 3, 17),
    "swapped elements": lambda weight: swap(weight, (3, 5), (3, 6)),
    "elements of two rows": lambda weight: swap(weight, (3, 5), (4, 5)),
    "one up, one down": lambda weight: weight.view(torch.int16)[5, :2].add_(torch.tensor([1, -1])),
    "rows in reverse": lambda weight: weight.copy_(weight.flip(0)),
    "the lowest bit": lambda weight: weight.view(torch.int16)[7, 11].bitwise_xor_(1),
    "the sign of a zero": lambda weight: weight[1, 1].neg_(),
    "a sign": lambda weight: weight[2, 2].neg_(),
}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", ["plain", "dora", "replaced"])
def test_remove_refuses_any_changed_bit(make_adapter: Callable[..., Path], dtype: torch.dtype, kind: str) -> None:
    model, tensors = Model(dtype), factors("q", 24, 40)
    tensors["q.lora_B.weight"][1] = tensors["q.lora_A.weight"][:, 1] = 0.0
    if kind == "dora":
        tensors["q.lora_magnitude_vector"] = torch.rand(24) + 0.1
    if kind == "replaced":
        tensors = {"q.weight": torch.randn(24, 40), "q.bias": torch.zeros(24)}
        tensors["q.weight"][1, 1] = 0.0
    model.q.weight.data[1, 1] = 0.0
    config = {"modules_to_save": ["q"]} if kind == "replaced" else {"use_dora": kind == "dora"}
    adapter, before = adapterkit.load(make_adapter(tensors, **config)), bits(model)
    adapterkit.apply(model, adapter)
    with_adapter = model.q.weight.data.clone()
    assert with_adapter[1, 1] == 0.0
    for name, change in CHANGES.items():
        change(model.q.weight.data)
        with pytest.raises(UsageError, match=r"q\.weight: has changed since"):
            adapterkit.remove(model, adapter)
            pytest.fail(name)
        model.q.weight.data.copy_(with_adapter)
    layer = model.q
    del model.q
    with pytest.raises(UsageError, match=r"q\.(weight|bias): no longer in the model"):
        adapterkit.remove(model, adapter)
    model.q = layer
    adapterkit.remove(model, adapter)
    assert bits(model).keys() == before.keys() and all(torch.equal(bits(model)[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [*KINDS, torch.float64, torch.float8_e4m3fn])
def test_a_fingerprint_depends_on_every_bit_and_position(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(6, 10).to(dtype)
    seen = {fingerprint(values)}
    raw = values.view(torch.uint8)
    for at in range(0, raw.numel(), 7):
        for bit in range(8):
            raw.view(-1)[at] ^= 1 << bit
            seen.add(fingerprint(values))
            raw.view(-1)[at] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(range(0, raw.numel(), 7))
    whole = fingerprint(values)
    monkeypatch.setattr(live, "BLOCK_ELEMENTS", 20)
    assert fingerprint(values) == fingerprint(values.T.contiguous().T) == whole
    assert fingerprint(values[0]) == fingerprint(values[0].clone()) != fingerprint(values[1])
    assert fingerprint(values[:0]) == fingerprint(values[0, :0]) == 0


@pytest.mark.parametrize("broken", ["record", "add_updates", "set_module"])
def test_an_interrupted_apply_leaves_the_model_unchanged(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(live, "BLOCK_ELEMENTS", 200)
    model, calls = Model(), []
    adapter = adapterkit.load(
        make_adapter(factors("q", 24, 40) | factors("k", 24, 40) | {"q.bias": torch.randn(24)}, bias="all")
    )
    if broken == "set_module":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(model.k.weight.data.clone(), requires_grad=False)
        model.k = layer.to("cpu")
    before, layers, whole = bits(model), dict(model.named_modules()), getattr(live, broken)

    def fails(*args: Any) -> Any:
        calls.append(1)
        result = whole(*args)
        if len(calls) == (1 if broken == "set_module" else 7):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(live, broken, fails)
    with pytest.raises(KeyboardInterrupt):
        adapterkit.apply(model, adapter)
    assert same(bits(model), before) and dict(model.named_modules()) == layers
    with pytest.raises(UsageError, match="not in the model"):
        adapterkit.remove(model, adapter)


def test_block_size_does_not_matter(make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BLOCK_ELEMENTS", 200)
    model = Model()
    adapter = adapterkit.load(make_adapter(factors("q", 24, 40)))
    before = bits(model)
    adapterkit.apply(model, adapter)
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)


GPUS = ["standin", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]


@pytest.mark.parametrize("gpu_name", GPUS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_remove_restores_every_bit_on_a_gpu(
    make_adapter: Callable[..., Path], gpu_name: str, dtype: torch.dtype, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu_name == "standin":
        standin()
        monkeypatch.setattr(gpu, "triton", None)
        monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    model, on_cpu = Model(dtype), Model(dtype)
    on_cpu.load_state_dict(model.state_dict())
    model.to(gpu_name)
    tensors = factors("q", 24, 40) | factors("k", 24, 40)
    if dora:
        tensors |= {f"{name}.lora_magnitude_vector.weight": torch.rand(24) + 0.5 for name in "qk"}
    adapter = adapterkit.load(make_adapter(tensors, use_dora=dora))
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    adapterkit.apply(model, adapter)
    adapterkit.apply(on_cpu, adapter)
    for name, tensor in model.state_dict().items():
        off = (tensor.cpu().double() - on_cpu.state_dict()[name].double()).abs()
        assert bool((off <= tensor.cpu().double().abs() * torch.finfo(dtype).eps).all())
    assert not torch.equal(model.q.weight.cpu(), before["q.weight"])
    adapterkit.remove(model, adapter)
    after = model.state_dict()
    assert all(
        torch.equal(tensor.view(torch.uint8), after[name].cpu().view(torch.uint8)) for name, tensor in before.items()
    )


@pytest.mark.parametrize("together", [True, False])
def test_one_pass_is_within_half_an_ulp_and_undone(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """As on a GPU, by torch's operations."""
    monkeypatch.setattr(live, "_has_kernel", lambda matrix: matrix.dtype is torch.bfloat16)
    monkeypatch.setattr(gpu, "triton", None)
    monkeypatch.setattr(live, "BLOCK_ELEMENTS", 200)
    weight = torch.randn(24, 40).bfloat16()
    start = 12 if not together else 8
    left, right = torch.randn(24, 4) * 0.1, torch.randn(4, 40) * 0.1
    updates = [Update(0, 12, left[:12], right, 0.7), Update(start, 24, left[start:], right, -1.3)]
    matrix = weight.clone()
    add = adder(matrix, updates)
    for first in range(0, 24, 5):
        add(first, min(24, first + 5))
    exact = weight.double()
    exact[:12] += 0.7 * left[:12].double() @ right.double()
    exact[start:] -= 1.3 * left[start:].double() @ right.double()
    assert bool(((matrix.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.01 + 1e-7).all())
    model = Model()
    before = bits(model)
    adapter = adapterkit.load(make_adapter(factors("q", 24, 40)))
    adapterkit.apply(model, adapter)
    assert not same(bits(model), before)
    adapterkit.remove(model, adapter)
    assert same(bits(model), before)
