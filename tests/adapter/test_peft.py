"""PEFT as the reference: every adapter that it writes is merged to the correctly rounded float64 result, and back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import FIXTURES
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DecisionTransformerModel,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTModel,
    LlamaConfig,
    MixtralConfig,
    OpenAIGPTModel,
)
from transformers.pytorch_utils import Conv1D

import adapterkit
from adapterkit.base.architectures import CONV1D_MODELS, CONV1D_NAMES

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
BASES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False),
    "tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2),
}
LINEARS = ["q_proj", "k_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias_all": ("llama", {"target_modules": LINEARS, "bias": "all"}),
    "bias_lora_only": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "dora_rslora": ("llama", {"target_modules": LINEARS, "use_dora": True, "use_rslora": True}),
    "dora_embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora_conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 60]}),
    "tokens_tied": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 63]}}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "patterns": ("llama", {"target_modules": LINEARS, "rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"k_proj": 5}}),
    "one_parameter": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Save a small random model and an adapter for it, with every trained tensor moved away from its initialization."""

    def make(kind: str, name: str = "adapter", dtype: torch.dtype = torch.bfloat16, **config: Any) -> tuple[Path, Path]:
        base, folder = tmp_path / kind, tmp_path / name
        if not base.exists():
            AutoModelForCausalLM.from_config(BASES[kind], dtype=dtype).save_pretrained(base)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(r=4, lora_alpha=6, **config)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return base, folder

    return make


def peft_in_float64(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return PEFT's merge in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    return model.merge_and_unload().state_dict()


def assert_merges_like_peft(base: Path, adapter: Path, out: Path) -> None:
    adapterkit.merge(base, [adapter], out)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    exact = peft_in_float64(base, adapter)
    assert any(name not in before or not torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert_rounded(after, exact)


def assert_rounded(after: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Check that every element is correctly rounded or (5e-5 of them) its neighbour.

    Where W and Δ nearly cancel, errors of float32 sums can exceed the distance to a midpoint.

    """
    wrong = 0
    for name, tensor in after.items():
        best = oracle.rounded(exact[name], tensor.dtype)
        torch.testing.assert_close(tensor, best, atol=0, rtol=2**-7)
        wrong += int((tensor != best).sum())
    assert wrong <= 1 + 5e-5 * sum(tensor.numel() for tensor in after.values())


@pytest.mark.parametrize("case", CASES)
def test_merges_equal_pefts(case: str, train: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    kind, config = CASES[case]
    assert_merges_like_peft(*train(kind, **config), tmp_path / "out")


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_stacked_experts_map_to_per_expert_tensors(
    parameter: str, train: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = train("mixtral", target_modules=[], target_parameters=[f"mlp.experts.{parameter}"])
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    exact = peft_in_float64(base, adapter)
    assert_rounded({name: merged[name].bfloat16() for name in exact}, exact)


def test_both_stacks_of_experts_at_once(train: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base, adapter = train("mixtral", target_modules=["q_proj"], target_parameters=parameters)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    exact = peft_in_float64(base, adapter)
    assert_rounded({name: merged[name].bfloat16() for name in exact}, exact)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_embeddings_are_untied_if_the_adapter_changes_them_separately(
    targets: list[str], train: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with warnings.catch_warnings(action="ignore"):  # PEFT warns that it merges this incorrectly
        base, adapter = train("tied", dtype=torch.float32, target_modules=targets)
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert any("unties" in note for note in plan.notes)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(20)[None]
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_classifier_head_is_added_to_a_base_without_one(
    train: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, _ = train("llama", target_modules=["q_proj"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "classifier")
    plan = adapterkit.plan_merge(base, [tmp_path / "classifier"], tmp_path / "out")
    assert any(note.startswith("score.weight: added to the output") for note in plan.notes)
    *_, _ = adapterkit.run(plan)
    head = load_file(tmp_path / "classifier" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], head)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "module.", ".default"])
def test_names_with_wrappers(wrapper: str, train: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, adapter = train("llama", target_modules=["q_proj"])
    adapterkit.merge(base, [adapter], tmp_path / "plain")
    file = adapter / "adapter_model.safetensors"

    def wrapped(name: str) -> str:
        if wrapper == ".default":
            return name.replace(".weight", ".default.weight")
        return wrapper + name if wrapper == "module." else name.replace("model.layers", f"{wrapper}model.layers")

    save_file({wrapped(name): tensor for name, tensor in load_file(file).items()}, file)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    plain, out = (tmp_path / name / "model.safetensors" for name in ("plain", "out"))
    assert plain.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(
            (name, known)
            for known in (True, False)
            for name in ("tiny-dora", "tiny-rslora", "tiny-patterns", "tiny-embed-save")
        ),
        ("smollm2-wikisql", False),
    ],
)
def test_peft_loads_what_we_write(name: str, known: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue("smollm2") if name.startswith("smol") else FIXTURES / "bases" / "tiny-llama"
    adapter = adapterkit.load(FIXTURES / name)
    if not known:  # like an adapter from memory or another format
        adapter = adapterkit.Adapter("memory", adapter.modules, adapter.replaced, base_model=adapter.base_model)
    adapterkit.save(adapter, tmp_path / "written")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), FIXTURES / name)
    model.load_adapter(str(tmp_path / "written"), "ours")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = model(ids).logits
        model.set_adapter("ours")
        torch.testing.assert_close(model(ids).logits, theirs)
    adapterkit.merge(base, [FIXTURES / name], tmp_path / "a", receipt=False)
    adapterkit.merge(base, [tmp_path / "written"], tmp_path / "b", receipt=False)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


class Odd(torch.nn.Module):
    """One layer of each kind that LoRA supports, two of them with other sizes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(12, 6)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.lines = torch.nn.ModuleList([torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)])
        self.score = torch.nn.Linear(6, 2)


ODD = {
    "plain": {},
    "dora": {"use_dora": True, "use_rslora": True},
    "bias": {"lora_bias": True, "target_modules": ["conv", "lines.0", "lines.1"]},
    "patterns": {"rank_pattern": {"lines.1": 2}, "alpha_pattern": {"conv": 9}, "fan_in_fan_out": False},
    "saved and tokens": {
        "modules_to_save": ["score"], "target_modules": ["conv", "lines.0"], "trainable_token_indices": {"embed_tokens": [7, 2]},
    },
}  # fmt: skip


@pytest.mark.parametrize("ours", [False, True], ids=["its own config", "a config of ours"])
@pytest.mark.parametrize("kind", ODD)
def test_saved_adapters_have_pefts_names_shapes_and_scalings(kind: str, ours: bool, tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens", "conv", "lines.0", "lines.1"]} | ODD[kind]
    torch.manual_seed(0)
    model = get_peft_model(Odd(), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **config))
    model.save_pretrained(tmp_path / "theirs")
    adapter = adapterkit.load(tmp_path / "theirs")
    assert not adapter.unrecognized and not [problem for problem in adapter.problems if problem.fatal]
    if ours:
        adapter = replace(adapter, format="memory", config={})
    adapterkit.save(adapter, tmp_path / "ours")
    theirs, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert {name: tensor.shape for name, tensor in written.items()} == {name: one.shape for name, one in theirs.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())
    if not ours:
        saved, given = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs"))
        assert saved == given and list(saved) == list(given)
    with safe_open(tmp_path / "ours" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = PeftModel.from_pretrained(Odd(), tmp_path / "ours")
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            assert again.base_model.model.get_submodule(name).scaling == layer.scaling, name
    loaded = get_peft_model_state_dict(again)
    assert {name: one.shape for name, one in loaded.items()} == {name: one.shape for name, one in theirs.items()}


@pytest.mark.base
def test_logits_of_the_merged_model_equal_those_of_base_and_adapter(smollm2: Path, tmp_path: Path) -> None:
    adapter = FIXTURES / "smollm2-wikisql"
    adapterkit.merge(smollm2, [adapter], tmp_path / "out", receipt=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompts = ["The capital of France is", "table: 1-1\ncolumns: Name, Age\nQ: How old is Ann?\nA:"]
    logits: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            logits.append({"merged": merged(ids).logits, "base": base(ids).logits, "ids": ids})
        trained = PeftModel.from_pretrained(base, adapter)
        for one in logits:
            expected = trained(one["ids"]).logits
            # Rounding W' to bf16 changes the logits, but by much less than the adapter.
            moved, strayed = (expected - one["base"]).norm(), (expected - one["merged"]).norm()
            assert strayed < 0.05 * moved
            assert torch.equal(expected[:, -1].argmax(-1), one["merged"][:, -1].argmax(-1))


@pytest.mark.parametrize(("folder", "modules", "rank"), [("movies-lora", 24, 8), ("sift-opf-zh", 32, 16)])
def test_real_adapters_are_read(folder: str, modules: int, rank: int, material: Callable[[str], Path]) -> None:
    adapter = adapterkit.load(material(folder))
    assert len(adapter.modules) == modules and {w.rank for w in adapter.modules.values()} == {rank}
    assert not adapter.unrecognized and not [problem for problem in adapter.problems if problem.fatal]
    assert {name: tensor.shape for name, tensor in adapter.replaced.items()} == (
        {"score.weight": (33, 640), "score.bias": (33,)} if folder == "sift-opf-zh" else {}
    )


def test_merged_linear_of_old_peft(
    material: Callable[[str], Path], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = material("bloom-lora-bin")
    name = "transformer.h.0.self_attention.query_key_value"
    adapter = adapterkit.load(folder)
    adapter = replace(adapter, modules={name: adapter.modules[name]})  # one of 24 equal ones
    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    A, B = (state[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    delta = torch.zeros(3072, 1024, dtype=torch.float64)  # enable_lora is [true, false, true]
    delta[:1024], delta[2048:] = B[:1024, :, 0] @ A[:8], B[1024:, :, 0] @ A[8:]
    tensors = {f"{name}.weight": torch.randn(3072, 1024) * 0.02}
    base = make_base(tensors, {"model_type": "bloom"})
    adapterkit.merge(base, [adapter], tmp_path / "out")
    exact = tensors[f"{name}.weight"].double() + 16 / 8 * delta
    out = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(out, oracle.rounded(exact, torch.float32))


def test_conv1d_names_equal_those_in_transformers() -> None:
    """Every model in transformers with Conv1D layers, built without weights."""
    names = set()
    for kind in (DecisionTransformerModel, GPT2LMHeadModel, ImageGPTModel, OpenAIGPTModel):
        config = kind.config_class(n_layer=1, add_cross_attention=kind is GPT2LMHeadModel)
        with torch.device("meta"):
            model = kind(config)
        assert config.model_type in CONV1D_MODELS
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            names |= {leaf} if isinstance(module, Conv1D) else set()
            assert isinstance(module, Conv1D) or not isinstance(module, torch.nn.Linear) or leaf not in CONV1D_NAMES
    assert names == CONV1D_NAMES
