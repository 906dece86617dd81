"""Adapters of models with new or fewer tokens, against the logits of PEFT, and undone to the base's bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import adapterkit as run
from handmade import contents
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RemBertConfig,
    RemBertForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)

import adapterkit
from adapterkit.errors import FitError
from adapterkit.merging.receipts.resume import record_done
from adapterkit.merging.run import pieces
from adapterkit.merging.run import run as runner

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

TOKENS = 64
Resize = Callable[[PreTrainedModel], object]


def llama(tied: bool, **config: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, **config))


def qwen2_vl() -> PreTrainedModel:
    text = {
        "vocab_size": TOKENS,
        **SMALL,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 1}
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def t5gemma2() -> PreTrainedModel:
    heads = {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"]}
    text = {"vocab_size": TOKENS, **SMALL, **heads}
    vision = {"image_size": 8, "patch_size": 4, **SMALL}
    return T5Gemma2ForConditionalGeneration(
        T5Gemma2Config(encoder={"text_config": text, "vision_config": vision}, decoder=text)
    )


def resized(size: int, multiple: int | None = None) -> Resize:
    return lambda model: model.resize_token_embeddings(size, pad_to_multiple_of=multiple)


def save_base(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, shards: str = "1GB") -> Path:
    for name, values in model.named_buffers():
        if name == "final_logits_bias":
            values.normal_()
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def save_adapter(base: Path, folder: Path, resize: Resize, save: bool | str = "auto", **recipe: Any) -> Path:
    """Save a random adapter, as trained on `base` after `resize`."""
    model = loaded(base)
    resize(model)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **recipe))
    for name, values in model.named_parameters():
        if "lora_magnitude" in name:
            values.data *= 1 + torch.rand(values.shape)
        elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            values.data += torch.randn(values.shape) * 0.1
    model.save_pretrained(folder, save_embedding_layers=save)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    """The model in float32, from its files alone."""
    [name] = AutoConfig.from_pretrained(folder).architectures
    return getattr(__import__("transformers"), name).from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 60).view(3, -1)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits


def check(base: Path, adapter: Path, resize: Resize, tmp_path: Path, tolerance: float = 1e-5, **how: Any) -> Path:
    """Merge, and compare with PEFT; verify; undo. Return the output."""
    before = contents(base)
    model = loaded(base)
    resize(model)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    out = tmp_path / "out"
    adapterkit.merge(base, [adapter], out, **how)
    merged = loaded(out)
    found = logits(merged)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert merged.config.get_text_config().vocab_size == model.config.get_text_config().vocab_size
    assert all(verdict.fits for verdict in adapterkit.verify(out, base, [adapter]))
    adapterkit.unmerge(out, tmp_path / "restored", adapters=[adapter])
    assert contents(tmp_path / "restored") == before == contents(base)
    return out


BOTH = ["embed_tokens", "lm_head"]
RECIPES: dict[str, dict[str, Any]] = {
    "untouched": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": BOTH},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora": {"target_modules": ["q_proj", *BOTH]},
    "dora": {"target_modules": ["q_proj", *BOTH], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [63, 65, 5]},
    "tokens by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [64, 65]}},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [64], "lm_head": [1, 65]},
    },
}


EVERY = tuple(RECIPES)
RECIPES |= {
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [64, 65]},
    "old tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "lora embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recipe", EVERY)
def test_every_recipe_with_new_tokens_merges(recipe: str, tied: bool, tmp_path: Path) -> None:
    base = save_base(llama(tied), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(66), **RECIPES[recipe])
    out = check(base, adapter, resized(66), tmp_path)
    ties = tied and recipe in ("untouched", "tokens", "tokens by name")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is ties
    names = {name for name in load_file(out / "model.safetensors") if "layers" not in name}
    assert names == {"model.embed_tokens.weight", "model.norm.weight"} | (set() if ties else {"lm_head.weight"})


SIZES = {
    "one more": resized(65),
    "padded": resized(66, multiple=8),
    "a multiple already": resized(72, multiple=8),
    "doubled": resized(128),
    "one less": resized(63),
    "fewer": resized(60),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_merges(size: str, tied: bool, tmp_path: Path) -> None:
    base = save_base(llama(tied), tmp_path / "base", shards="9KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = save_adapter(base, tmp_path / "adapter", SIZES[size], **RECIPES["lora"])
    check(base, adapter, SIZES[size], tmp_path)


@pytest.mark.parametrize("recipe", ["lora", "dora", "saved", "tokens"])
@pytest.mark.parametrize("size", [62, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_are_restored_whatever_the_blocks(
    dtype: torch.dtype, size: int, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 32 * 5)  # five rows
    base = save_base(llama(tied=False), tmp_path / "base", dtype)
    how = RECIPES[recipe] | ({"trainable_token_indices": [61, 5]} if recipe == "tokens" else {})
    adapter = save_adapter(base, tmp_path / "adapter", resized(size), **how)
    check(base, adapter, resized(size), tmp_path, tolerance=0.05)


def test_updates_of_fewer_tokens_leave_the_others_out(tmp_path: Path) -> None:
    """LoRA on embeddings that were shortened, whose rows are the base's: nothing but factors is stored."""
    base = save_base(llama(tied=False), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(60), save=False, **RECIPES["lora"])
    out = check(base, adapter, resized(60), tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert after["lm_head.weight"].shape == (60, 16)
    untouched = save_adapter(base, tmp_path / "embedding", resized(60), save=False, target_modules=["embed_tokens"])
    adapterkit.merge(base, [untouched], tmp_path / "short")
    assert torch.equal(
        load_file(tmp_path / "short" / "model.safetensors")["lm_head.weight"], before["lm_head.weight"][:60]
    )


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 1,
           "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "a bias of the head": (lambda: PhiForCausalLM(PhiConfig(vocab_size=TOKENS, **SMALL)), {"target_modules": ["q_proj"]}),
    "a bias of a trained head": (
        lambda: PhiForCausalLM(PhiConfig(vocab_size=TOKENS, **SMALL)), {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ),
    "a saved head with a bias": (
        lambda: PhiForCausalLM(PhiConfig(vocab_size=TOKENS, **SMALL)), {"target_modules": ["q_proj"], "modules_to_save": BOTH},
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=1, n_head=2)), {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    ),
    "an embedding shared by encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=TOKENS, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)),
        {"target_modules": ["q"], "trainable_token_indices": [60, 61]},
    ),
    "a bias that grows by zeros": (
        lambda: BartForConditionalGeneration(BartConfig(vocab_size=TOKENS, **SEQ2SEQ)), {"target_modules": ["q_proj"]},
    ),
    "trained tokens and a bias that grows by zeros": (
        lambda: BartForConditionalGeneration(BartConfig(vocab_size=TOKENS, **SEQ2SEQ)), {"target_modules": ["q_proj"], "trainable_token_indices": [60, 61]},
    ),
    "gpt-neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=TOKENS, **SMALL)), {"target_modules": ["query_key_value"]},
    ),
    "a bias tied to that of the whole head": (
        lambda: BertForMaskedLM(BertConfig(vocab_size=TOKENS, **SMALL)),
        {"target_modules": ["query"]},
    ),
    "a head of another width, with two biases": (
        lambda: RemBertForCausalLM(RemBertConfig(vocab_size=TOKENS, input_embedding_size=8, output_embedding_size=12, is_decoder=True, **SMALL)),
        {"target_modules": ["query"]},
    ),
    "one embedding in the configs of encoder and decoder": (t5gemma2, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "out_proj"]}),
    "a classifier": (
        lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=TOKENS, pad_token_id=0, **SMALL)),
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "qwen2-vl": (qwen2_vl, {"target_modules": "model.language_model.*q_proj", "modules_to_save": BOTH}),
}  # fmt: skip


@pytest.mark.parametrize("size", [62, 66])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_are_resized_as_by_transformers(name: str, size: int, tmp_path: Path) -> None:
    make, recipe = ARCHITECTURES[name]
    base = save_base(make(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(size), **recipe)
    check(base, adapter, resized(size), tmp_path)


def adapters_of(base: Path, folder: Path, **recipes: tuple[int, str, bool | str]) -> dict[str, Path]:
    """Adapters by name, each of a number of tokens, a recipe, and how PEFT saves embeddings."""
    return {
        name: save_adapter(base, folder / name, resized(size), save, **RECIPES[recipe])
        for name, (size, recipe, save) in recipes.items()
    }


def test_rows_that_no_adapter_holds_are_refused(tmp_path: Path) -> None:
    base = save_base(llama(tied=False), tmp_path / "base")
    adapters = adapters_of(
        base,
        tmp_path,
        lora=(66, "lora", False),
        tokens=(66, "new tokens", False),
        embedding=(66, "lora embedding", "auto"),
    )
    for name, tensor in (("lora", "model.embed_tokens"), ("tokens", "lm_head"), ("embedding", "lm_head")):
        message = run("merge", base, adapters[name], "-o", tmp_path / "out").message(3)
        assert message.startswith(
            f"{name}: was trained with 66 tokens, base has 64; rows 64 to 65 of {tensor}.weight are "
        )
        assert message.endswith(
            "; merge into the resized base, or save the adapter again with PEFT's save_embedding_layers=True"
        )
        assert not (tmp_path / "out").exists()


def test_embeddings_that_a_resize_makes_one_are_refused_if_they_differ(tmp_path: Path) -> None:
    """Only the rows of one of them are in the adapter, and trained rows of the others."""
    names = ["prophetnet.word_embeddings", "prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings"]
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"hidden_size": 16, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = ProphetNetConfig(vocab_size=TOKENS, tie_word_embeddings=False, **sizes, **heads)
    base = save_base(ProphetNetForConditionalGeneration(config), tmp_path / "base")
    new = {"word_embeddings": [64, 65], "lm_head": [64, 65]}
    recipe: dict[str, Any] = {"target_modules": ["key_proj"], "trainable_token_indices": new}
    adapter = save_adapter(base, tmp_path / "adapter", resized(66), **recipe)
    message = run("merge", base, adapter, "-o", tmp_path / "out").message(3)
    assert f"different values in {', '.join(sorted(f'{name}.weight' for name in names))}, " in message
    assert message.endswith("are not in the adapter; merge into the resized base")
    assert not (tmp_path / "out").exists()
    tensors = load_file(base / "model.safetensors")
    for name in names[1:]:
        tensors[f"{name}.weight"] = tensors[f"{names[0]}.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    check(base, adapter, resized(66), tmp_path)


def test_embeddings_of_each_layer_are_refused_unless_they_shrink(tmp_path: Path) -> None:
    """PEFT never saves Gemma 3n's, which are resized with the others."""
    layers = {"layer_types": ["full_attention"], "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0]}
    sizes = {"vocab_size_per_layer_input": TOKENS, "hidden_size_per_layer_input": 4, "head_dim": 8, "laurel_rank": 2}
    small = SMALL | {"intermediate_size": [24], "num_key_value_heads": 1}
    base = save_base(
        Gemma3nForCausalLM(Gemma3nTextConfig(vocab_size=TOKENS, **small, **sizes, **layers)), tmp_path / "base"
    )
    grown = save_adapter(base, tmp_path / "grown", resized(66), **RECIPES["saved"])
    message = run("merge", base, grown, "-o", tmp_path / "out").message(3)
    assert "of model.embed_tokens_per_layer.weight are not in the adapter" in message
    assert message.endswith("; merge into the resized base")
    shrunk = save_adapter(base, tmp_path / "shrunk", resized(60), **RECIPES["saved"])
    out = check(base, shrunk, resized(60), tmp_path)
    assert json.loads((out / "config.json").read_text())["vocab_size_per_layer_input"] == 60


@pytest.mark.parametrize(
    "recipe, save", [("new tokens", False), ("new tokens", "auto"), ("lora embedding", "auto"), ("lora head", "auto")]
)
def test_a_tied_head_has_the_new_rows_of_the_embedding(recipe: str, save: bool | str, tmp_path: Path) -> None:
    base = save_base(llama(tied=True), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(66), save, **RECIPES[recipe])
    check(base, adapter, resized(66), tmp_path)


def test_adapters_with_different_vocabularies(tmp_path: Path) -> None:
    base = save_base(llama(tied=False), tmp_path / "base")
    a = adapters_of(
        base, tmp_path, more=(66, "lora", "auto"), most=(68, "lora", "auto"), fewer=(60, "lora", False), same=(64, "lora", False),
        saved=(66, "saved", "auto"), tokens=(66, "tokens", "auto"), old=(64, "old tokens", False), others=(66, "new tokens", False),
    )  # fmt: skip

    def refused(*names: str) -> str:
        message = run("merge", base, *(a[name] for name in names), "-o", tmp_path / "out").message(3)
        assert not (tmp_path / "out").exists()
        return message

    sizes = "the adapters were trained with different numbers of tokens: "
    assert refused("more", "most").startswith(sizes + "more with 66, most with 68; ")
    assert refused("fewer", "more").startswith(sizes + "fewer with 60, more with 66; ")
    assert refused("fewer", "same").startswith(sizes + "fewer with 60, same with 64; ")
    assert "2 adapters replace this tensor (resized before training)" in refused("more", "tokens")
    assert "2 adapters replace this tensor (modules_to_save)" in refused("more", "saved")
    assert "several adapters replace row 65; merge only one of them" in refused("tokens", "others")
    assert "several adapters replace this tensor, some only rows of it" in refused("saved", "old")


def test_adapters_that_share_a_resized_layer_add_up_in_any_order(tmp_path: Path) -> None:
    """One with the old vocabulary changes the rows that it knows."""
    base = save_base(llama(tied=False), tmp_path / "base")
    a = adapters_of(base, tmp_path, more=(66, "lora", "auto"), same=(64, "lora", False), old=(64, "old tokens", False))
    a["alike"] = shutil.copytree(a["more"], tmp_path / "alike")
    found = []
    for names in (("more", "same", "alike", "old"), ("old", "alike", "same", "more")):
        out, restored = tmp_path / f"{names[0]}-out", tmp_path / f"{names[0]}-restored"
        adapterkit.merge(base, [a[name] for name in names], out)
        found.append(load_file(out / "model.safetensors"))
        adapterkit.unmerge(out, restored, adapters=list(a.values()))
        assert contents(restored) == contents(base)
    before, parts = (
        load_file(base / "model.safetensors"),
        {name: load_file(a[name] / "adapter_model.safetensors") for name in a},
    )
    name, stem = "lm_head.weight", "base_model.model.lm_head."
    expected = parts["more"][stem + "base_layer.weight"].double()
    assert torch.equal(expected[:64], before[name].double())
    for part in ("more", "same", "alike"):
        delta = 3 * parts[part][stem + "lora_B.weight"].double() @ parts[part][stem + "lora_A.weight"].double()
        expected[: len(delta)] += delta
    for merged in found:
        assert torch.equal(merged[name], expected.float())
        assert torch.equal(merged["model.embed_tokens.weight"], found[0]["model.embed_tokens.weight"])


def test_a_tokenizer_with_more_tokens_than_rows_is_noted(tmp_path: Path) -> None:
    """The rows were lost, because PEFT did not see that a vision model was resized."""
    base = save_base(qwen2_vl(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(66), target_modules=["q_proj"])
    tokens = [{"id": 64, "content": "[a]"}, {"id": 65, "content": "]"}]
    (adapter / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": tokens, "model": {}}))
    note = (
        "the tokenizer of adapter has 66 tokens, but the embedding has 64 rows: the model cannot read tokens from 64 on"
    )
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run", "--json")
    facts = json.loads(result.out)
    assert (facts["vocabulary"], facts["tokenizer"]) == (64, "adapter") and note in result.err
    assert note not in run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run", "--tokenizer", "base").err
    grown = save_adapter(base, tmp_path / "grown", resized(66), target_modules=["q_proj"], modules_to_save=BOTH)
    shutil.copy(adapter / "tokenizer.json", grown)
    result = run("merge", base, grown, "-o", tmp_path / "out")
    assert result.code == 0 and "cannot read" not in result.err
    assert contents(tmp_path / "out")["tokenizer.json"] == contents(grown)["tokenizer.json"]


def test_embeddings_of_4_bit_bases_are_resized(tmp_path: Path) -> None:
    plain, base = save_base(llama(tied=False), tmp_path / "plain", torch.bfloat16), tmp_path / "base"
    adapterkit.quantize(plain, base, to="nf4")
    adapter = save_adapter(plain, tmp_path / "adapter", resized(66), **RECIPES["lora"])
    out = tmp_path / "out"
    adapterkit.merge(base, [adapter], out)
    assert loaded(out).lm_head.weight.shape == (66, 16)
    assert all(verdict.fits for verdict in adapterkit.verify(out, base, [adapter]))
    adapterkit.unmerge(out, tmp_path / "restored", adapters=[adapter])
    assert contents(tmp_path / "restored") == contents(base)
    adapterkit.merge(base, [adapter], tmp_path / "packed", quantize="same", accept_loss=True)
    assert load_file(tmp_path / "packed" / "model.safetensors")["lm_head.weight"].shape == (66, 16)


def test_a_single_file_is_resized_and_its_config_left_to_the_user(tmp_path: Path) -> None:
    base = save_base(llama(tied=False), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resized(66), **RECIPES["saved"])
    file = base / "model.safetensors"
    result = run("merge", file, adapter, "-o", tmp_path / "out.safetensors")
    assert "from 64 to 66 tokens: set vocab_size in the model's config" in result.err
    adapterkit.unmerge(tmp_path / "out.safetensors", tmp_path / "restored.safetensors", adapters=[adapter])
    assert (tmp_path / "restored.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("size", [60, 66])
def test_a_killed_merge_continues_with_resized_tensors(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(llama(tied=False), tmp_path / "base", shards="9KB")
    adapter = save_adapter(base, tmp_path / "adapter", resized(size), **RECIPES["lora"])
    adapterkit.merge(base, [adapter], tmp_path / "expected")
    done = []

    def interrupt(*args: Any) -> None:
        record_done(*args)
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "record_done", interrupt)
        adapterkit.merge(base, [adapter], tmp_path / "out", threads=1, resume=True)
    adapterkit.merge(base, [adapter], tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    adapterkit.unmerge(tmp_path / "out", tmp_path / "restored", adapters=[adapter])
    assert contents(tmp_path / "restored") == contents(base)


def test_adapters_of_other_vocabularies_do_not_combine(tmp_path: Path) -> None:
    base = save_base(llama(tied=True), tmp_path / "base")
    a = adapters_of(
        base,
        tmp_path,
        plain=(66, "untouched", "auto"),
        fewer=(60, "lora", False),
        more=(66, "lora", "auto"),
        most=(68, "lora", "auto"),
    )
    message = run("combine", a["plain"], a["fewer"], "-o", tmp_path / "out").message(3)
    assert message.startswith("lm_head: Δ is (60, 16) in fewer, but the weight is stored whole as (66, 16); ")
    assert "the shape of Δ is" in run("combine", a["more"], a["most"], "-o", tmp_path / "out").message(3)
    assert "the shape of Δ is" in run("compare", a["more"], a["most"]).message(3)
    message = run(
        "convert",
        a["plain"],
        "--to",
        "lora",
        "--saved",
        "factors",
        "--rank",
        "4",
        "--base",
        base,
        "-o",
        tmp_path / "out",
    ).message(3)
    assert message.endswith("factors add no rows; merge the adapter instead")
    with pytest.raises(FitError, match=r"Δ is \(66, 16\), the base weight is \(64, 16\)") as error:
        adapterkit.apply(loaded(base), adapterkit.load(a["more"]))
    assert error.value.hint == "resize the base's embeddings first, as in training"
    torn = shutil.copytree(a["more"], tmp_path / "torn")
    tensors = load_file(torn / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {name: tensors[name][:65].clone()}, torn / "adapter_model.safetensors")
    message = run("merge", base, torn, "-o", tmp_path / "out").message(3)
    assert message.startswith("torn: has different numbers of tokens, or none: 65 for lm_head.weight, 66 for ")


@pytest.mark.parametrize("name, size", [("lora", 66), ("lora", 60), ("untouched", 66), ("tokens", 66)])
def test_an_adapter_of_another_vocabulary_matches_its_base(name: str, size: int, tmp_path: Path) -> None:
    """The norm of a tied head, and of rows that the base has."""
    base = save_base(llama(tied=True), tmp_path / "base")
    how = RECIPES[name] | ({"trainable_token_indices": [5]} if name == "tokens" else {})
    adapter = save_adapter(base, tmp_path / "adapter", resized(size), **how)
    result = run("inspect", adapter, "--against", base, "--json")
    assert result.code == 0, result
    facts = json.loads(result.out)
    assert facts["against"]["found"] == facts["against"]["total"] == (3 if name == "lora" else 1)
