"""Names of tensors on disk and in text models, by model_type, in the form of `checkpoint_names.py`."""

from __future__ import annotations

RENAMED = {
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
        mlp.experts.w13_weight -> mlp.experts.permuted_gate_up_proj
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
}
