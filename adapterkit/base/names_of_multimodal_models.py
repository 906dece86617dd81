"""Names of tensors on disk and in models with images or audio, by model_type, in the form of `checkpoint_names.py`."""

from __future__ import annotations

RENAMED = {
    """aria audioflamingo3 aya_vision fuyu gemma3 glmasr got_ocr2 granite_speech granite_speech_plus internvl llava
    llava_next llava_next_video llava_onevision mistral3 mllama musicflamingo paligemma pp_chart2table qwen2_audio
    shieldgemma2 vibevoice_asr video_llava vipllava voxtral voxtral_realtime""": r"""
        ^language_model.lm_head -> lm_head
        ^(language_model|vision_(tower|model|embed_tokens)|(image|video|audio)_tower|multi_modal_projector) -> model.\1
        ^(image_newline|encoder|projector|(acoustic|semantic)_tokenizer_encoder) -> model.\1
        ^model.language_model.model -> model.language_model
        (image|video|vision)_tower.vision_model. -> \1_tower.""",
    "cohere2_vision deepseek_vl deepseek_vl_hybrid granite4_vision lfm2_vl modernvbert ultravbert": r"""
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
        vision_backbone.image_vit.transformer.resblocks. -> vision_tower.layers.
        vision_backbone.image_vit. -> vision_tower.
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
        (vision_tower.encoder.blocks.\d+).wqkv -> \1.attn.permuted_qkv_proj
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
        (vision_tower.+).w(q|k). -> \1.permuted_\2_proj.
        .(feed_forward|shared_experts).w1. -> .\1.gate_proj.
        .(feed_forward|shared_experts).w2. -> .\1.down_proj.
        .(feed_forward|shared_experts).w3. -> .\1.up_proj.""",
    "cosmos3_edge": r"""
        ^(embed_tokens|norm|layers). -> model.language_model.\1.
        .self_attn.to_(q|k|v). -> .self_attn.\1_proj.
        .self_attn.to_out. -> .self_attn.o_proj.
        .mlp.up_proj. -> .mlp.fc1.
        .mlp.down_proj. -> .mlp.fc2.""",
    "cosmos3_omni": r"""
        ^(embed_tokens|norm|layers). -> model.language_model.\1.
        ^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list). -> model.visual.\1.
        .self_attn.to_(q|k|v). -> .self_attn.\1_proj.
        .self_attn.to_out. -> .self_attn.o_proj.
        .self_attn.norm_(q|k). -> .self_attn.\1_norm.""",
    "deepseek_ocr2 unlimited_ocr": r"""
        (?<!_)sam_model. -> vision_tower.sam_encoder.
        ^(model.)?vision_model. -> \1vision_tower.vision_encoder.
        sam_encoder.blocks.(\d+).norm(1|2). -> sam_encoder.layers.\1.layer_norm\2.
        sam_encoder.blocks. -> sam_encoder.layers.
        sam_encoder.patch_embed.proj. -> sam_encoder.patch_embed.projection.
        sam_encoder.neck.0. -> sam_encoder.neck.conv1.
        sam_encoder.neck.1. -> sam_encoder.neck.layer_norm1.
        sam_encoder.neck.2. -> sam_encoder.neck.conv2.
        sam_encoder.neck.3. -> sam_encoder.neck.layer_norm2.
        sam_encoder.net_2. -> sam_encoder.proj.conv1.
        sam_encoder.net_3. -> sam_encoder.proj.conv2.
        vision_encoder.transformer. -> vision_encoder.encoder.
        qwen2_model.model.model. -> vision_tower.vision_encoder.
        qwen2_model.query_(768|1024). -> vision_tower.query_\1_resolution.
        (?<!_)projector.layers. -> multi_modal_projector.
        view_seperator -> view_separator
        ^(model.)?(embed_tokens|layers|norm). -> \1language_model.\2.""",
    "emu3": r"""
        ^text_model.lm_head -> lm_head
        ^(text_model|vqmodel) -> model.\1
        ^model.text_model.model -> model.text_model""",
    "inkling2": r"""
        model.llm.unembed.weight -> lm_head.weight
        model.llm. -> model.language_model.
        model.visual.backbone.ln_pre. -> model.vision_tower.pre_layernorm.
        model.visual.backbone. -> model.vision_tower.
        vision_tower.embeddings.position_embedding -> vision_tower.embeddings.position_embedding.weight
        model.visual.proj_in. -> model.vision_tower.merger.linear_1.
        model.visual.proj_out. -> model.vision_tower.merger.linear_2.
        (vision_tower.layers.\d+).ln_1. -> \1.layernorm_before.
        (vision_tower.layers.\d+).ln_2. -> \1.layernorm_after.
        (vision_tower.layers.\d+).mlp.c_fc. -> \1.mlp.fc1.
        (vision_tower.layers.\d+).mlp.c_proj. -> \1.mlp.fc2.
        (vision_tower.layers.\d+).ls_(1|2).gamma -> \1.lambda_\2""",
    "nemotron_h_omni": r"""
        ^mlp1.0. -> multi_modal_projector.layer_norm.
        ^mlp1.1. -> multi_modal_projector.linear_1.
        ^mlp1.3. -> multi_modal_projector.linear_2.
        ^sound_encoder.encoder. -> audio_tower.
        ^sound_projection.norm. -> embed_audio.layer_norm.
        ^sound_projection.linear(1|2). -> embed_audio.linear_\1.""",
    "radio": r"""
        radio_model.model.patch_generator.video_embedder -> embeddings.video_patch_projection
        radio_model.model.patch_generator.embedder -> embeddings.patch_projection
        radio_model.model.patch_generator.pos_embed -> embeddings.position_embedding
        radio_model.model.patch_generator.cls_token.token -> embeddings.cls_register_token
        radio_model.model.blocks -> encoder.layer
        attn.proj -> attention.o_proj
        attn.qkv -> attention.qkv_proj
        radio_model.(input_conditioner|summary_idxs) -> \1""",
    "step3p5_vision": r"""
        ^conv1.weight -> embeddings.patch_embedding.weight
        ^positional_embedding -> embeddings.position_embedding.weight
        ^transformer.resblocks. -> layers.
        ^ln_pre. -> pre_layernorm.
        ^vit_downsampler(1|2). -> downsampler\1.
        .ls_(1|2).gamma -> .lambda_\1
        .mlp.c_fc. -> .mlp.fc1.
        .mlp.c_proj. -> .mlp.fc2.
        .attn.in_proj_(weight|bias) -> .attn.permuted_qkv_proj.\1
        .attn. -> .self_attn.
        .ln_1. -> .layernorm_before.
        .ln_2. -> .layernorm_after.""",
    "t5gemma2": r"""
        ^(model.)?encoder.(embed_tokens|layers|norm). -> \1encoder.text_model.\2.
        vision_tower.vision_model. -> vision_tower.""",
    "vit": """
        encoder.layer. -> layers.
        attention.query -> q_proj
        attention.key -> k_proj
        attention.value -> v_proj
        attention.output.dense -> attention.o_proj
        intermediate.dense -> mlp.fc1
        output.dense -> mlp.fc2""",
}
