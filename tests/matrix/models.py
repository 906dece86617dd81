"""Tiny random models of the architectures that PEFT users train: transformers' own tables, with small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# Task -> the table of transformers with its classes by model type, and PEFT's name for it.
TASKS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "CAUSAL_LM"),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "SEQ_2_SEQ_LM"),
    "classification": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "SEQ_CLS"),
    "vision": (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "CAUSAL_LM"),
}
IDS = (5, 9, 3, 17, 40, 33, 8, 60, 71, 12, 4, 2)
LARGEST = 6_000_000  # parameters; a config that cannot be made smaller is left out

SIZES = {
    name: size
    for size, names in {
        96: "vocab_size vocab_size_per_layer_input",
        64: "max_position_embeddings n_positions n_ctx",
        48: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim",
        32: """hidden_size d_model n_embd dim embed_dim word_embed_proj_dim out_hidden_size projector_hidden_size
            projection_dim""",
        24: "moe_intermediate_size shared_expert_intermediate_size",
        16: "embedding_size q_lora_rank kv_lora_rank sliding_window image_size",
        8: """head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
            state_size mamba_d_state mamba_n_heads mamba_d_head hidden_size_per_layer_input""",
        4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
            linear_num_value_heads rotary_dim num_experts n_routed_experts num_local_experts moe_num_experts
            patch_size spatial_patch_size""",
        2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth
            num_key_value_heads linear_num_key_heads num_experts_per_tok moe_k spatial_merge_size eos_token_id""",
        1: "n_group topk_group n_shared_experts first_k_dense_replace num_pooler_layers bos_token_id",
        0: "pad_token_id decoder_start_token_id",
    }.items()
    for name in names.split()
}  # fmt: skip
TEXT_ONLY = {"num_key_value_heads", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")

# By model type, of a model or of a part of one: what SIZES doesn't make consistent.
SAM = {
    "output_channels": 16, "mlp_dim": 48, "global_attn_indexes": [1], "downsample_channels": [16, 32], "window_size": 2,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "blip-2": {"image_token_index": 60, "num_query_tokens": 1},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "chameleon_vqgan": {"base_channels": 32, "resolution": 16, "embed_dim": 16, "num_embeddings": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": MROPE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"model_type": "sam_vision_model"} | SAM},
    "deepseek_ocr2_sam_vision_model": SAM,
    "dots3_note_text": {
        "index_n_heads": 2, "index_head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 24], "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]},
    },
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_groups": 1, "mamba_d_ssm": 64},
    "florence_vision": {
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
        "depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
    },
    "glm4v_moe_text": {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4, "index_n_heads": 2,
                       "index_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"image_grid_pinpoints": [[16, 16]], "deepstack_layer_map": [[-1, 0]], "downsample_rate": "2/4",
                        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 4},
                        "spatial_target_layers": []},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 24},
    "hunyuan_vl_text": MROPE,
    "hunyuan_vl_vision": {"max_image_size": 64, "text_hidden_size": 32, "max_vit_seq_len": 64, "img_max_token_num": 16},
    "inkling2_vision": {"text_hidden_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "instructblip": {"image_token_index": 60, "num_query_tokens": 1},
    "instructblipvideo": {"video_token_index": 60, "num_query_tokens": 1},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "janus_vqgan": {"base_channels": 32, "embed_dim": 16, "num_embeddings": 16, "image_token_embed_dim": 32},
    "kosmos-2": {"latent_query_num": 12},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "input_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "llama4_vision_model": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    "llama4_text": {"intermediate_size_mlp": 48},
    "longcat_flash": {
        "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "zero_expert_num": 2, "moe_topk": 2, "head_dim": 8,
    },
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "molmo2_vision": {"image_size": [16, 16], "num_position_embeddings": 16},
    "molmo2_adapter": {"text_hidden_size": 32, "vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1]},
    "muse_spark_text": {"moe_hidden_size": 32},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 16, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "num_blocks": 2,
    },
    "qwen4_exp_text": {
        "ple_embed_dim": 8, "hc_lowrank": 4, "ngram_vocab_size_base": 64, "split_ngram_parts": 2, "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 96, "pronunciation_vocab_size": 96},
    "sam_vision_model": SAM,
    "squeezebert": {"embedding_size": 32},
    "t5": {"decoder_start_token_id": 0},
    "unlimited_ocr_sam_vision_model": SAM,
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        ["glm4v_text", "glm46v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text",
         "qwen2_5_omni_text"], MROPE,
    ),
}  # fmt: skip

# Model types that are left out, and why.
LEFT_OUT = {
    name: why
    for why, names in {
        "needs the package timm, detectron2 or scipy": """gemma3n fast_vlm perception_lm layoutlmv2
            inkling_mm_model""",
        "needs audio, and its audio encoder has no small size": "nemo_speechlm vibevoice_asr voxtral_realtime",
        "needs images as patches, or the state of a robot": "pix2struct pi0 pp_formulanet",
        "drafts for another model, or generates audio codes by several heads": """gemma4_assistant
            gemma4_unified_assistant musicgen musicgen_melody""",
        "has two vocabularies, of which transformers resizes one": "fsmt",
        "is composed of two other models": "encoder-decoder vision-encoder-decoder",
        "shares all weights between an encoder and a decoder, and fills in blocks": "diffusion_gemma",
        "has kernels that take no small heads": "xlstm",
        "takes bytes, which it groups by another model": "blt perceiver",
    }.items()
    for name in names.split()
}
# By model type: the shapes of what else a model needs to be called.
IMAGE = {"pixel_values": (1, 3, 16, 16)}
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "blip": IMAGE,
    "blip-2": IMAGE,
    "idefics": {"pixel_values": (1, 1, 3, 16, 16), "image_attention_mask": (1, 12, 1)},
    "instructblip": IMAGE | {"qformer_input_ids": (1, 4)},
    "instructblipvideo": {"pixel_values": (1, 1, 3, 16, 16), "qformer_input_ids": (1, 4)},
    "kosmos-2": IMAGE | {"image_embeds_position_mask": (1, 12)},
    "udop": {"bbox": (1, 12, 4)},
}


@dataclass(frozen=True)
class Model:
    """A class of transformers, with a tiny config."""

    task: str
    type: str
    tied: bool | None = None  # what `tie_word_embeddings` is set to; None: left to the config

    @property
    def cls(self) -> type[PreTrainedModel]:
        names = TASKS[self.task][0][self.type]
        return getattr(transformers, names if isinstance(names, str) else names[0])

    @property
    def multimodal(self) -> bool:
        """Whether the model has parts that a text does not reach."""
        parts = self.cls.config_class.sub_configs
        return self.task == "vision" or any("vision" in part or "audio" in part for part in parts)

    def language_model(self) -> PreTrainedModel:
        """Return a language model with the backbone of a classifier, as classifiers are trained from it."""
        tables = (
            modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_MAPPING_NAMES,
        )
        classes = (getattr(transformers, table[self.type]) for table in tables if self.type in table)
        config = self.config()
        return next(cls for cls in classes if cls.config_class is type(config))(config)

    def config(self) -> PretrainedConfig:
        more = {} if self.tied is None else {"tie_word_embeddings": self.tied}
        if self.type == "reformer":
            more["is_decoder"] = self.task == "causal"
        return tiny(self.cls.config_class, **more)

    def make(self) -> PreTrainedModel:
        """Return the model with random weights, in fp32."""
        torch.manual_seed(0)
        model = self.cls(self.config()).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def logits(self, model: torch.nn.Module, more: tuple[int, ...] = ()) -> torch.Tensor:
        """Return the logits for a fixed prompt, which ends with the tokens `more`."""
        ids = torch.tensor([IDS + more])
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder and self.task in ("seq2seq", "vision"):
            inputs["decoder_input_ids"] = ids[:, :5]
        for name, shape in INPUTS.get(self.type, {}).items():
            inputs[name] = (
                torch.zeros(shape) if name in ("pixel_values", "bbox") else torch.ones(shape, dtype=torch.long)
            )
        return model(**inputs).logits


def registry() -> Iterator[tuple[str, str]]:
    """Yield task and model type of each architecture; not the other names of one (internlm3 is a llama)."""
    for task, (classes, _) in TASKS.items():
        for name in classes:
            own = Model(task, name).cls.config_class.model_type
            if name not in LEFT_OUT and (own == name or own not in classes):
                yield task, name


def variants(task: str, name: str) -> dict[bool | None, Model]:
    """Return the model with tied and with untied embeddings, where both exist; of None, where it has no head."""
    found: dict[bool | None, Model] = {}
    for flag in (None, True, False):
        model = Model(task, name, flag)
        try:
            with torch.device("meta"):
                made = model.cls(model.config())
        except Exception:  # the config allows one of the two only
            continue
        head = made.get_output_embeddings()
        found.setdefault(None if head is None else head.weight is made.get_input_embeddings().weight, model)
    return found or {None: Model(task, name)}


def tiny(config_class: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    """Return a config of a few layers and a few thousand parameters, with the values `more`."""
    return config_class(**_small(config_class(), text=True) | more)


def _small(config: PretrainedConfig, text: bool) -> dict[str, Any]:
    """Return the arguments that make a tiny config of the class of `config`, and of its parts."""
    known = config.to_dict().keys() | getattr(type(config), "attribute_map", {}).keys()
    small: dict[str, Any] = {
        name: size for name, size in SIZES.items() if name in known and (text or name not in TEXT_ONLY)
    }
    if "qk_rope_head_dim" in known:  # multi-head latent attention: a head is nope + rope, and no head shares keys
        small.pop("head_dim", None)
        small["num_key_value_heads"] = 4
    kinds = getattr(config, "layer_types", None)
    own_name = getattr(type(config), "attribute_map", {}).get("layer_types", "layer_types")
    if isinstance(kinds, list | tuple) and kinds and not isinstance(getattr(type(config), own_name, None), property):
        different = list(dict.fromkeys(kinds))
        small[own_name] = different if len(different) > 1 else list(kinds[:2])
        small |= dict.fromkeys((name for name in LAYERS if name in small), len(small[own_name]))
    for part in getattr(type(config), "sub_configs", {}) or {}:
        if (of_part := getattr(config, part, None)) is not None:
            is_text = not any(word in part for word in ("vision", "audio", "vit"))
            small[part] = {"model_type": of_part.model_type, **_small(of_part, text and is_text)}
    return small | OVERRIDES.get(config.model_type, {})
