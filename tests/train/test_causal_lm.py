"""Causal models of many kinds in the trainer, compared with transformers one sequence at a time; and with PEFT's loop."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapterkit.errors import FormatError
from adapterkit.train import Lora, inject, lora_layers, loss, use_fast_products
from adapterkit.train.causal_lm import ATTENTION, Batch, CausalModel, attend
from adapterkit.train.data.order import Order
from adapterkit.train.data.tokenize import Example
from adapterkit.train.loop import Loop
from adapterkit.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")
VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "initializer_range": 0.15,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIAL = {
    name: SHAPE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
}

# Each with whether it is read unpadded, and whether its logits are h·Wᵀ.
KINDS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "llama": (lambda: transformers.LlamaConfig(**SHAPE), True, True),
    "tied": (lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), True, True),
    "gpt2": (lambda: transformers.GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0), True, True),
    "qwen2": (lambda: transformers.Qwen2Config(**SHAPE), True, True),
    "qwen3": (lambda: transformers.Qwen3Config(**SHAPE), True, True),
    "mistral": (lambda: transformers.MistralConfig(**SHAPE, sliding_window=4), True, True),
    "gemma2": (lambda: transformers.Gemma2Config(**SHAPE, sliding_window=4, final_logit_softcapping=2.0, attn_logit_softcapping=1.0, query_pre_attn_scalar=8), False, False),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]), True, True),
    "cohere": (lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.3), True, False),
    "granite": (lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3), True, False),
    "phi": (lambda: transformers.PhiConfig(**{name: value for name, value in SHAPE.items() if name != "head_dim"}), True, False),
    "opt": (lambda: transformers.OPTConfig(**SPECIAL | {"init_std": 0.15}, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, dropout=0.0), True, True),
    "gpt-oss": (lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 1e4}), False, True),
    "bloom": (lambda: transformers.BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0), False, True),
    "mamba": (lambda: transformers.MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4), False, True),
    "lfm2": (lambda: transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), False, True),
}  # fmt: skip
# Parts that compute in float32 whatever the model is in: norms, the recurrence.
LIMIT = 2e-5
# transformers' masks and experts are not made for float64
NARROW = {"gemma2": torch.float32, "gpt-oss": torch.float32}


def build(kind: str, dtype: torch.dtype | None = None, **more: Any) -> Any:
    torch.manual_seed(3)
    config = KINDS[kind][0]()
    for name, value in more.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # norms' weights and biases as after training
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype or NARROW.get(kind, torch.float64)).eval()


def with_factors(model: Any) -> Any:
    """Return `model` with factors as after training, the same for the same kind."""
    mamba = type(model).__name__ == "MambaForCausalLM"  # which takes the weight out of dt_proj and does not call it
    inject(
        model,
        Lora(("in_proj", "x_proj", "out_proj") if mamba else "all-linear", 3, 5.0),
        next(model.parameters()).dtype,
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.A.normal_(std=0.3)
            layer.B.normal_(std=0.1)
    return model


def example(length: int, prompt: int = 1, seed: int = 0) -> Example:
    ids = np.random.default_rng((length, seed)).integers(3, VOCAB, length).astype(np.int32)
    return Example(ids, np.arange(length) >= prompt, "r:1")


EXAMPLES = [example(9), example(2), example(14, prompt=6), example(5, prompt=4), example(1)]


def alone(model: Any, one: Example) -> torch.Tensor:
    """Return the sum of the losses of one sequence, as transformers computes it from labels."""
    ids = torch.from_numpy(one.ids).long()[None]
    labels = torch.where(torch.from_numpy(one.counted)[None], ids, -100)
    counted = int((labels[:, 1:] != -100).sum())
    found: torch.Tensor = model(input_ids=ids, labels=labels).loss * counted if counted else torch.zeros(())
    return found


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def off(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of the same tensor, or of all if that is tiny."""
    floor = 1e-4 * max(float(one.abs().max()) for one in wanted)
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).abs().max() / max(float(other.abs().max()), floor)) for one, other in pairs)


# --- a batch ---------------------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    def made(ids: list[int], counted: list[int]) -> Example:
        return Example(np.array(ids, np.int32), np.array(counted, np.bool_), "r")

    batch = Batch.of(
        [made([5, 6, 7, 8], [0, 0, 1, 1]), made([9], [0]), made([3, 4, 5], [0, 1, 0]), made([2, 2], [1, 1])]
    )
    _ = -100
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 3, 4, 5, 2, 2] and batch.lengths == (4, 1, 3, 2)
    assert batch.labels.tolist() == [_, 7, 8, _, _, 4, _, _, 2, _]
    assert batch.ids.dtype is batch.labels.dtype is torch.int64
    assert [ids.tolist() for ids in batch.sequences()] == [[5, 6, 7, 8], [9], [3, 4, 5], [2, 2]]
    assert batch.counted == 4  # the first token of the last is counted by nobody: nothing comes before it


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_of_single_sequences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4 * VOCAB)
    plain = with_factors(build(kind))
    model = CausalModel(build(kind))
    with_factors(model.model)
    use_fast_products(model.model)
    _, unpadded, plain_head = KINDS[kind]
    assert (model.unpadded, model.plain_head) == (unpadded, plain_head)
    assert (model.model.config._attn_implementation == ATTENTION) is unpadded
    wanted = torch.stack([alone(plain, one) for one in EXAMPLES]).sum()
    wanted.backward()
    batch = Batch.of(EXAMPLES)
    total = model.loss(batch)
    total.backward()
    found, expected = gradients(model.model), gradients(plain)
    assert len(expected) == 2 * len(lora_layers(plain)) > 0
    assert float(total) == pytest.approx(float(wanted), rel=LIMIT) and off(found, expected) < LIMIT
    if unpadded:  # and padded it is the same
        model.unpadded = False
        model.model.set_attn_implementation("sdpa")
        padded = model.loss(batch)
        padded.backward()
        assert (
            float(padded) == pytest.approx(float(wanted), rel=LIMIT) and off(gradients(model.model), expected) < LIMIT
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_tokens_do_not_depend_on_other_sequences(kind: str) -> None:
    plain, model = build(kind), CausalModel(build(kind))
    batch = Batch.of(EXAMPLES)
    losses, right = model.token_losses(batch)
    logits = torch.cat([plain(input_ids=ids[None]).logits[0] for ids in batch.sequences()]).detach()
    wanted = F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses.double(), wanted.double(), rtol=LIMIT, atol=LIMIT)
    assert right.tolist() == (logits.argmax(1) == batch.labels).tolist()
    parts = torch.split(losses, batch.lengths)
    for at in range(3):
        others = list(EXAMPLES)
        others[at] = example(len(EXAMPLES[at].ids), seed=9)
        changed = torch.split(model.token_losses(Batch.of(others))[0], batch.lengths)
        for place, (one, other) in enumerate(zip(parts, changed, strict=True)):
            if place != at:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert float((parts[at] - changed[at]).abs().max()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_completions_equal_those_of_single_prompts(kind: str) -> None:
    model, plain = CausalModel(with_factors(build(kind, torch.float32))), with_factors(build(kind, torch.float32))
    prompts = [torch.from_numpy(one.ids).long() for one in EXAMPLES[:3]]
    before = model.model.config._attn_implementation
    wanted = [
        plain.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    model.model.train()
    assert model.complete(prompts, 6, None) == wanted
    assert model.model.training and model.model.config._attn_implementation == before
    end = wanted[0][2]  # as if that were the end
    cut = [one[: one.index(end)] if end in one else one for one in wanted]
    assert len(cut[0]) <= 2 and model.complete(prompts, 6, end) == cut
    losses, _ = model.token_losses(Batch.of(EXAMPLES))  # and it reads as before
    torch.testing.assert_close(losses, CausalModel(plain).token_losses(Batch.of(EXAMPLES))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probing_a_model_does_not_depend_on_its_weights(kind: str, dtype: torch.dtype) -> None:
    for spread in (0.02, 0.15):
        if kind == "lfm2" and (dtype, spread) == (torch.bfloat16, 0.02):
            continue  # its convolution, of numbers that small, is lost in rounding
        model = CausalModel(build(kind, dtype, initializer_range=spread))
        assert (model.unpadded, model.plain_head) == KINDS[kind][1:]


def test_a_batch_without_counted_labels_has_no_loss() -> None:
    for kind in ("llama", "cohere"):
        model = CausalModel(with_factors(build(kind)))
        total = model.loss(Batch.of([example(4, prompt=4), example(1)]))
        total.backward()
        assert float(total) == 0 and all(not one.any() for one in gradients(model.model))


def test_full_fine_tuning_trains_head_and_embedding() -> None:
    for kind in ("tied", "gpt2", "qwen2"):
        plain, model = build(kind), CausalModel(build(kind))
        use_fast_products(model.model)
        torch.stack([alone(plain, one) for one in EXAMPLES]).sum().backward()
        model.loss(Batch.of(EXAMPLES)).backward()
        names = [name for name, parameter in plain.named_parameters() if parameter.grad is not None]
        assert len(names) == len(list(plain.named_parameters()))
        assert off(gradients(model.model), gradients(plain)) < LIMIT


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_factors_of_the_output_layer_are_trained(kind: str) -> None:
    """They are added after the model was probed, and replace its output layer."""
    model, plain = CausalModel(build(kind, tie_word_embeddings=False)), build(kind, tie_word_embeddings=False)
    for one in (model.model, plain):
        inject(one, Lora(("lm_head", "q_proj"), 3, 5.0), torch.float64)
        with torch.no_grad():
            lora_layers(one)["lm_head"].B.copy_(torch.linspace(-1, 1, 3 * VOCAB).view(VOCAB, 3).sin())
    wanted = torch.stack([alone(plain, one) for one in EXAMPLES]).sum()
    wanted.backward()
    total = model.loss(Batch.of(EXAMPLES))
    total.backward()
    assert float(total) == pytest.approx(float(wanted), rel=LIMIT) and lora_layers(model.model)["lm_head"].A.grad.any()
    assert off(gradients(model.model), gradients(plain)) < LIMIT
    assert float(model.token_losses(Batch.of(EXAMPLES))[0].sum()) == pytest.approx(float(wanted), rel=LIMIT)


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for on in (False, True):
        model = CausalModel(with_factors(build("mistral")))
        model.model.train()
        if on:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.loss(Batch.of(EXAMPLES)).backward()
        found.append(gradients(model.model))
    assert off(found[1], found[0]) < 1e-9


def test_models_that_are_not_causal() -> None:
    config = transformers.LlamaConfig(**SHAPE)
    for model in (transformers.LlamaModel(config), transformers.LlamaForSequenceClassification(config)):
        with pytest.raises(FormatError, match="is not a causal language model"):
            CausalModel(model)


# --- the whole of it -------------------------------------------------------------------------------------------------

STEPS, WARMUP, RATE, DECAY = 10, 3, 5e-3, 0.05
LAYERS = 2  # of 30, which with 48 tokens a record and 20 steps agree as well (to 5e-7, measured) and take minutes


def texts(folder: Path, file: Path) -> list[Example]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with open(file, encoding="utf-8") as lines:
        records = [json.loads(next(lines))["text"] for _ in range(12)]
    ids = [np.array(tokenizer(text)["input_ids"][at : at + 28 - at % 7], np.int32) for at, text in enumerate(records)]
    return [Example(one, np.arange(len(one)) > 0, f"r:{at}") for at, one in enumerate(ids)]


def peft_losses(base: Any, order: Order, method: str, ours: nn.Module) -> list[float]:
    """Return the losses of PEFT in a plain loop, on padded batches."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.A)
            theirs.lora_B["default"].weight.copy_(layer.B)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        rows = [row[0] for row in order.step(step)]
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one.ids).long() for one in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(one.ids), dtype=torch.long) for one in rows], batch_first=True
        )
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = torch.where(mask == 1, ids, -100)[:, 1:]
        mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / int((labels != -100).sum())
        mean.backward()
        for group in optimizer.param_groups:
            rising, falling = (
                (step + 1) / (WARMUP + 1),
                0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))),
            )
            group["lr"] = RATE * (rising if step < WARMUP else falling)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


@pytest.mark.base
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_losses_of_a_real_model_equal_pefts(
    smollm2: Path, material: Callable[[str], Path], method: str
) -> None:
    examples = texts(smollm2, material("text/mlx_wikisql_train.jsonl"))
    recipe = Recipe(
        batch_size=2, lr=RATE, weight_decay=DECAY, warmup=float(WARMUP), epochs=9.0, max_steps=STEPS, seed=3
    )
    order = Order.of(examples, recipe)
    assert len({len(one.ids) for one in examples}) > 5 and order.steps == STEPS > order.steps_per_epoch
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, num_hidden_layers=LAYERS)
    model = CausalModel(copy.deepcopy(base))
    inject(model.model, Lora(("q_proj", "v_proj"), 4, 6.0, method))
    use_fast_products(model.model)
    model.model.train()
    wanted = peft_losses(base, order, method, model.model)
    loop = Loop(model, order, recipe)
    found = [loop.advance().loss for _ in range(STEPS)]
    assert model.unpadded and model.plain_head
    assert wanted[-1] < 0.9 * wanted[0]  # it learns
    apart = max(abs(one - other) / other for one, other in zip(found, wanted, strict=True))
    print(f"{method}: losses {wanted[0]:.4f} to {wanted[-1]:.4f}, apart by {apart:.2g}")
    assert apart < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_kernel_attends_within_each_sequence_on_a_gpu(kv_heads: int, window: int | None) -> None:
    lengths = (5, 1, 9)
    shapes = [(1, heads, sum(lengths), 16) for heads in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    found, _ = attend(None, *(x.bfloat16() for x in tensors), None, lengths=lengths, sliding_window=window)
    expected, _ = attend(None, *tensors, None, lengths=lengths, sliding_window=window)  # float32: one by one
    assert bool(((found.float() - expected).abs() <= 0.03).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_sequences_are_not_padded_on_a_gpu() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    assert CausalModel(model.to("cuda", torch.bfloat16)).unpadded
