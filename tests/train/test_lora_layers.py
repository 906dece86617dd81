"""LoRA layers compared with PEFT's and with dense float64 formulas: values, targets, initializations and files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapterkit
from adapterkit.base.models.quantized_layers import dequantized
from adapterkit.errors import FitError, UsageError
from adapterkit.train import Lora, adapter_of, disabled, inject, inject_from, layers, lora_layers, use_fast_products
from adapterkit.train.initial import Factors, start
from adapterkit.train.layers import LoraEmbedding, LoraLayer, LoraLinear, dense_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["lora", "rslora", "dora"]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
RANK, ALPHA = 4, 6.0


class Model(nn.Module):
    """One layer of each kind, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(20, 14)
        self.k = nn.Linear(20, 14, bias=False)
        self.conv1d = transformers.pytorch_utils.Conv1D(26, 20)
        self.embed = nn.Embedding(17, 20)
        with torch.no_grad():
            self.conv1d.weight.normal_()
            self.conv1d.bias.normal_()


def trained(model: nn.Module) -> None:
    """Set factors and magnitudes to values as after training."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.A.normal_(std=0.4)
            layer.B.normal_(std=0.4)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.3 * torch.randn_like(layer.magnitude))


def peft_of(model: nn.Module, method: str, like: nn.Module, **more: Any) -> nn.Module:
    """Return `model` in PEFT, with the factors of `like`."""
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": method == "rslora", "use_dora": method == "dora"} | more
    config.setdefault("target_modules", list(lora_layers(like)))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    found: nn.Module = wrapped.base_model.model.to(next(like.parameters()).dtype)
    for name, layer in lora_layers(like).items():
        for parameter, ours in zip(peft_parameters(found.get_submodule(name)), parameters(layer), strict=True):
            parameter.data = ours.detach().clone()
    return found


def parameters(layer: LoraLayer) -> list[torch.Tensor]:
    return [layer.A, layer.B, *([] if layer.magnitude is None else [layer.magnitude])]


def peft_parameters(layer: Any) -> list[torch.Tensor]:
    embedding = "default" in layer.lora_embedding_A
    factors = (
        [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
        if embedding
        else [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    )
    return [*factors, *(vector.weight for vector in layer.lora_magnitude_vector.values())]


def results(layer: nn.Module, x: torch.Tensor, over: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input, if it has one, and of `over`."""
    torch.manual_seed(1)
    y = layer(x)
    wanted = [*([x] if x.requires_grad else []), *over]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y))]


def off(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = list(zip(found, wanted, strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float((one.double() - other.double()).abs().max() / other.double().abs().max()) for one, other in pairs)


def input_of(name: str, dtype: torch.dtype, features: int = 20) -> torch.Tensor:
    if name == "embed":
        return torch.randint(17, (2, 5))
    return torch.randn(2, 5, features).to(dtype).requires_grad_()


def weight_of(layer: LoraLayer) -> torch.Tensor:
    """Return the effective weight of `layer`, dense in float64: W + s·B·A, or its rows scaled to the magnitude."""
    W = layer.base.weight.t() if isinstance(layer, LoraEmbedding) else dense_of(layer.base)
    A, B = layer.factors()
    V = W.double() + layer.scaling * B.double() @ A.double()
    if layer.magnitude is None:
        return V.detach()
    return (V * (layer.magnitude.double() / V.norm(dim=1))[:, None]).detach()


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
def test_outputs_and_gradients_equal_pefts(method: str, dtype: torch.dtype, limit: float) -> None:
    base = Model().to(dtype)
    ours = copy.deepcopy(base)
    names = inject(ours, Lora(tuple(dict(base.named_children())), RANK, ALPHA, method), dtype)
    trained(ours)
    theirs = peft_of(copy.deepcopy(base), method, ours)
    assert names == ["q", "k", "conv1d", "embed"]
    for name in names:
        layer, other, x = lora_layers(ours)[name], theirs.get_submodule(name), input_of(name, dtype)
        found, wanted = results(layer, x, parameters(layer)), results(other, x, peft_parameters(other))
        assert len(found) == len(wanted) and off(found, wanted) < limit, name
        plain = copy.deepcopy(base.get_submodule(name))
        with torch.no_grad():  # and the weight that a merge would write gives the same output
            W = weight_of(layer)
            plain.weight.copy_(W if name in "qk" else W.T)
        assert off([found[0]], [plain(x).detach()]) < limit, name


def test_alpha_means_the_same_as_in_peft() -> None:
    for method, scaling in (("lora", 6 / 4), ("rslora", 6 / 2), ("dora", 6 / 4)):
        ours = Model()
        inject(ours, Lora(("q",), RANK, ALPHA, method))
        assert lora_layers(ours)["q"].scaling == pytest.approx(scaling)
    assert Lora(rank=5).scaling_of("q") == 2


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_applies_to_the_factors_only(method: str) -> None:
    """The base sees all of x, also with DoRA, where PEFT drops the input of both."""
    model = Model().double()
    inject(model, Lora(("q",), RANK, ALPHA, method, dropout=0.4), torch.float64)
    trained(model)
    layer, x = lora_layers(model)["q"], input_of("q", torch.float64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = torch.empty(10, 20, dtype=torch.float64).bernoulli_(0.6) / 0.6
    assert 0 < int((mask == 0).sum()) < 200
    base, delta = layer.base.weight, 1.5 * layer.B @ layer.A
    wanted = x.view(10, 20) @ base.T + (mask * x.view(10, 20)) @ delta.T
    if layer.magnitude is not None:
        wanted = wanted * (layer.magnitude / (base + delta).norm(dim=1).detach())
    wanted = wanted.view(2, 5, 14) + layer.base.bias
    over = [x, *parameters(layer)]
    G = torch.randn_like(y)
    assert (
        off([y.detach(), *torch.autograd.grad(y, over, G)], [wanted.detach(), *torch.autograd.grad(wanted, over, G)])
        < 1e-12
    )
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), y)


def test_dropout_of_an_embedding() -> None:
    model = Model()
    inject(model, Lora(("embed",), RANK, ALPHA, dropout=0.5))
    trained(model)
    layer, ids = lora_layers(model)["embed"], input_of("embed", torch.float32)
    torch.manual_seed(3)
    y = layer(ids)
    torch.manual_seed(3)
    seen = F.dropout(F.embedding(ids, layer.A.t()), 0.5)
    torch.testing.assert_close(y, layer.base(ids) + seen @ layer.B.t() * 1.5)
    layer.eval()
    torch.testing.assert_close(layer(ids), F.embedding(ids, weight_of(layer).T.float()))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_embedding_with_a_scale(method: str) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = nn.Module()
    base.embed = Gemma3TextScaledWordEmbedding(17, 20, 0, embed_scale=20**0.5)
    ours = copy.deepcopy(base)
    inject(ours, Lora(("embed",), RANK, ALPHA, method))
    trained(ours)
    theirs, layer = peft_of(base, method, ours).get_submodule("embed"), lora_layers(ours)["embed"]
    ids = torch.randint(1, 17, (2, 5))  # 0 is the padding, of which PEFT leaves A as it is
    assert off(results(layer, ids, parameters(layer)), results(theirs, ids, peft_parameters(theirs))) < 1e-5
    torch.testing.assert_close(layer(ids), F.embedding(ids, weight_of(layer).T.float()) * 20**0.5)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 3, 4, 20), (0, 20)])
def test_inputs_of_any_shape_and_empty_ones(shape: tuple[int, ...]) -> None:
    model = Model()
    inject(model, Lora(("q", "k"), RANK, ALPHA, "dora"))
    trained(model)
    use_fast_products(model)
    x = torch.randn(shape, requires_grad=True)
    for layer in (model.q, model.k):
        y = layer(x)
        torch.testing.assert_close(y, F.linear(x, weight_of(layer).float(), layer.base.bias))
        y.sum().backward()
        with disabled(model):
            assert layer(x).shape == (*shape[:-1], 14)


def test_factors_wider_than_the_base() -> None:
    model = Model().bfloat16()
    inject(model, Lora(("q", "embed"), RANK, ALPHA, "dora"))
    trained(model)
    for name, layer in lora_layers(model).items():
        assert {one.dtype for one in parameters(layer)} == {torch.float32}
        x = input_of(name, torch.bfloat16)
        found = results(layer, x, parameters(layer))
        assert [one.dtype for one in found] == [torch.bfloat16] * (1 + x.requires_grad) + [torch.float32] * 3
        exact = (
            F.embedding(x, weight_of(layer).T)
            if name == "embed"
            else x.double() @ weight_of(layer).T + layer.base.bias.double()
        )
        assert off(found[:1], [exact.detach()]) < 0.01


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1 << 18, 50])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_norms_equal_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, elements: int, dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setattr(layers, "NORM_ELEMENTS", elements)
    base = nn.Linear(20, 14, bias=False).double()
    A, B = torch.randn(RANK, 20, dtype=torch.float64), torch.randn(14, RANK, dtype=torch.float64)
    with torch.no_grad():
        base.weight[3] = -1.5 * B[3] @ A + 1e-4 * torch.randn(20)  # W + Δ all but cancels
        base.weight[5] = 0.0
        base.weight[7], B[7] = 0.0, 0.0
        base.weight[9] *= 1e-3
    base, A, B = base.to(dtype), A.to(dtype), B.to(dtype)
    layer = LoraLinear(base, Factors(A, B), 1.5, 0.0, True)
    exact = (base.weight.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    assert exact[3] < 1e-3 and exact[7] == 0
    error = (layer.norm().double() - exact).abs()
    others = torch.arange(14) != 3
    assert bool((error[others] <= limit * exact[others]).all()) and layer.norm()[7] == 0
    # what is left of that row is as exact as its own rounding lets it be
    assert error[3] <= 20 * torch.finfo(dtype).eps * (1.5 * B[3].double() @ A.double()).norm()
    layer.A.data *= 1.7  # norms follow the factors
    exact = (base.weight.double() + 1.5 * B.double() @ layer.A.double()).norm(dim=1)
    torch.testing.assert_close(layer.norm().double(), exact, rtol=limit, atol=0)
    assert bool(layer(torch.randn(3, 20, dtype=dtype)).isfinite().all())


def test_norms_of_transposed_layers() -> None:
    model = Model()
    inject(model, Lora(("conv1d", "embed"), RANK, ALPHA, "dora"))
    trained(model)
    for name, stored in (("conv1d", model.conv1d.base.weight), ("embed", model.embed.base.weight)):
        layer = lora_layers(model)[name]
        V = stored.T.double() + 1.5 * layer.B.double() @ layer.A.double()
        torch.testing.assert_close(layer.norm().double(), V.norm(dim=1), rtol=1e-5, atol=0)


def test_the_initial_magnitude_is_the_norm() -> None:
    model = Model()
    inject(model, Lora(("q",), RANK, ALPHA, "dora"))
    torch.testing.assert_close(model.q.magnitude, model.q.base.weight.norm(dim=1))


# --- 4 bits ----------------------------------------------------------------------------------------------------------


def four_bits(kind: str, nested: bool, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """Return a model with one Linear4bit whose blocks of 64 do not span rows, and its original weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Module()
    layer = bitsandbytes.nn.Linear4bit(
        128, 24, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested
    )
    dense = nn.Linear(128, 24, bias=bias)
    layer.load_state_dict(dense.state_dict())
    model.q, model.is_loaded_in_4bit, model.original = layer.to("cpu"), True, dense.weight.detach().clone()
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_of_4_bits(kind: str, nested: bool, method: str) -> None:
    model = four_bits(kind, nested)
    ours = copy.deepcopy(model)
    inject(ours, Lora(("q",), RANK, ALPHA, method))
    trained(ours)
    layer, x = lora_layers(ours)["q"], input_of("q", torch.float32, 128)
    dense = nn.Module()
    dense.q = nn.Linear(128, 24)
    dense.q.weight.data, dense.q.bias = dequantized(model.q), model.q.bias
    error = (dense.q.weight - model.original).norm() / model.original.norm()
    assert 0.01 < error < 0.2  # it was quantized, and is the weight it was
    same = copy.deepcopy(dense)
    inject(same, Lora(("q",), RANK, ALPHA, method))
    for one, other in zip(parameters(lora_layers(same)["q"]), parameters(layer), strict=True):
        one.data.copy_(other)
    wanted = results(lora_layers(same)["q"], x, parameters(lora_layers(same)["q"]))
    found = results(layer, x, parameters(layer))
    assert off(found, wanted) < 1e-6
    theirs = peft_of(copy.deepcopy(model), method, ours).get_submodule("q")
    assert type(theirs).__name__ == "Linear4bit"
    assert off(found, results(theirs, x, peft_parameters(theirs))) < 2e-5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_compensates_for_the_quantization_error(kind: str) -> None:
    model = four_bits(kind, nested=False)
    W, Q = model.original.double(), dequantized(model.q).double()
    inject(model, Lora(("q",), RANK, ALPHA, init="loftq"), original=lambda name: {"q": model.original}[name])
    made_up = 1.5 * model.q.B.detach().double() @ model.q.A.detach().double()
    S = torch.linalg.svdvals(W - Q)
    left = (W - Q - made_up).norm()
    assert left < 0.95 * (W - Q).norm()
    assert left == pytest.approx(float(S[RANK:].square().sum().sqrt()), rel=1e-3)
    assert model.q.first_A is None  # the base keeps what it is


def test_loftq_needs_a_quantized_base() -> None:
    with pytest.raises(UsageError, match="needs a 16-bit base and `quantize`"):
        inject(Model(), Lora(("q",), init="loftq"), original=lambda name: torch.zeros(14, 20))
    with pytest.raises(UsageError, match="needs a 16-bit base and `quantize`"):
        inject(four_bits("nf4", False), Lora(("q",), init="loftq"))


# --- targets ---------------------------------------------------------------------------------------------------------


def llama(**more: Any) -> Any:
    config = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | more)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(6, 4)}) for _ in range(4))}) for _ in range(3)
    )})})  # fmt: skip


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "suffixes": (llama, {"targets": ("q_proj", "mlp.up_proj")}),
    "whole name": (llama, {"targets": ("model.layers.1.self_attn.v_proj",)}),
    "all linear": (llama, {"targets": "all-linear"}),
    "all linear, tied": (lambda: llama(tie_word_embeddings=True), {"targets": "all-linear"}),
    "regex": (llama, {"targets": r".*\.layers\.[02]\.self_attn\.[qk]_proj"}),
    "head by name": (llama, {"targets": ("lm_head", "q_proj")}),
    "layers": (llama, {"targets": ("q_proj", "down_proj"), "layers": (0, 2)}),
    "layer of experts": (mixtral, {"targets": ("w1",), "layers": (1, 2)}),
    "patterns": (
        llama,
        {
            "targets": "all-linear",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7, "self_attn.q_proj": 3},
            "alpha_pattern": {r"layers\.[12]\.mlp\.up_proj": 9.0, "^model.layers.0.self_attn.q_proj": 11.0},
        },
    ),
    "rslora with patterns": (
        llama,
        {"targets": ("k_proj",), "method": "rslora", "rank_pattern": {"1.self_attn.k_proj": 9}, "alpha_pattern": {"2.self_attn.k_proj": 3}},
    ),
    "gpt2": (gpt2, {"targets": "all-linear"}),
    "gpt2 by name": (gpt2, {"targets": ("c_attn", "mlp.c_proj", "wte"), "layers": None}),
    "gpt2 layers": (gpt2, {"targets": ("c_attn",), "layers": (1,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_targets_ranks_and_scalings_equal_pefts(case: str) -> None:
    make, given = CASES[case]
    ours, theirs = make(), make()
    lora = Lora(rank=RANK, alpha=ALPHA, **given)
    names = inject(ours, lora)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=lora.method == "rslora", layers_to_transform=None if lora.layers is None else list(lora.layers),
        target_modules=list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets,
        rank_pattern=dict(lora.rank_pattern), alpha_pattern=dict(lora.alpha_pattern),
    )  # fmt: skip
    if isinstance(theirs, transformers.PreTrainedModel):
        config.task_type = "CAUSAL_LM"
    wrapped = peft.get_peft_model(theirs, config).base_model.model
    wanted = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert names == list(wanted) == list(lora_layers(ours)) and len(names) > 0
    for name, layer in wanted.items():
        found = lora_layers(ours)[name]
        assert (found.A.shape[0], found.scaling) == (layer.r["default"], pytest.approx(layer.scaling["default"])), name
        assert [p.shape for p in parameters(found)] == [p.shape for p in peft_parameters(layer)]
    assert ("lm_head" in names) is (case == "head by name")
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in names for factor in "AB"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(("q_proj", "qkv")),
            "no module is named 'qkv'; the model has down_proj, gate_proj, k_proj, lm_head, o_proj",
        ),
        (Lora("q_prj"), "no module matches 'q_prj'; the model has down_proj"),
        (Lora(("q_proj",), layers=(7,)), "the model has no layer 7"),
        (Lora(("q_proj",), rank_pattern={"k_proj": 3}), "pattern 'k_proj': matches none of the"),
        (Lora(("norm",)), r"norm: a LlamaRMSNorm cannot have factors; .*q_proj"),
        (Lora(("q_proj",), init="svd"), "init 'svd': expected one of kaiming, gaussian, pissa, olora, loftq"),
    ],
)
def test_errors_for_targets_list_the_possible_ones(lora: Lora, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inject(llama(), lora)


@pytest.mark.parametrize("wrong", [{"method": "ia3"}, {"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_invalid_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Lora(**wrong)


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
@torch.no_grad()
def test_a_model_starts_as_its_base(init: str, method: str) -> None:
    for make in (llama, gpt2):
        model, ids = make(), torch.arange(24).view(2, 12)
        before = model(ids).logits
        inject(model, Lora("all-linear", RANK, ALPHA, method, init=init))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "conv1d", "embed"])
def test_pissa_subtracts_the_best_approximation_from_the_base(name: str) -> None:
    model = Model()
    W = {"q": model.q.weight, "conv1d": model.conv1d.weight.T, "embed": model.embed.weight.T}[name].detach().double()
    inject(model, Lora((name,), RANK, ALPHA, init="pissa"), torch.float64)
    layer = lora_layers(model)[name]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    made = (1.5 * layer.B @ layer.A).detach()
    assert (made - best).norm() < (1e-9 if min(W.shape) <= RANK + 10 else 2e-3) * best.norm()
    assert (W - made).norm() == pytest.approx(float(S[RANK:].norm()), rel=1e-6)
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0))  # both factors of one norm
    torch.testing.assert_close(weight_of(layer), W)


def test_pissa_of_a_weight_with_a_flat_spectrum() -> None:
    W = torch.randn(300, 200)
    made = start("pissa", W, 8, 1.5, torch.Generator(), False, "m")
    S = torch.linalg.svdvals(W.double())
    left = (W.double() - 1.5 * made.B @ made.A).norm()
    assert S[8:].norm() <= left < S[8:].norm() * 1.004


def test_olora_initializes_with_q_and_r() -> None:
    model = Model()
    W = model.q.weight.detach().double()
    inject(model, Lora(("q",), RANK, ALPHA, init="olora"), torch.float64)
    made, (Q, R) = model.q, torch.linalg.qr(W)
    torch.testing.assert_close(made.B.T @ made.B, torch.eye(RANK, dtype=torch.float64))
    torch.testing.assert_close(made.B @ made.A, Q[:, :RANK] @ R[:RANK])
    torch.testing.assert_close(weight_of(made), W)
    theirs = Model()
    theirs.q.weight.data = W.float()
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q"], init_lora_weights="olora")
    )
    A, B = peft_parameters(wrapped.base_model.model.q)
    torch.testing.assert_close((B @ A).double(), made.B @ made.A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("init", "std", "most"), [("kaiming", 1 / math.sqrt(3 * 400), 1 / 20), ("gaussian", 1 / 16, 0.5)]
)
def test_random_initializations(init: str, std: float, most: float) -> None:
    W = torch.zeros(300, 400)
    made = start(init, W, 16, 1.5, torch.Generator().manual_seed(5), False, "m")
    assert made.A.shape == (16, 400) and made.B.shape == (300, 16) and not made.B.any() and not made.subtracted
    assert float(made.A.mean()) == pytest.approx(0, abs=4 * std / 80)
    assert float(made.A.std()) == pytest.approx(std, rel=0.03)
    assert float(made.A.abs().max()) <= most and (init == "gaussian" or float(made.A.abs().max()) > 0.99 * most)
    embedding = start(init, W, 16, 1.5, torch.Generator().manual_seed(5), True, "m")
    assert not embedding.A.any() and float(embedding.B.std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_factors_depend_on_the_seed_only(init: str) -> None:
    def made(seed: int) -> list[torch.Tensor]:
        model = Model()
        model.load_state_dict(state)
        inject(model, Lora(("q", "k"), RANK, ALPHA, init=init), seed=seed)
        return [factor for layer in lora_layers(model).values() for factor in parameters(layer)]

    state = Model().state_dict()
    torch.manual_seed(1)
    first = made(7)
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, made(7), strict=True))
    assert torch.equal(first[0], made(8)[0]) is (init in ("pissa", "olora"))
    assert not torch.equal(first[0], first[2])


# --- files -----------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (llama, {"targets": ("q_proj", "down_proj")}),
    "rslora": (llama, {"targets": "all-linear", "method": "rslora"}),
    "dora": (llama, {"targets": ("q_proj", "up_proj"), "method": "dora"}),
    "pissa": (llama, {"targets": ("q_proj", "v_proj"), "init": "pissa"}),
    "pissa, rslora": (llama, {"targets": ("q_proj", "v_proj"), "init": "pissa", "method": "rslora"}),
    "olora, dora": (llama, {"targets": ("q_proj", "v_proj"), "init": "olora", "method": "dora"}),
    "patterns": (
        llama,
        {"targets": ("q_proj", "v_proj", "up_proj"), "rank_pattern": {"up_proj": 7, "1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3.5}},
    ),
    "layers": (llama, {"targets": "all-linear", "layers": (1,)}),
    "head": (llama, {"targets": ("lm_head", "q_proj")}),
    "conv1d": (gpt2, {"targets": ("c_attn", "c_proj")}),
    "conv1d, dora": (gpt2, {"targets": "all-linear", "method": "dora"}),
    "embedding": (llama, {"targets": ("embed_tokens", "q_proj")}),
    "embedding, dora": (llama, {"targets": ("embed_tokens", "q_proj"), "method": "dora"}),
}  # fmt: skip


def moved(model: nn.Module) -> None:
    """Change factors and magnitudes a little from their initialization."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in parameters(layer):
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("case", FILES)
def test_saved_adapters_load_in_peft_and_continue_training(tmp_path: Path, case: str) -> None:
    make, given = FILES[case]
    model, ids = make(), torch.arange(24).view(2, 12)
    before = model(ids).logits.detach()
    lora = Lora(rank=RANK, alpha=ALPHA, **given)
    names = inject(model, lora)
    moved(model)
    wanted = model(ids).logits.detach()
    assert not torch.allclose(wanted, before, rtol=0.01, atol=0.05)
    adapter = replace(adapter_of(model, "some/base"), rslora=lora.method == "rslora")
    adapterkit.save(adapter, tmp_path / "adapter")
    there = adapterkit.load(tmp_path / "adapter")
    assert set(there.modules) == set(names) and there.base_model == "some/base" and not there.problems
    ranks = {name: lora.rank_of(name) * (2 if lora.init in ("pissa", "olora") else 1) for name in names}
    assert {name: weights.rank for name, weights in there.modules.items()} == ranks
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    again = make()
    assert set(inject_from(again, there, dropout=0.25)) == set(names)
    torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert {layer.dropout for layer in lora_layers(again).values()} == {0.25}
    trainable = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{n}.{p}" for n in names for p in ("A", "B", *["magnitude"] * (lora.method == "dora"))}
    if case not in ("conv1d, dora", "embedding, dora"):  # which live models are refused
        live = make()  # a merge gives the same model
        adapterkit.apply(live, there)
        torch.testing.assert_close(live(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_continue_training(tmp_path: Path) -> None:
    model = llama()
    inject(model, Lora(("q_proj",), RANK, ALPHA))
    adapter = adapter_of(model)
    with pytest.raises(FitError, match=r"self_attn\.q_proj: the model has no such layer"):
        inject_from(gpt2(), adapter)
    with pytest.raises(FitError, match=r"q_proj: Δ is \(16, 16\), the layer is \(24, 24\)"):
        inject_from(llama(hidden_size=24, intermediate_size=40), adapter)
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(FitError, match=r"lm_head\.weight: the adapter trains this tensor in full"):
        inject_from(llama(), adapterkit.load(tmp_path))


# --- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(init: str, method: str, quick: bool) -> None:
    for make, targets in ((llama, ("q_proj", "down_proj", "embed_tokens", "lm_head")), (gpt2, ("c_attn", "wte"))):
        model, ids = make(), torch.arange(24).view(2, 12)
        base = copy.deepcopy(model)
        inject(model, Lora(targets, RANK, ALPHA, method, dropout=0.1, init=init))
        moved(model)
        if quick:
            use_fast_products(model)
            use_fast_products(base)
        before, with_factors = base(ids).logits, model(ids).logits
        with pytest.raises(KeyError), disabled(model):  # also where it ends by an error
            assert torch.equal(model(ids).logits, before)
            raise KeyError
        assert torch.equal(model(ids).logits, with_factors) and not torch.allclose(with_factors, before, atol=0.05)


@torch.no_grad()
def test_disabled_uses_the_kernels_of_the_base() -> None:
    model = nn.ModuleDict({"q": nn.Linear(1000, 300)})
    base, x = copy.deepcopy(model), torch.randn(33, 1000)
    inject(model, Lora(("q",), RANK, ALPHA))
    with disabled(model):
        assert torch.equal(model.q(x), base.q(x))
        use_fast_products(model)
        torch.testing.assert_close(model.q(x), base.q(x), rtol=1e-4, atol=1e-5)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return how often products of the base are computed by ours."""
    calls: list[int] = []
    plain = layers.plain
    monkeypatch.setattr(layers, "plain", lambda *args: (calls.append(1), plain(*args))[1])
    yield calls


@pytest.mark.parametrize(("make", "linear"), [(llama, 21), (gpt2, 8)])
def test_fast_products_differ_by_rounding_only(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], linear: int
) -> None:
    model, ids = make(), torch.arange(24).view(2, 12)
    keys = list(model.state_dict())
    before = model(ids).logits
    before.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    use_fast_products(model)
    assert list(model.state_dict()) == keys
    with counted(monkeypatch) as calls:
        after = model(ids).logits
    assert len(calls) == linear  # all but the head's
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    after.square().sum().backward()
    for name, parameter in model.named_parameters():  # full fine-tuning: weights are trained through it
        assert off([parameter.grad], [grads[name]]) < 1e-4, name


def test_gradients_with_fast_products_in_the_base() -> None:
    one, ids = llama(), torch.arange(24).view(2, 12)
    inject(one, Lora(("q_proj", "v_proj"), RANK, ALPHA, "dora"))
    moved(one)
    other = copy.deepcopy(one)
    keys = list(other.state_dict())
    use_fast_products(other)
    assert list(other.state_dict()) == keys
    found = []
    for model in (one, other):
        logits = model(ids).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + 3 * 6 and off(found[1], found[0]) < 1e-4
