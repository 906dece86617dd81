"""PEFT as the reference for `target_parameters`: merged models have the logits of PEFT's unmerged ones, and are undone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

import adapterkit
from adapterkit.adapter.formats.peft_parameters import DECLARED

SMALL: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
QWEN: dict[str, Any] = SMALL | {"moe_intermediate_size": 12, "num_experts": 4, "decoder_sparse_step": 1}
OSS: dict[str, Any] = SMALL | {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**QWEN),
    "one dense layer": Qwen3MoeConfig(**QWEN, mlp_only_layers=[0]),
    "square": Qwen3MoeConfig(**QWEN | {"moe_intermediate_size": 8}),  # 2 × 8 = 16
    "all sizes equal": Qwen3MoeConfig(**QWEN | {"moe_intermediate_size": 8, "head_dim": 4}),  # r · experts = 16 too
    "one expert": Qwen3MoeConfig(**QWEN | {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8}),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 2}, moe_intermediate_size=12, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    "gpt_oss": GptOssConfig(**OSS),
    "square gpt_oss": GptOssConfig(**OSS | {"intermediate_size": 16}),
    "llama4_text": Llama4TextConfig(**SMALL | {"intermediate_size": 16}, num_local_experts=4, intermediate_size_mlp=24),
}  # fmt: skip
SPLIT = ["q_proj", "gate_proj", "up_proj", "down_proj"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "converted by PEFT": ("qwen3_moe", {"target_modules": SPLIT}),
    "with the router": ("qwen3_moe", {"target_modules": [*SPLIT, "gate"]}),
    "only down_proj": ("qwen3_moe", {"target_modules": ["q_proj", "down_proj"]}),
    "one dense layer": ("one dense layer", {"target_modules": SPLIT}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "deepseek_v3": ("deepseek_v3", {"target_modules": [*SPLIT[1:], "kv_b_proj"]}),
    "all-linear": ("qwen3_moe", {"target_modules": "all-linear"}),
    "a pattern": ("qwen3_moe", {"target_modules": r".*\.(q_proj|o_proj)", "target_parameters": BOTH}),
    "converted, square": ("square", {"target_modules": SPLIT}),
    "square": ("square", {"target_modules": ["q_proj"], "target_parameters": BOTH[:1]}),
    "all sizes equal": ("all sizes equal", {"target_modules": ["q_proj"], "target_parameters": BOTH[:1]}),
    "one expert": ("one expert", {"target_modules": ["q_proj"], "target_parameters": BOTH[:1]}),
    "alpha of a parameter": ("qwen3_moe", {"alpha_pattern": {"gate_up_proj": 40}}),
    "alpha of a module": ("qwen3_moe", {"alpha_pattern": {"experts": 40}}),  # matches nothing
    "rank of a parameter": ("qwen3_moe", {"rank_pattern": {"down_proj": 8}}),
    "rank and alpha": ("qwen3_moe", {"rank_pattern": {"experts.gate_up_proj": 2},
                                     "alpha_pattern": {"layers.1.mlp.experts.down_proj": 4}}),
    "one layer": ("qwen3_moe", {"target_parameters": ["1.mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss with biases": ("gpt_oss", {"target_parameters": [*BOTH, "experts.gate_up_proj_bias"]}),
    "gpt_oss, square": ("square gpt_oss", {}),
    "gpt_oss, only square": ("square gpt_oss", {"target_parameters": BOTH[1:]}),
    "llama4_text": ("llama4_text", {"target_parameters": [f"feed_forward.{name[4:]}" for name in BOTH]}),
    "llama4_text, only square": ("llama4_text", {"target_parameters": ["feed_forward.experts.down_proj"]}),
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 17, 40, 33, 8, 11]])

Trained = Callable[..., tuple[Path, Path]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def of_peft(base: Path, *adapters: Path) -> torch.Tensor:
    """Return the logits of the base with its adapters, of which the last one is not merged."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return logits(PeftModel.from_pretrained(model, adapters[-1]))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model, whose weights are large enough for its adapters to matter."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
            made[name] = tmp_path_factory.mktemp("base")
            model.save_pretrained(made[name])
        return made[name]

    return base


@pytest.fixture
def train(bases: Callable[[str], Path], tmp_path: Path) -> Trained:
    def make(base: str, name: str = "adapter", **config: Any) -> tuple[Path, Path]:
        config = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": None} | config
        if config["target_modules"] == ["q_proj"] and config["target_parameters"] is None:
            config["target_parameters"] = BOTH
        model = AutoModelForCausalLM.from_pretrained(bases(base), dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        return bases(base), tmp_path / name

    return make


@pytest.mark.parametrize("case", CASES)
def test_merges_have_pefts_logits(case: str, train: Trained, tmp_path: Path) -> None:
    model, config = CASES[case]
    base, adapter = train(model, **config)
    expected = of_peft(base, adapter)
    adapterkit.merge(base, adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(merged), expected)
    assert ((expected - logits(AutoModelForCausalLM.from_pretrained(base))).norm() / expected.norm()).item() > 1e-3
    assert all(verdict.fits for verdict in adapterkit.verify(tmp_path / "out", base, adapter))
    adapterkit.unmerge(tmp_path / "out", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("case", ["converted by PEFT", "with the router", "rank and alpha", "gpt_oss, square"])
def test_new_adapters_have_pefts_logits(case: str, train: Trained, tmp_path: Path) -> None:
    """Resized without loss, converted or copied, an adapter computes the same in PEFT."""
    model, config = CASES[case]
    base, adapter = train(model, **config)
    expected = of_peft(base, adapter)
    adapterkit.resize(adapter, tmp_path / "resized", energy=1.0)
    adapterkit.convert(adapter, tmp_path / "converted", to="rslora")
    adapterkit.save(adapterkit.load(adapter), tmp_path / "copied")
    for name in ("resized", "converted", "copied"):
        assert_close(of_peft(base, tmp_path / name), expected)
        assert list(adapterkit.load(tmp_path / name)) == list(adapterkit.load(adapter))


def test_combined_parameters_have_pefts_logits(train: Trained, tmp_path: Path) -> None:
    """Whether the module's other parameters have factors too, which decides how PEFT names them."""
    base, both = train("qwen3_moe", "both", alpha_pattern={"down_proj": 3})
    _, one = train("qwen3_moe", "one", target_parameters=BOTH[1:])
    _, converted = train("qwen3_moe", "converted", target_modules=SPLIT)
    given = [both, one, converted]
    adapterkit.combine(given, tmp_path / "out")
    expected = of_peft(base, *given)
    assert_close(of_peft(base, tmp_path / "out"), expected)
    adapterkit.merge(base, tmp_path / "out", tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_adapters_are_compared_by_parameter(train: Trained) -> None:
    _, both = train("qwen3_moe", "both")
    _, one = train("qwen3_moe", "one", target_parameters=BOTH[1:])
    [pair] = adapterkit.compare([both, one])
    shared = [row.name for row in pair.modules if "experts" in str(row.name)]
    assert shared == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]


def test_inspection_names_parameters(train: Trained) -> None:
    base, adapter = train("square gpt_oss", target_parameters=BOTH[1:])
    found = adapterkit.inspect(adapter, against=base)
    assert found.match.found == found.match.total == 4 and not found.match.missing
    assert {(row.target, row.kind, row.rank) for row in found.modules} == {
        ("down_proj", "parameter", 4),
        ("q_proj", "linear", 4),
    }


def test_models_declare_parameters_in_this_order() -> None:
    """PEFT nests the factors of a module's parameters in the order of their declaration."""
    root = Path(transformers.__file__).parent / "models"
    known = {*DECLARED} - {"weight", "bias"}
    found = set()
    for file in root.glob("*/modeling_*.py"):
        for body in re.split(r"^class ", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            names = re.findall(r"self\.(\w+) = nn\.Parameter\(", body)
            if len(names) > 1 and known.issuperset(names):
                assert names == sorted(names, key=DECLARED.index), file
                found.add(tuple(names))
    assert {("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("w1", "v1", "w2")} <= found


def test_files_without_the_version_and_with_repeated_entries(train: Trained, tmp_path: Path) -> None:
    base, adapter = train("qwen3_moe")
    expected = of_peft(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["peft_version"]
    config["target_parameters"] = [*BOTH, "experts.down_proj", "down_proj", *BOTH]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    adapterkit.merge(base, adapter, tmp_path / "out")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
