"""Tables of architectures: module names, weight layouts, and tied embeddings.

All knowledge that depends on `model_type` or on names is here. tests/base/test_tied_embeddings.py checks the tables of
ties against transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterkit.files.safetensors import FLOAT_DTYPES, Weight

# --- names and layouts -----------------------------------------------------------------------------------------------

# Prefixes that differ between the model in memory and the checkpoint on disk. Each row maps an adapter's prefixes to
# the base's, longest match first; the first row that finds every module is used.
PREFIX_MAPS: tuple[dict[str, str], ...] = (
    {},
    {"": "model."},
    {"model.": ""},
    {"": "transformer."},
    {"transformer.": ""},
    {"model.language_model.": "model.", "model.visual.": "visual."},  # Qwen2-VL in memory
    {"model.": "model.language_model.", "visual.": "model.visual."},
    {  # LLaVA in memory
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},  # to a text-only checkpoint, and back
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"lm_head.": "embed_out."},  # GPT-NeoX in memory, transformers 5
    {"embed_out.": "lm_head."},
)

# Heads are outside the base model, so that the "" prefix does not apply to them.
HEAD_MODULES = (
    "lm_head", "score", "embed_out", "proj_out", "output_projection", "classifier", "pre_classifier", "qa_outputs",
    "classification_head",
)  # fmt: skip

# Name segments that differ between the model in memory and some checkpoints; applied if the base has only the latter.
SEGMENTS = {"mlp": "block_sparse_moe"}  # Mixtral

# Fused projections and their parts, in row order.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "in_proj": ("q_proj", "k_proj", "v_proj"),
    "gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"),  # HRM
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),
}

# Stacked experts whose checkpoints have one tensor per expert and part: `experts.3.w1.weight`.
PER_EXPERT: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),  # experts without a gate: NemotronH
}

# Architectures whose stacked experts are stored (expert, in, out); all others store (expert, out, in), although
# transformers also reads Qwen3-VL-MoE's published files, which are (expert, in, out), by their shapes.
EXPERTS_IN_OUT = frozenset({"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"})

# Of these, the ones whose experts transformers doesn't mark with `is_transposed`, by which PEFT orients factors.
EXPERTS_UNMARKED = frozenset({"llama4", "llama4_text"})

# Architectures with Conv1D layers, whose weights are stored (in, out).
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def experts_in_out(config: Mapping[str, Any]) -> bool | None:
    """Return whether a model with this config stores stacked experts (expert, in, out); None if it is unknown.

    The text model decides, which a vision-language model describes in its `text_config`.
    """
    nested = config.get("text_config")
    for model in (nested.get("model_type") if isinstance(nested, dict) else None, config.get("model_type")):
        if model in EXPERTS_IN_OUT:
            return True
        if model in TIED | UNTIED | NEVER_TIED:
            return False
    return None


def experts_transposed(config: Mapping[str, Any]) -> bool | None:
    """Return whether transformers marks this model's experts with `is_transposed`; None if it is unknown."""
    in_out = experts_in_out(config)
    return in_out and config.get("model_type") not in EXPERTS_UNMARKED


# Models that normalize the rows of their embedding where they look them up, which PEFT leaves out for what it trains.
NORMED_EMBEDDINGS = frozenset({"muse_glimmer", "muse_glimmer_text", "muse_spark", "muse_spark_text"})

# Modules of which a model has several with the same weights, stored once: by layer, or in encoder and decoder.
SHARED_MODULES = {
    "prophetnet": "word_embeddings",
    "t5gemma2": "embed_tokens",
    "zamba": "shared_transf",
    "zamba2": "shared_transformer",
}


# --- ties: the defaults of `tie_word_embeddings` by model_type -------------------------------------------------------


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


TIED = _types(
    """
    albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
    bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text convbert ctrl data2vec-text
    deberta deberta-v2 deepseek_vl deepseek_vl_hybrid diffusion_gemma distilbert electra ernie ernie4_5 ernie4_5_moe
    ernie4_5_vl_moe esm falcon falcon_mamba flaubert florence2 fnet fun_asr_nano funnel gemma gemma2 gemma3
    gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text
    glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese granite_docling granite_speech
    granite_speech_plus granite_swa gte hunyuan_vl hyperclovax_vision_v2 ibert internvl janus jetmoe
    jina_embeddings_v3 kimi_k25 kosmos-2 layoutlm led lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr longformer
    longt5 luke m2m_100 mamba marian mbart megatron-bert minicpm3 minicpm_ocr mistral3 mobilebert modernbert
    modernbert-decoder moonshine moss_transcribe_diarize mpnet mpt mra mt5 mvp nllb-moe nomic_bert nystromformer
    openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text paligemma pegasus pegasus_x plbart pop2piano pp_chart2table
    prophetnet qwen3_asr recurrent_gemma roberta roberta-prelayernorm roc_bert roformer seamless_m4t seamless_m4t_v2
    smollm3 speech_to_text speecht5 squeezebert starcoder2 switch_transformers t5 t5gemma t5gemma2 tapas trocr udop
    umt5 vaultgemma voxtral_realtime whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2
    zaya
    """
)
UNTIED = _types(
    """
    afmoe apertus arcee aria aria_text axk1 axk2 bamba beam bitnet blt chameleon codegen cohere_asr cohere_compass
    cosmos3_omni cwm dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1
    dots3_note dots3_note_text emu3 eurobert exaone4 exaone4_5 exaone_moe falcon_h1 fast_vlm flex_olmo flint fsmt
    fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm5_next glm_moe_dsa glm_ocr glmga gpt_neox
    gpt_oss gptj granite granite4_vision granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax idefics idefics2 idefics3 internlm3 iquestcoder jais2
    jamba kolibri1 kyutai_speech_to_text laguna llama llama4_text llava llava_next llava_next_video llava_onevision
    longcat_flash mamba2 mellum mimo_v2_flash minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl
    minimax_m3_vl_text ministral ministral3 mistral mistral4 mistral_large4 mixtral modernvbert moonshine_streaming
    muse_glimmer muse_glimmer_text muse_spark_text nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe persimmon
    phi phi3 phi4_multimodal phimoe pix2struct pp_formulanet_text qianfan_ocr qwen2 qwen2_5_omni_thinker qwen2_5_vl
    qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp qwen4_exp_text rwkv seed_oss shieldgemma2 smolvlm
    solar_open stablelm ultrabert ultravbert unlimited_ocr video_llama_3 video_llava vipllava
    """
)
# Tied regardless of the key, which in the T5 family controls output scaling instead.
ALWAYS_TIED = _types("longt5 mt5 pop2piano t5 udop umt5")
# Never tied, whatever the key says: the model has no such tie. An entry may be a class, where others of its type tie.
NEVER_TIED = _types(
    """
    audioflamingo3 bailing_hybrid BigBirdPegasusForCausalLM cosmos3_edge cpmant esmc evolla inkling2 inkling2_text
    inkling_mm_model inkling_text kimi_linear mllama mllama_text_model molmo2 moshi muse_spark musicflamingo
    nemo_speechlm nemotron_h nemotron_h_omni qwen2_audio reformer rembert voxtral xlstm
    """
)
# The ends of the names of classes without a head over the vocabulary.
OTHER_HEADS = ("Classification", "MultipleChoice", "QuestionAnswering", "ForRewardModel")
# Tied if either the config or its text_config says so.
TIED_IF_EITHER = _types(
    """
    fast_vlm glm4v glm4v_moe glm_ocr hunyuan_vl kosmos-2 llava llava_next_video llava_onevision minimax_m3_vl
    paddleocr_vl qwen2_5_vl qwen2_vl shieldgemma2 video_llama_3
    """
)
# The text model includes the head, so that its text_config decides.
TEXT_CONFIG_DECIDES = _types(
    """
    blip-2 instructblip instructblipvideo kosmos-2.5 llama4 pp_formulanet vibevoice vibevoice_asr
    """
)
LFM2_MODELS = _types("lfm2 lfm2_moe lfm2_vl")  # whose key is tie_embedding

# The tensor of the head, where it isn't lm_head.weight.
HEADS = {
    model: head
    for head, models in {
        "cls.predictions.decoder.weight": "bert big_bird deberta deberta-v2 ernie fnet layoutlm megatron-bert "
        "mobilebert mra nomic_bert nystromformer rembert roc_bert roformer squeezebert tapas yoso",
        "decoder.weight": "modernbert modernbert-decoder",
        "embed_out.weight": "gpt_neox gpt_neox_japanese",
        "entity_predictions.decoder.weight": "luke",
        "generator_lm_head.weight": "convbert electra",
        "head.decoder.weight": "ultrabert",
        "head.weight": "rwkv",
        "lm_head.decoder.weight": "bert-generation camembert data2vec-text esm gte ibert jina_embeddings_v3 longformer "
        "mpnet reformer roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
        "lm_head.out_proj.weight": "t5gemma t5gemma2",
        "lm_loss.weight": "xlnet",
        "output.weight": "git",
        "output_projection.weight": "biogpt trocr",
        "pred_layer.proj.weight": "flaubert xlm",
        "predictions.decoder.weight": "albert",
        "proj_out.weight": "canary cohere_asr moonshine moonshine_streaming whisper",
        "text_decoder.cls.predictions.decoder.weight": "blip",
        "text_decoder_postnet.lm_head.weight": "speecht5",
        "text_model.lm_head.weight": "kosmos-2 kosmos-2.5",
        "vocab_projector.weight": "distilbert",
    }.items()
    for model in models.split()
}  # fmt: skip

# Suffixes of the names of input embeddings. The first is shared by an encoder and a decoder.
INPUT_EMBEDDINGS = (
    "shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tokens_embed.weight", "tok_embeddings.weight", "word_embedding.weight", "backbone.embeddings.weight",
    "transformer.embeddings.weight", "transformer.w.weight", "rwkv.embeddings.weight",
)  # fmt: skip


# --- classifiers -----------------------------------------------------------------------------------------------------

# How transformers ends the name of the class for a task of PEFT.
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# The layers with a row for each label.
LABEL_LAYERS = re.compile(
    r"(.+\.)?((score|classifier|classification_head)(\.out_proj|\.linear_out)?|logits_proj|qa_outputs|sequence_summary\.summary)"
)
# Modules of sequence classifiers that checkpoints of language models lack, and that PEFT does not save by itself.
UNSAVED_MODULES = {
    model: tuple(modules.split())
    for modules, models in {
        "classification_head": "bart bigbird_pegasus mbart mt5 mvp plbart t5 umt5",
        "dense": "eurobert",
        "head": "modernbert-decoder modernvbert",
        "pooler": "albert bert canine deberta deberta-v2 ernie gte markuplm megatron-bert mobilebert nomic_bert "
        "rembert roc_bert tapas",
        "sequence_summary": "flaubert xlm",
        "sequence_summary logits_proj": "xlnet",
    }.items()
    for model in models.split()
}
CLASS_ENDING = re.compile(r"(For[A-Z]\w*|(With)?LMHead(Model)?|ModelWithLMHead|DoubleHeadsModel|(Encoder|Base)?Model)$")
SIMPLE_ANSWERS = ("flaubert", "xlm", "xlnet")  # ForQuestionAnswering is a beam search, with other layers


def class_for(name: str, ending: str, config: Mapping[str, Any]) -> str:
    """Return the class of transformers for another task, from the `name` of a model's class and the new `ending`."""
    stem, model = CLASS_ENDING.sub("", name), str(config.get("model_type"))
    if model.endswith("_text") and ending == TASK_CLASSES["SEQ_CLS"] and not stem.endswith("Text"):
        stem += "Text"
    simple = ending == TASK_CLASSES["QUESTION_ANS"] and model in SIMPLE_ANSWERS
    return stem + ending + ("Simple" if simple else "")


# --- linear layers ---------------------------------------------------------------------------------------------------

EMBEDDINGS = (
    *INPUT_EMBEDDINGS, "wpe.weight", "position_embeddings.weight", "token_type_embeddings.weight",
    "embed_positions.weight", "relative_attention_bias.weight",
)  # fmt: skip
# Matrices that aren't linear layers, and heads, which transformers doesn't quantize.
NOT_LINEAR = (*EMBEDDINGS, "lm_head.weight", "embed_out.weight", "score.weight", "classifier.weight")


def is_embedding(name: str) -> bool:
    """Return whether a tensor is the weight of an embedding."""
    return name.endswith(EMBEDDINGS)


def is_linear(name: str, weight: Weight) -> bool:
    """Return whether a tensor is the weight of a linear layer that transformers would quantize."""
    matrix = weight.dtype in FLOAT_DTYPES and len(weight.shape) == 2 and 0 not in weight.shape
    return matrix and name.endswith(".weight") and not name.endswith(NOT_LINEAR)
