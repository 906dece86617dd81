r"""Names of tensors in checkpoints and in models, by model_type.

transformers 5 renames the tensors of some architectures when it loads them, and renames them back when it saves. An
adapter has the names in the model: those of transformers 5, or of transformers 4, which are mostly those on disk.

Source: transformers/conversion_mapping.py. tests/base/test_checkpoint_names.py compares both, model by model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

# Each line is `on disk -> in the model`, applied in this order to the whole name of a tensor. A dot means a dot; the
# rest is a regular expression, which matches anywhere in the name, and at its end only whole words. Fused tensors get
# a name in FUSED of `architectures.py`, and stacked experts `experts.gate_up_proj` and `experts.down_proj`.
RENAMED = {
    # text
    "mixtral minimax minimax_m2": ".block_sparse_moe. -> .mlp.",
    "phimoe": """
        .block_sparse_moe. -> .mlp.
        .gate.weight -> .router.weight""",
    "granitemoe granitemoehybrid granitemoeshared": """
        block_sparse_moe.input_linear.weight -> block_sparse_moe.experts.gate_up_proj
        block_sparse_moe.output_linear.weight -> block_sparse_moe.experts.down_proj
        block_sparse_moe.router.layer.weight -> block_sparse_moe.router.weight""",
    "aria_text": """
        mlp.experts.fc1.weight -> mlp.experts.gate_up_proj
        mlp.experts.fc2.weight -> mlp.experts.down_proj""",
    "nemotron_h": "backbone. -> model.",
    "gpt_neox": "^embed_out. -> lm_head.",
    "gemma3n_text qwen3_5_text qwen3_5_moe_text qwen4_exp_text": "^model.language_model. -> model.",
    "lfm3": ".self_attn.gate_proj. -> .self_attn.g_proj.",
    "kimi_linear glm5_next glm5_next_text": r"""
        self_attn.(f_a_proj.|f_b_proj.|dt_bias|A_log) -> self_attn.forget_gate.\1
        hc_(attn|ffn)_(fn|base|scale) -> \1_hc.\2
        .block_sparse_moe. -> .mlp.""",
    "bailing_hybrid": r"""
        ^model.word_embeddings. -> model.embed_tokens.
        .attention. -> .self_attn.
        self_attn.(f_proj.|dt_bias|A_log) -> self_attn.forget_gate.\1
        .self_attn.dense. -> .self_attn.o_proj.
        .mlp.gate.expert_bias -> .mlp.gate.e_score_correction_bias""",
    "hrm_text": ".attn. -> .self_attn.",
    "hy_v3": """
        mlp.router.gate.weight -> mlp.gate.weight
        mlp.expert_bias -> mlp.e_score_correction_bias
        mlp.shared_mlp. -> mlp.shared_experts.""",
    "hy_v4": r"""
        .hc_pre.hc_ -> .hc_
        .learnable_sink_param -> .sinks
        .linear_gate -> .gate_proj
        .hc_attn_layer.hc_(fn|base|scale) -> .attn_hc.\1
        .hc_mlp_layer.hc_(fn|base|scale) -> .ffn_hc.\1
        .hc_head_(fn|base|scale) -> .hc_\1""",
    "laguna": """
        mlp.experts.e_score_correction_bias -> mlp.gate.e_score_correction_bias
        mlp.shared_expert. -> mlp.shared_experts.""",
    "axk1": "(?<!mlp.)post_mlp_layernorm -> mlp.post_mlp_layernorm",
    "axk2": """
        W_down -> mlp.fc1
        W_up -> mlp.fc2
        self_attn.q_b_proj. -> self_attn.q_gate_proj.""",
    "ernie4_5_moe": "mlp.moe_statics. -> mlp.gate.moe_statics.",
    "exaone_moe": "mlp.e_score_correction_bias -> mlp.gate.e_score_correction_bias",
    "flint": "self_attn.softmax_offset -> self_attn.sinks",
    "mimo_v2_flash": "self_attn.attention_sink_bias -> self_attn.sinks",
    "kolibri1": """
        moe.router.expert_bias -> mlp.gate.e_score_correction_bias
        post_attn_norm -> post_self_attn_layernorm
        post_ffn_norm -> post_mlp_layernorm""",
    "olmo_hybrid": """
        attention_layer_norm -> input_layernorm
        feedforward_layer_norm -> post_attention_layernorm""",
    "deepseek_v4": r"""
        .attn. -> .self_attn.
        .ffn. -> .mlp.
        .indexer.compressor. -> .compressor.indexer.
        ^embed.weight -> embed_tokens.weight
        ^head.weight -> lm_head.weight
        ^hc_head_(fn|base|scale) -> hc_head.hc_\1
        .attn_norm. -> .input_layernorm.
        .ffn_norm. -> .post_attention_layernorm.
        .hc_(attn|ffn)_(fn|base|scale) -> .\1_hc.\2
        .attn_sink -> .sinks
        .indexer.weights_proj. -> .compressor.indexer.scorer.weights_proj.
        .indexer.wq_b. -> .compressor.indexer.q_b_proj.
        (?<!^model).norm. -> .kv_norm.
        .ape -> .position_bias
        .wq_a. -> .q_a_proj.
        .self_attn.wq_b. -> .self_attn.q_b_proj.
        .wkv. -> .kv_proj.
        .wgate. -> .gate_proj.
        .wo_(a|b). -> .o_\1_proj.
        .q_norm. -> .q_a_norm.
        .gate.bias -> .gate.e_score_correction_bias
        .shared_experts.w1. -> .shared_experts.gate_proj.
        .shared_experts.w2. -> .shared_experts.down_proj.
        .shared_experts.w3. -> .shared_experts.up_proj.""",
    "inkling2_text": r"""
        model.llm.unembed.weight -> lm_head.weight
        model.llm. -> model.
        (?<!_)embed.weight -> embed_tokens.weight
        (?<!embed_tokens.)embed_norm. -> embed_tokens.embed_norm.
        mlp.experts.w2_weight -> mlp.experts.down_proj
        mlp.gate.bias -> mlp.gate.e_score_correction_bias
        (?<!self_)attn.w(q|r)_du -> self_attn.\1_proj
        (?<!self_)attn.w(k|v)_dv -> self_attn.\1_proj
        (?<!self_)attn.wo_ud -> self_attn.o_proj
        (?<!self_)attn.gate_attn -> self_attn.gate_proj
        (?<!self_)attn.attn_sink_proj -> self_attn.sink_proj
        .attn.(q_l2_clip|k_l2_clip|rel_l2_clip|k_sconv|v_sconv|rel_logits_proj). -> .self_attn.\1.
        attn_sconv. -> post_attention_convolution.
        mlp_sconv. -> post_mlp_convolution.
        (convolution|sconv).weight(?!_) -> \1.conv1d.weight
        (convolution|sconv).static_w -> \1.static_weight
        (convolution|sconv).weight_proj -> \1.weight_proj.weight
        mlp_norm -> post_attention_layernorm
        attn_norm -> input_layernorm
        (q|k|v)_input_norm -> \1_input_layernorm
        attn_res.mlp_queries.(\d+) -> layers.\1.mlp_input.query
        attn_res.output_query -> final_input.query""",
    # encoders
    "esm": r"""
        encoder.layer.\d+.attention.self.rotary_embeddings.inv_freq -> rotary_embeddings.inv_freq
        LayerNorm.gamma -> LayerNorm.weight
        LayerNorm.beta -> LayerNorm.bias""",
    "gte": r"""
        ^new. -> gte.
        encoder.layer -> layers
        attention.(o_proj|qkv_proj) -> self_attn.\1
        attn_ln -> post_attention_layernorm
        mlp_ln -> post_mlp_layernorm
        lm_head.norm -> lm_head.layer_norm""",
    "jina_embeddings_v3": r"""
        emb_ln -> embeddings.LayerNorm
        encoder.layers -> layers
        mixer.out_proj -> self_attn.o_proj
        mixer.Wqkv -> self_attn.qkv_proj
        norm1 -> post_attention_layernorm
        norm2 -> post_mlp_layernorm""",
    "nomic_bert": r"""
        encoder.layers -> layers
        emb_ln -> embeddings.LayerNorm
        attn.out_proj -> self_attn.o_proj
        attn.Wqkv -> self_attn.qkv_proj
        fc11 -> up_proj
        fc12 -> gate_proj
        fc2 -> down_proj
        norm1 -> post_attention_layernorm
        norm2 -> post_mlp_layernorm""",
    "ultrabert": "^ultrabert. -> model.",
    # with images or audio
    """aria audioflamingo3 aya_vision fuyu gemma3 glmasr got_ocr2 granite_speech granite_speech_plus internvl llava
    llava_next llava_next_video llava_onevision mistral3 mllama musicflamingo paligemma pp_chart2table qwen2_audio
    shieldgemma2 vibevoice_asr video_llava vipllava voxtral voxtral_realtime""": r"""
        ^language_model.lm_head -> lm_head
        ^(language_model|vision_(tower|model|embed_tokens)|(image|video|audio)_tower|multi_modal_projector) -> model.\1
        ^(image_newline|encoder|projector|(acoustic|semantic)_tokenizer_encoder) -> model.\1
        ^model.language_model.model -> model.language_model
        (image|video|vision)_tower.vision_model. -> \1_tower.""",
    "cohere2_vision deepseek_vl deepseek_vl_hybrid lfm2_vl modernvbert": r"""
        (vision_tower|vision_model).vision_model. -> \1.""",
    "qwen2_vl qwen2_5_vl": r"""
        ^visual -> model.visual
        ^model(?!.(language_model|visual)) -> model.language_model""",
    "qwen2_5_omni_thinker qwen3_omni_moe_thinker": r"""
        ^thinker. ->
        ^(audio_tower|visual) -> model.\1
        ^model(?!.(language_model|visual|audio_tower)) -> model.language_model""",
    "paddleocr_vl": r"""
        ^mlp_AR -> model.projector
        ^visual -> model.visual
        ^model(?!(.visual|.projector|.language_model)) -> model.language_model""",
    "hunyuan_vl": r"""
        mlp.dense_h_to_4h -> mlp.fc1
        mlp.dense_4h_to_h -> mlp.fc2
        ^vit.layers.(\d+).input_layernorm. -> vit.layers.\1.layer_norm1.
        ^vit.layers.(\d+).post_attention_layernorm. -> vit.layers.\1.layer_norm2.
        perceive.proj.0. -> perceive.proj_conv.
        perceive.proj.2. -> perceive.proj_out.
        perceive. -> patch_merger.
        ^model(?!.(language_model|vit|vision_tower)) -> model.language_model
        ^(model.)?vit -> model.vision_tower""",
    "hyperclovax_vision_v2": """
        ^model.language_model.lm_head -> lm_head
        ^model.vision_projector -> model.projector
        ^model.language_model.model. -> model.language_model.""",
    "gemma4_unified": r"""
        vision_embedder.(patch_ln1|patch_dense|patch_ln2|pos_embedding|pos_norm) -> embed_vision.\1
        embed_vision.embedding_projection -> embed_vision.multimodal_embedder.embedding_projection""",
    "minimax_m3_vl": r"""
        ^language_model.lm_head -> lm_head
        ^language_model.model. -> model.language_model.
        ^vision_tower.vision_model.embeddings.patch_embedding. -> model.vision_tower.embeddings.proj.
        ^vision_tower.vision_model.encoder.layers. -> model.vision_tower.layers.
        ^vision_tower.vision_model.pre_layrnorm. -> model.vision_tower.pre_layrnorm.
        ^multi_modal_projector. -> model.multi_modal_projector.
        ^patch_merge_mlp.linear_ -> model.multi_modal_projector.merge_linear_
        .block_sparse_moe.(experts|gate|shared_experts). -> .mlp.\1.
        .block_sparse_moe.e_score_correction_bias -> .mlp.gate.e_score_correction_bias
        .self_attn.index_(q|k)_(proj|norm). -> .self_attn.indexer.\1_\2.""",
    "ernie4_5_vl_moe": r"""
        vision_model -> vision_tower
        (spatial|temporal)_linear.0 -> \1_linear.fc1
        (spatial|temporal)_linear.2 -> \1_linear.fc2
        (spatial|temporal)_linear.3 -> \1_linear.ln
        (?<!language_model.)embed_tokens -> language_model.embed_tokens
        (?<!language_model.)layers -> language_model.layers
        (?<!\w)norm. -> language_model.norm.""",
    "molmo2": r"""
        (?<!image_vit.)transformer.(?!ln_f.|blocks.|resblocks.) -> language_model.
        (?<!image_vit.)transformer.ln_f. -> language_model.norm.
        (?<!image_vit.)transformer.blocks. -> language_model.layers.
        vision_backbone.image_vit.(transformer.resblocks.)? -> vision_tower.
        vision_backbone.(image_pooling_2d|image_projector). -> multi_modal_projector.\1.
        .attention.w(q|k|v|o) -> .self_attn.\1_proj
        .feed_forward.w1 -> .mlp.fc1
        .feed_forward.w2 -> .mlp.fc2
        .attention_norm -> .layer_norm1
        (vision_tower.+).ffn_norm -> \1.layer_norm2
        image_pooling_2d.w(q|k|v|o) -> image_pooling_2d.\1_proj
        image_projector.w1 -> image_projector.gate_proj
        image_projector.w2 -> image_projector.down_proj
        image_projector.w3 -> image_projector.up_proj
        .attn_norm. -> .input_layernorm.
        .ff_norm. -> .post_attention_layernorm.
        self_attn.att_proj -> self_attn.qkv_proj
        self_attn.attn_out -> self_attn.o_proj
        mlp.ff_out -> mlp.down_proj
        mlp.ff_proj -> mlp.up_gate_proj""",
    "qianfan_ocr": r"""
        ^vision_model. -> model.vision_tower.
        encoder.layers. -> layers.
        .ls(1|2) -> .lambda_\1
        (layers.\d+).attn.proj. -> \1.attention.projection_layer.
        (layers.\d+).attn.qkv. -> \1.attention.qkv_proj.
        .norm1. -> .layernorm_before.
        .norm2. -> .layernorm_after.
        .embeddings.class_embedding -> .embeddings.cls_token
        .embeddings.position_embedding -> .embeddings.position_embeddings
        .embeddings.patch_embedding. -> .embeddings.patch_embeddings.projection.
        ^language_model.model. -> model.language_model.
        ^language_model.lm_head. -> lm_head.
        ^mlp1.0. -> model.multi_modal_projector.layer_norm.
        ^mlp1.1. -> model.multi_modal_projector.linear_1.
        ^mlp1.3. -> model.multi_modal_projector.linear_2.""",
    "lfm3_vl_vision": r"""
        patchifier -> patch_embed
        (q|k)_layernorm -> \1_norm""",
    "step3p7": r"""
        ^vision_model. -> model.vision_model.
        ^vit_large_projector. -> model.multi_modal_projector.
        ^model.(embed_tokens|layers|norm). -> model.language_model.\1.
        .moe.gate.weight -> .mlp.gate.weight
        .moe.router_bias -> .mlp.gate.e_score_correction_bias
        .moe.(gate|up|down)_proj.weight -> .mlp.experts.\1_proj
        .share_expert. -> .mlp.shared_experts.""",
    "kimi_k25": r"""
        language_model.model -> model.language_model
        language_model.lm_head -> lm_head
        (vision_tower.encoder.blocks.\d+).norm1 -> \1.norm2
        (vision_tower.encoder.blocks.\d+).norm0 -> \1.norm1
        (vision_tower.encoder.blocks.\d+).mlp.fc1 -> \1.mlp.fc2
        (vision_tower.encoder.blocks.\d+).mlp.fc0 -> \1.mlp.fc1
        (vision_tower.encoder.blocks.\d+).wo -> \1.attn.proj
        (?<!model.)vision_tower.(encoder.)? -> model.vision_tower.
        ^mm_projector.proj.0 -> model.mm_projector.in_proj
        ^mm_projector.proj.2 -> model.mm_projector.out_proj
        blocks -> layers
        patch_embed.pos_emb.weight -> patch_embed.pos_emb.position_embeddings""",
    "mistral_large4": r"""
        ^vision_encoder. -> model.vision_tower.
        ^tok_embeddings. -> model.language_model.embed_tokens.
        ^lerope.alpha -> model.language_model.rotary_emb.alpha
        ^(layers|norm). -> model.language_model.\1.
        ^output. -> lm_head.
        ^pre_mm_projector_norm. -> model.multi_modal_projector.norm.
        ^patch_merger. -> model.multi_modal_projector.patch_merger.
        ^vision_language_adapter.w_in. -> model.multi_modal_projector.linear_1.
        ^vision_language_adapter.w_out. -> model.multi_modal_projector.linear_2.
        .w(v|o). -> .\1_proj.
        .(feed_forward|shared_experts).w1. -> .\1.gate_proj.
        .(feed_forward|shared_experts).w2. -> .\1.down_proj.
        .(feed_forward|shared_experts).w3. -> .\1.up_proj.""",
    "mistral_large4_text": r"""
        .attention. -> .self_attn.
        .wq. -> .q_proj.
        .wkv_a_with_mqa. -> .kv_a_proj_with_mqa.
        .wkv_b. -> .kv_b_proj.
        .attention_norm. -> .input_layernorm.
        .ffn_norm. -> .post_attention_layernorm.
        .kv_a_norm. -> .kv_a_layernorm.
        .feed_forward. -> .mlp.
        (?<!mlp).(gate|experts|shared_experts). -> .mlp.\1.
        .ssmax_scaling.s -> .softmax_scaling.scale
        .ssmax_scaling.b -> .softmax_scaling.bias""",
    "vit": """
        encoder.layer. -> layers.
        attention.query -> q_proj
        attention.key -> k_proj
        attention.value -> v_proj
        attention.output.dense -> attention.o_proj
        intermediate.dense -> mlp.fc1
        output.dense -> mlp.fc2""",
}


def names_in_model(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Return the function from a tensor's name on disk to its name in the model that `config` describes.

    It returns names that it does not know unchanged, as it does all names of unknown architectures.
    """
    parts = {"": config, **{SCOPES[key]: part for key, part in config.items() if key in SCOPES}}
    scopes = [
        (scope, _rules(str(part.get("model_type")))) for scope, part in parts.items() if isinstance(part, Mapping)
    ]
    used = [(re.compile(scope), rules) for scope, rules in scopes if rules]

    def rename(name: str) -> str:
        for scope, rules in used:
            if inside := scope.match(name):
                name = name[: inside.end()] + _apply(rules, name[inside.end() :])
        return name

    return rename if used else str


# The part of a model that a nested config describes, by its names in the model.
SCOPES = {
    "text_config": r"(model\.)?(language_model|text_model)\.",
    "vision_config": r"(model\.)?(vision_tower|vision_model|visual)\.",
    "encoder": r"encoder\.",
}


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], name: str) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name, count=1)
    return name


@lru_cache(256)
def _rules(model: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return the compiled lines of RENAMED for a model_type."""
    found = next((lines for models, lines in RENAMED.items() if model in models.split()), "")
    pairs = (line.split("->") for line in found.strip().splitlines())
    return tuple((_compiled(on_disk.strip()), in_model.strip()) for on_disk, in_model in pairs)


def _compiled(pattern: str) -> re.Pattern[str]:
    literal = re.sub(r"\.(?![+*])", r"\\.", pattern)
    return re.compile(literal + (r"(?!\w)" if pattern[-1].isalnum() else ""))
