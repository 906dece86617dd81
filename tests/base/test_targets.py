"""Targets of modules: prefix differences, fused and stacked layouts, orientations; and explained refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import factors
from safetensors.torch import load_file

import adapterkit
from adapterkit.base.rename_option import apply_rename, parse_rename
from adapterkit.errors import FitError, UsageError

Make = Callable[..., Path]


def delta(tensors: dict[str, torch.Tensor], module: str, scaling: float = 1.5) -> torch.Tensor:
    """Return Δ of `module` in float64; the factories default to alpha 6 and rank 4."""
    return scaling * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def merged(base: Path, adapter: Path, out: Path, **how: Any) -> dict[str, torch.Tensor]:
    adapterkit.merge(base, [adapter], out, **how)
    return load_file(out / "model.safetensors")


# --- names


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "layers.0.q_proj"),
        ("transformer.h.0.c_attn", "h.0.c_attn"),
        ("h.0.c_attn", "transformer.h.0.c_attn"),
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("model.language_model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "model.language_model.layers.0.q_proj"),
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
    ],
)
def test_known_prefix_differences_are_mapped_and_noted(
    trained: str, stored: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    W, parts = torch.randn(6, 10), factors(trained, 6, 10)
    base = make_base({f"{stored}.weight": W, "other.weight": torch.ones(3)})
    plan = adapterkit.plan_merge(base, [make_adapter(parts)], tmp_path / "out")
    assert plan.ledger == {"adapter": {trained: (f"{stored}.weight",)}}
    *_, _ = adapterkit.run(plan)
    out = load_file(tmp_path / "out" / "model.safetensors")[f"{stored}.weight"]
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, trained), torch.float32))


LLAVA = {
    "model.language_model.layers.0.q_proj": "language_model.model.layers.0.q_proj",
    "model.vision_tower.layers.0.q_proj": "vision_tower.layers.0.q_proj",
    "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1",
    "lm_head": "language_model.lm_head",
}
TEXT = {"language_model.model.layers.0.q_proj": "model.layers.0.q_proj", "language_model.lm_head": "lm_head"}
QWEN2_VL = {
    "model.language_model.layers.0.q_proj": "model.layers.0.q_proj",
    "model.visual.blocks.0.attn.qkv": "visual.blocks.0.attn.qkv",
}
NEOX = {"gpt_neox.layers.0.attention.dense": "gpt_neox.layers.0.attention.dense", "lm_head": "embed_out"}
HEADS_BESIDE = ("lm_head", "score", "embed_out", "proj_out", "output_projection")
MODELS = {
    "LLaVA": LLAVA,
    "the text model of LLaVA": TEXT,
    "Qwen2-VL": QWEN2_VL,
    "GPT-NeoX": NEOX,
    **{
        f"the body alone, with {head}": {"layers.0.q_proj": "model.layers.0.q_proj", head: head}
        for head in HEADS_BESIDE
    },
}


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_map_applies_to_all_parts_of_a_model(
    model: str, back: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """Each has factors; the head also as `modules_to_save`."""
    pairs = [pair[::-1] if back else pair for pair in MODELS[model].items()]
    base = make_base({f"{stored}.weight": torch.randn(6, 10) for _, stored in pairs})
    adapter = make_adapter({name: tensor for trained, _ in pairs for name, tensor in factors(trained, 6, 10).items()})
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert plan.ledger == {"adapter": {trained: (f"{stored}.weight",) for trained, stored in pairs}}
    (body, _), *_, (head, at) = pairs
    saved = factors(body, 6, 10) | {f"{head}.weight": torch.randn(6, 10)}
    plan = adapterkit.plan_merge(base, [make_adapter(saved, "saved", modules_to_save=[head])], tmp_path / "out")
    assert plan.ledger["saved"][f"{head}.weight"] == (f"{at}.weight",)


@pytest.mark.parametrize("model_type", ["muse_glimmer", "llama"])
def test_factors_of_an_embedding_that_the_model_normalizes_are_refused(
    make_base: Make, make_adapter: Make, tmp_path: Path, model_type: str
) -> None:
    base = make_base({"model.embed_tokens.weight": torch.randn(9, 6)})
    (base / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    name = "model.embed_tokens.lora_embedding_"
    adapter = make_adapter({f"{name}A": torch.randn(4, 9), f"{name}B": torch.randn(6, 4)})
    if model_type == "llama":
        adapterkit.merge(base, [adapter], tmp_path / "out")
        return
    with pytest.raises(FitError, match="embed_tokens: the model normalizes the rows of its embedding"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", ["m.weight", "m", "m.in_proj_weight", "m.other_weight"])
def test_a_weight_may_be_a_parameter_or_that_of_an_attention(
    stored: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base, adapter = make_base({stored: torch.randn(6, 10)}), make_adapter(factors("m", 6, 10))
    if stored == "m.other_weight":
        with pytest.raises(FitError, match="m: not in the base"):
            adapterkit.plan_merge(base, [adapter], tmp_path / "out")
        return
    assert adapterkit.plan_merge(base, [adapter], tmp_path / "out").ledger == {"adapter": {"m": (stored,)}}


def test_a_rename_that_fixes_everything_is_suggested_and_works(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base({f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(6, 10) for i in range(12)})
    parts = {k: t for i in range(12) for k, t in factors(f"model.layers.{i}.attention.q_proj", 6, 10).items()}
    adapter = make_adapter(parts)
    with pytest.raises(FitError, match=r"`rename=attention=self_attn`$") as error:
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert "12 of 12 modules" in str(error.value) and "nearest: model.layers.0.self_attn.q_proj" in str(error.value)
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out", rename=("attention", "self_attn"))
    assert plan.edits == 12


@pytest.mark.parametrize(
    "wrong", ["shape of all", "shape of one", "no place for one", "two in one place", "saved shape"]
)
def test_a_rename_that_does_not_fix_everything_is_not_suggested(
    wrong: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """By name alone, each of these could be fixed by a rename."""
    base = make_base({f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(6, 10) for i in range(4)})
    width = [12 if wrong == "shape of all" or (wrong == "shape of one" and i == 2) else 10 for i in range(4)]
    parts = {k: t for i in range(4) for k, t in factors(f"model.layers.{i}.attention.q_proj", 6, width[i]).items()}
    config = {}
    if wrong == "no place for one":
        parts |= factors("model.layers.0.attention.wholly_else", 6, 10)
    if wrong == "two in one place":
        parts |= factors("model.layers.0.self_attn.q_proj", 6, 10)
    if wrong == "saved shape":
        parts = {k: t for k, t in parts.items() if "layers.0" not in k}
        parts["model.layers.0.attention.q_proj.weight"] = torch.randn(7, 10)
        config = {"modules_to_save": ["model.layers.0.attention.q_proj"]}
    adapter = make_adapter(parts, **config)
    with pytest.raises(FitError) as error:
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    assert "--map" not in str(error.value)


# The tensors of a linear layer (24, 40) in each layout, and the declaration in the config.
UNREAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "NVFP4 of ModelOpt": (
        {"weight": torch.zeros(24, 20, dtype=torch.uint8), "weight_scale": torch.zeros(24, 3), "weight_scale_2": torch.ones(()), "input_scale": torch.ones(())},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4",
    ),
    "NVFP4, undeclared": (
        {"weight": torch.zeros(24, 20, dtype=torch.uint8), "weight_scale": torch.zeros(24, 3), "weight_scale_2": torch.ones(())}, {}, "NVFP4",
    ),
    "compressed-tensors": (
        {"weight_packed": torch.zeros(24, 5, dtype=torch.int32), "weight_scale": torch.ones(24, 1), "weight_shape": torch.tensor([24, 40])},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized",
    ),
    "GPTQ, undeclared": (
        {"qweight": torch.zeros(5, 24, dtype=torch.int32), "qzeros": torch.zeros(1, 3, dtype=torch.int32), "scales": torch.ones(1, 24)}, {}, "GPTQ or AWQ",
    ),
    "HQQ": ({"W_q": torch.zeros(12, 40, dtype=torch.uint8), "meta.scale": torch.ones(1)}, {}, "HQQ"),
    "AQLM": ({"codes": torch.zeros(24, 5, 1, dtype=torch.int16), "codebooks": torch.ones(1, 256, 1, 8)}, {"quant_method": "aqlm"}, "aqlm"),
    "Quanto": ({"weight._data": torch.zeros(24, 40, dtype=torch.int8), "weight._scale": torch.ones(24, 1)}, {}, "Quanto"),
    "FP8 with a scale": (
        {"weight": torch.zeros(24, 40).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}, {}, "FP8 or INT8 with one scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", UNREAD)
def test_a_base_in_an_unsupported_scheme_is_named_as_such(
    layout: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    parts, declared, name = UNREAD[layout]
    config = {"quantization_config": declared} if declared else {}
    base = make_base({f"m.{part}": tensor for part, tensor in parts.items()} | {"n.weight": torch.ones(4, 4)}, config)
    adapter = make_adapter(factors("m", 24, 40))
    with pytest.raises(FitError, match=rf"is quantized \({name}.*\); supported schemes: .*16-bit model"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    adapterkit.merge(base, [make_adapter(factors("n", 4, 4), "plain")], tmp_path / "out")


def test_stacked_experts_in_mxfp4_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    stored = {
        "down_proj_blocks": torch.zeros(2, 24, 1, 16, dtype=torch.uint8),
        "down_proj_scales": torch.zeros(2, 24, 1, dtype=torch.uint8),
    }
    base = make_base({f"mlp.experts.{name}": tensor for name, tensor in stored.items()}, {"model_type": "gpt_oss"})
    tensors = {"mlp.experts.lora_A.weight": torch.randn(8, 32), "mlp.experts.lora_B.weight": torch.randn(24, 8)}
    adapter = make_adapter(tensors, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(FitError, match=r"is quantized \(MXFP4\)"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")


def test_an_adapter_of_another_architecture_is_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(6, 10)})
    with pytest.raises(FitError, match="Was this adapter trained on another base"):
        adapterkit.plan_merge(base, [make_adapter(factors("model.layers.0.mlp.up_proj", 6, 10))], tmp_path / "out")


def test_allow_partial_skips_by_name_and_never_everything(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.weight": torch.randn(6, 10)})
    adapter = make_adapter(factors("a", 6, 10) | factors("b", 6, 10))
    with pytest.raises(FitError, match="1 of 2 modules and tensors not found"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out", allow_partial=True)
    assert plan.skipped == ("adapter: b",) and plan.edits == 1
    with pytest.raises(FitError):
        adapterkit.plan_merge(base, [make_adapter(factors("c", 6, 10), "none")], tmp_path / "out", allow_partial=True)


@pytest.mark.parametrize("text", ["", "=", "a", "=b", "a=b=c", "..=b"])
def test_malformed_renames_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="OLD=NEW"):
        parse_rename(text)


def test_renames_replace_whole_segments() -> None:
    assert apply_rename("model.attn.q", ("attn", "self_attn")) == "model.self_attn.q"
    assert apply_rename("model.self_attn.q", ("attn", "x")) == "model.self_attn.q"
    assert apply_rename("model.model.q", ("model.model", "model")) == "model.q"
    assert apply_rename("wrapper.q", ("wrapper", "")) == "q"


# --- shapes


def test_a_wrong_shape_names_both_shapes(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"m.weight": torch.randn(6, 11)})
    with pytest.raises(FitError, match=r"m: Δ is \(6, 10\), the base weight is \(6, 11\)"):
        adapterkit.plan_merge(base, [make_adapter(factors("m", 6, 10))], tmp_path / "out")


@pytest.mark.parametrize("claimed", [False, True])
def test_shapes_decide_the_orientation_whatever_the_config_claims(
    claimed: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    W, parts = torch.randn(10, 6), factors("h.0.c_attn", 6, 10)
    base = make_base({"h.0.c_attn.weight": W})
    out = merged(base, make_adapter(parts, fan_in_fan_out=claimed), tmp_path / "out")["h.0.c_attn.weight"]
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, "h.0.c_attn").T, torch.float32))


@pytest.mark.parametrize("claimed", [False, True])
def test_the_architecture_decides_for_squares(
    claimed: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    W, parts = torch.randn(8, 8), factors("h.0.attn.c_proj", 8, 8)
    base = make_base({"h.0.attn.c_proj.weight": W}, {"model_type": "gpt2"})
    out = merged(base, make_adapter(parts, fan_in_fan_out=claimed), tmp_path / "out")["h.0.attn.c_proj.weight"]
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, "h.0.attn.c_proj").T, torch.float32))


def test_1x1_convolutions_are_no_evidence_for_square_weights(
    make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """Their weights are (out, in, 1, 1), which is no evidence for the orientation of matrices."""
    W, parts = torch.randn(8, 8), factors("square", 8, 8) | factors("conv", 24, 8)
    base = make_base({"square.weight": W, "conv.weight": torch.randn(24, 8, 1, 1)})
    adapterkit.merge(base / "model.safetensors", [make_adapter(parts)], tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")["square.weight"]
    assert torch.equal(out, oracle.rounded(W.double() + delta(parts, "square"), torch.float32))


@pytest.mark.parametrize("rows", [8, 12])
def test_the_orientation_of_embeddings_is_fixed(rows: int, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    """Even with as many tokens as dimensions; swapped dimensions mean another base."""
    W, A, B = torch.randn(8, 8), torch.randn(4, 8), torch.randn(8, 4)
    base = make_base({"embed_tokens.weight": W if rows == 8 else torch.randn(8, 12)}, {"model_type": "llama"})
    if rows == 12:
        A = torch.randn(4, 12)
    adapter = make_adapter({"embed_tokens.lora_embedding_A": A, "embed_tokens.lora_embedding_B": B})
    if rows == 12:
        with pytest.raises(FitError, match=r"embed_tokens: Δ is \(12, 8\), the base weight is \(8, 12\)"):
            adapterkit.plan_merge(base, [adapter], tmp_path / "out")
        return
    exact = W.double() + 1.5 * (B.double() @ A.double()).T
    out = merged(base, adapter, tmp_path / "out")["embed_tokens.weight"]
    assert torch.equal(out, oracle.rounded(exact, torch.float32))


def test_ambiguous_square_weights_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"h.0.c_attn.weight": torch.randn(8, 24), "h.0.c_proj.weight": torch.randn(8, 8)})
    adapter = make_adapter(factors("h.0.c_attn", 24, 8) | factors("h.0.c_proj", 8, 8))
    with pytest.raises(FitError, match="the weight is square"):
        adapterkit.plan_merge(base / "model.safetensors", [adapter], tmp_path / "out.safetensors")


def test_grouped_convolutions_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"conv.weight": torch.randn(8, 2, 3, 3)})
    parts = {"conv.lora_A.weight": torch.randn(4, 4, 3, 3), "conv.lora_B.weight": torch.randn(8, 4, 1, 1)}
    with pytest.raises(FitError, match="with 2 groups"):
        adapterkit.plan_merge(base, [make_adapter(parts)], tmp_path / "out")


def test_a_convolution_with_another_kernel_size(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"conv.weight": torch.randn(8, 4, 5, 5)})
    parts = {"conv.lora_A.weight": torch.randn(4, 4, 3, 3), "conv.lora_B.weight": torch.randn(8, 4, 1, 1)}
    with pytest.raises(FitError, match=r"Δ is \(8, 4, 3, 3\), the base weight is \(8, 4, 5, 5\)"):
        adapterkit.plan_merge(base, [make_adapter(parts)], tmp_path / "out")


def test_a_3d_convolution(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    W = torch.randn(5, 3, 2, 3, 2)
    A, B = torch.randn(4, 3, 2, 3, 2), torch.randn(5, 4, 1, 1, 1)
    out = merged(
        make_base({"c.weight": W}), make_adapter({"c.lora_A.weight": A, "c.lora_B.weight": B}), tmp_path / "out"
    )
    exact = W.double() + 1.5 * torch.einsum("or,rixyz->oixyz", B.flatten(1).double(), A.double())
    assert torch.equal(out["c.weight"], oracle.rounded(exact, torch.float32))


# --- fused and stacked


HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 12}  # q 12 rows, k and v 4


@pytest.mark.parametrize("dora", [False, True])
def test_split_modules_land_in_the_rows_of_fused_tensors(
    dora: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    qkv, gate_up = torch.randn(20, 12), torch.randn(28, 12)
    base = make_base({"a.qkv_proj.weight": qkv, "m.gate_up_proj.weight": gate_up}, HEADS)
    parts = factors("a.k_proj", 4, 12) | factors("a.q_proj", 12, 12) | factors("m.up_proj", 14, 12)
    if dora:
        parts |= {
            f"{m}.lora_magnitude_vector": torch.rand(n) + 1
            for m, n in (("a.k_proj", 4), ("a.q_proj", 12), ("m.up_proj", 14))
        }
    out = merged(base, make_adapter(parts, use_dora=dora), tmp_path / "out")

    def expected(rows: torch.Tensor, module: str) -> torch.Tensor:
        V = rows.double() + delta(parts, module)
        if dora:
            V *= (parts[f"{module}.lora_magnitude_vector"].double() / V.norm(dim=1))[:, None]
        return V

    exact = torch.cat([expected(qkv[:12], "a.q_proj"), expected(qkv[12:16], "a.k_proj"), qkv[16:].double()])
    assert torch.equal(out["a.qkv_proj.weight"], oracle.rounded(exact, torch.float32))
    exact = torch.cat([gate_up[:14].double(), expected(gate_up[14:], "m.up_proj")])
    assert torch.equal(out["m.gate_up_proj.weight"], oracle.rounded(exact, torch.float32))


def test_rows_in_another_order_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"vision_tower.encoder.blocks.0.wqkv.weight": torch.randn(30, 10)}, {"model_type": "kimi_k25"})
    adapter = make_adapter(factors("model.vision_tower.layers.0.attn.q_proj", 10, 10))
    with pytest.raises(FitError, match=r"qkv_proj.weight: the base stores its rows in another order \(.*wqkv.weight\)"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")


def test_modules_that_share_weights_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.shared_transf.self_attn.q_proj" for layer in (1, 3)]
    base = make_base({f"{names[0]}.weight": torch.randn(10, 10)}, {"model_type": "zamba"})
    adapter = make_adapter({key: tensor for name in names for key, tensor in factors(name, 10, 10).items()})
    with pytest.raises(FitError, match=r"layers.3.*share the weights of one shared_transf"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")


def test_a_fused_split_missing_from_the_config_is_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.qkv_proj.weight": torch.randn(20, 12)}, HEADS | {"num_key_value_heads": 2})
    with pytest.raises(FitError, match="but its config does not define the row split"):
        adapterkit.plan_merge(base, [make_adapter(factors("a.k_proj", 4, 12))], tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "config"), [(12, {}), (13, {}), (12, HEADS), (16, {"num_key_value_heads": 4})], ids=str
)
def test_a_fused_tensor_has_thirds_where_a_part_is_a_third(
    rows: int, config: dict[str, Any], make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    """Whatever the config says of heads, which may be those of another part of the model; otherwise it is refused."""
    W, parts = torch.randn(rows, 10), factors("a.k_proj", 4, 10)
    base, adapter = make_base({"a.qkv_proj.weight": W}, config), make_adapter(parts)
    if rows != 12:
        with pytest.raises(FitError, match="but its config does not define the row split"):
            adapterkit.plan_merge(base, [adapter], tmp_path / "out")
        return
    exact = W.double()
    exact[4:8] += delta(parts, "a.k_proj")
    out = merged(base, adapter, tmp_path / "out")["a.qkv_proj.weight"]
    assert torch.equal(out, oracle.rounded(exact, torch.float32))


@pytest.mark.parametrize("dora", [False, True])
def test_a_fused_module_is_split_over_the_parts(
    dora: bool, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    split = {f"a.{part}_proj.weight": torch.randn(rows, 3) for part, rows in (("q", 12), ("k", 4), ("v", 4))}
    parts = factors("a.qkv_proj", 20, 3)
    exact = torch.cat(list(split.values())).double() + delta(parts, "a.qkv_proj")
    if dora:
        parts["a.qkv_proj.lora_magnitude_vector"] = torch.rand(20) + 1
        exact *= (parts["a.qkv_proj.lora_magnitude_vector"].double() / exact.norm(dim=1))[:, None]
    out = merged(make_base(split), make_adapter(parts, use_dora=dora), tmp_path / "out")
    assert torch.equal(torch.cat([out[name] for name in split]), oracle.rounded(exact, torch.float32))


def test_a_fused_module_over_parts_of_which_one_is_missing(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({f"a.{part}_proj.weight": torch.randn(4, 3) for part in "qk"})
    with pytest.raises(FitError, match=r"a\.qkv_proj: not in the base"):
        adapterkit.plan_merge(base, [make_adapter(factors("a.qkv_proj", 8, 3))], tmp_path / "out")


# --- collisions


def test_two_modules_with_the_same_target_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"a.qkv_proj.weight": torch.randn(20, 12)}, HEADS)
    adapter = make_adapter(factors("a.qkv_proj", 20, 12) | factors("a.q_proj", 12, 12))
    with pytest.raises(FitError, match="both map to a.qkv_proj.weight"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")


def test_two_adapters_that_replace_one_tensor_are_refused(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"m.weight": torch.randn(6, 10), "lm_head.weight": torch.randn(6, 10)})
    saved = {"lm_head.weight": torch.randn(6, 10)}
    two = [make_adapter(factors("m", 6, 10) | saved, name, modules_to_save=["lm_head"]) for name in "ab"]
    with pytest.raises(FitError, match=r"lm_head\.weight: 2 adapters replace this tensor"):
        adapterkit.plan_merge(base, two, tmp_path / "out")


def test_a_weighted_replacement_interpolates(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    W, saved = torch.randn(6, 10), torch.randn(6, 10)
    base = make_base({"lm_head.weight": W, "m.weight": torch.randn(6, 10)})
    adapter = make_adapter(factors("m", 6, 10) | {"lm_head.weight": saved}, modules_to_save=["lm_head"])
    out = merged(base, adapter, tmp_path / "out", scale=0.25)["lm_head.weight"]
    assert torch.equal(out, oracle.rounded(W.double() + 0.25 * (saved.double() - W.double()), torch.float32))


def test_a_grown_vocabulary_is_refused_with_the_reason(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base({"m.weight": torch.randn(6, 10), "lm_head.weight": torch.randn(6, 10)})
    adapter = make_adapter(factors("m", 6, 10) | {"lm_head.weight": torch.randn(8, 10)}, modules_to_save=["lm_head"])
    with pytest.raises(FitError, match=r"has shape \(8, 10\), the base's \(6, 10\); resize"):
        adapterkit.plan_merge(base, [adapter], tmp_path / "out")
