"""Tied embeddings: whether a base's input embedding is also its head, and what that means for an adapter's changes.

transformers leaves `tie_word_embeddings` out of config.json where it has the architecture's default, and for many
architectures the default is true. The tables are those defaults; tests/test_ties.py holds them against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.changes import Changes
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import FitError
from adapterkit.tensorfile import TensorInfo

# --- the tables, by model_type ---------------------------------------------------------------------------------------


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


TIED = _types(
    """
    albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip bloom
    camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text convbert ctrl data2vec-text deberta
    deberta-v2 deepseek_vl deepseek_vl_hybrid diffusion_gemma distilbert electra ernie ernie4_5 ernie4_5_moe
    ernie4_5_vl_moe esm falcon falcon_mamba flaubert florence2 fnet fun_asr_nano funnel gemma gemma2 gemma3 gemma3_text
    gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2
    gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese granite_docling granite_speech granite_speech_plus granite_swa
    gte hunyuan_vl hyperclovax_vision_v2 ibert internvl janus jetmoe jina_embeddings_v3 kimi_k25 kosmos-2 layoutlm led
    lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr longformer longt5 luke m2m_100 mamba marian mbart megatron-bert
    minicpm3 minicpm_ocr mistral3 mobilebert modernbert modernbert-decoder moonshine moss_transcribe_diarize mpnet mpt
    mra mt5 mvp nllb-moe nomic_bert nystromformer openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text paligemma pegasus
    pegasus_x plbart pop2piano pp_chart2table prophetnet qwen3_asr recurrent_gemma roberta roberta-prelayernorm
    roc_bert roformer seamless_m4t seamless_m4t_v2 smollm3 speech_to_text speecht5 squeezebert starcoder2
    switch_transformers t5 t5gemma t5gemma2 tapas trocr udop umt5 vaultgemma voxtral_realtime whisper xglm xlm
    xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
    """
)
UNTIED = _types(
    """
    afmoe apertus arcee aria aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blt chameleon codegen cohere_asr
    cohere_compass cosmos3_edge cosmos3_omni cwm dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
    diffllama doge dots1 dots3_note dots3_note_text emu3 esmc eurobert evolla exaone4 exaone4_5 exaone_moe falcon_h1
    fast_vlm flex_olmo flint fsmt fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm5_next glm_moe_dsa
    glm_ocr glmga gpt_neox gpt_oss gptj granite granite4_vision granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax idefics idefics2 idefics3
    internlm3 iquestcoder jais2 jamba kimi_linear kolibri1 kyutai_speech_to_text laguna llama llama4 llama4_text llava
    llava_next llava_next_video llava_onevision longcat_flash mamba2 mellum mimo_v2_flash minicpmv4_6 minicpmv4_7
    minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral4 mistral_large4 mixtral
    mllama_text_model modernvbert molmo2 moonshine_streaming moshi muse_glimmer_text muse_spark_text nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phi4_multimodal phimoe pix2struct
    pp_formulanet_text qianfan_ocr qwen2 qwen2_5_omni_thinker qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp
    qwen4_exp_text reformer rembert rwkv seed_oss shieldgemma2 smolvlm solar_open stablelm ultrabert ultravbert
    unlimited_ocr video_llama_3 video_llava vipllava xlstm
    """
)
# Tied whatever the key says; of T5's family it says something else (whether the output is scaled).
ALWAYS = _types("longt5 mt5 pop2piano t5 udop umt5")
# Tied also where only the text model's config says so.
OR_TEXT = _types(
    """
    fast_vlm glm4v glm4v_moe glm_ocr hunyuan_vl llava llava_next_video llava_onevision minimax_m3_vl paddleocr_vl
    qwen2_5_vl qwen2_vl shieldgemma2 video_llama_3
    """
)
# A whole language model lies inside, head and all: its own config decides.
TEXT = _types(
    """
    audioflamingo3 blip-2 inkling2 inkling_mm_model instructblip instructblipvideo mllama muse_glimmer muse_spark
    musicflamingo nemo_speechlm nemotron_h_omni pp_formulanet qwen2_audio vibevoice vibevoice_asr voxtral
    """
)
LFM2 = _types("lfm2 lfm2_moe lfm2_vl")  # which call the key tie_embedding

# The head's tensor where that is not lm_head.weight.
HEADS = {
    model: head
    for head, models in {
        "cls.predictions.decoder.weight": "bert big_bird deberta deberta-v2 ernie fnet layoutlm megatron-bert "
        "mobilebert mra nomic_bert nystromformer roc_bert roformer squeezebert tapas yoso",
        "decoder.weight": "modernbert modernbert-decoder",
        "embed_out.weight": "gpt_neox gpt_neox_japanese",
        "entity_predictions.decoder.weight": "luke",
        "generator_lm_head.weight": "convbert electra",
        "head.decoder.weight": "ultrabert",
        "head.weight": "rwkv",
        "lm_head.decoder.weight": "bert-generation camembert data2vec-text esm gte ibert jina_embeddings_v3 longformer "
        "mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
        "lm_head.out_proj.weight": "t5gemma t5gemma2",
        "lm_loss.weight": "xlnet",
        "output.weight": "git",
        "output_projection.weight": "biogpt trocr",
        "pred_layer.proj.weight": "flaubert xlm",
        "predictions.decoder.weight": "albert",
        "proj_out.weight": "canary cohere_asr moonshine moonshine_streaming whisper",
        "text_decoder.cls.predictions.decoder.weight": "blip",
        "text_decoder_postnet.lm_head.weight": "speecht5",
        "text_model.lm_head.weight": "kosmos-2",
        "vocab_projector.weight": "distilbert",
    }.items()
    for model in models.split()
}  # fmt: skip

# What input embeddings are called: the end of their tensors' names. The first is one of several models at once.
INPUT_EMBEDDINGS = (
    "shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tokens_embed.weight", "tok_embeddings.weight", "word_embedding.weight", "backbone.embeddings.weight",
    "transformer.embeddings.weight", "transformer.w.weight",
)  # fmt: skip


# --- the config ------------------------------------------------------------------------------------------------------


def declared(config: Mapping[str, Any]) -> bool | None:
    """Whether a model of this config has its head tied, as transformers resolves it; None where that is not known."""
    model, nested = config.get("model_type"), config.get("text_config")
    text = declared(nested) if isinstance(nested, dict) else None
    if model in TEXT:
        return text
    if model in ALWAYS:
        return True
    key = config.get("tie_embedding") if model in LFM2 else None
    key = config.get("tie_word_embeddings") if key is None else key
    default = True if model in TIED else False if model in UNTIED else None
    outer = bool(key) if key is not None else default
    if model in OR_TEXT:
        return outer or bool(text)
    return text if outer is None else outer


# --- the tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tie:
    """An input embedding and the head that is the same tensor, or, with `certain` false, may be."""

    base: Checkpoint
    embedding: str
    head: str
    others: tuple[str, ...]  # more embeddings, with which the head, or an encoder and a decoder, may be one
    stored: bool  # whether the head has a tensor of its own
    certain: bool

    @property
    def implied(self) -> bool:
        """Whether the base has a head without a tensor for it."""
        return self.certain and not self.stored

    @property
    def shared(self) -> bool:
        """Whether an encoder and a decoder have the embedding in common, or may have."""
        return bool(self.others) or self.embedding.endswith("shared.weight")

    def equal(self, other_name: str | None = None) -> bool:
        """Whether the head, or the other tensor, is the embedding bit for bit; transformers ties only such."""
        one, other = self.base.tensors[self.embedding], self.base.tensors[other_name or self.head]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and _same_bytes(one, other)

    def untie(self, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The config of an output that has both tensors, and a note about it.

        The key stays where more than the head goes by it: T5's scaling, BERT's biases, an encoder's embedding.
        """
        note = f"the base ties {self.head} to {self.embedding}, the adapter changes them apart: the output "
        inseparable = self.embedding.endswith("shared.weight") or self.head.endswith(".decoder.weight")
        if inseparable or config.get("model_type") in ALWAYS:
            return config, note + "stores both, which transformers 5 and later load"
        nested = config.get("text_config")
        if isinstance(nested, dict) and ("tie_word_embeddings" in nested or declared(nested)):
            config = config | {"text_config": nested | {"tie_word_embeddings": False}}
        keys = [key for key in ("tie_word_embeddings", "tie_embedding") if key != "tie_embedding" or key in config]
        return config | dict.fromkeys(keys, False), note + "unties them"


def tie_of(base: Checkpoint) -> Tie | None:
    """The embedding and the head that `base` ties, or may tie; None where it surely ties none."""
    tied = declared(base.config)
    found = [name for name in base.tensors if f".{name}".endswith(tuple(f".{end}" for end in INPUT_EMBEDDINGS))]
    found = [name for name in found if not any(part.isdecimal() for part in name.split("."))]  # else some layer's own
    if tied is False or not found:
        return None
    embedding = min(found, key=lambda name: (not name.endswith("shared.weight"), found.index(name)))
    head = HEADS.get(base.config.get("model_type", ""), "lm_head.weight")
    stored = next((name for name in base.tensors if f".{name}".endswith(f".{head}")), None)
    if stored is None and head.endswith(".decoder.weight"):  # one that has more tensors, without which there is none
        within = head.removesuffix("decoder.weight")
        if not any(name.startswith(within) for name in base.tensors):
            return None
    inner = "language_model." if embedding.startswith("language_model.model.") else ""
    others = tuple(name for name in found if name != embedding)
    return Tie(base, embedding, stored or inner + head, others, stored is not None, tied is True)


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes, compared some megabytes at a time."""
    step = 1 << 24
    for at in range(0, one.nbytes, step):
        pieces = []
        for info in (one, other):
            stop = min(info.stop, info.start + at + step)
            pieces.append(replace(info, start=info.start + at, stop=stop).read_bytes())
        if pieces[0] != pieces[1]:
            return False
    return True


# --- an adapter's changes --------------------------------------------------------------------------------------------


def follow(tie: Tie, mine: Changes, label: str, keeps: bool) -> bool:
    """Have the head follow one adapter's changes to the embedding as it did in training; whether the two part.

    There PEFT updates a tied embedding and head apart, except for trained tokens, and with `keeps`
    (`ensure_weight_tying`). Raises FitError where it cannot be known whether they are tied.
    """
    touched = [name for name in (tie.embedding, *tie.others) if mine.touch(name)]
    if not touched and not mine.touch(tie.head):
        return False
    if not tie.certain:
        if touched and not tie.stored:
            raise FitError(f"{label}: changes {touched[0]}, and {undecided(tie)}")
        return False  # transformers ties two stored tensors only where it is told to
    if touched and tie.shared:
        _follow_shared(tie, mine, label, touched)
    if keeps and tie.stored and not tie.equal():  # PEFT ties what is one tensor; trained tokens go by the config alone
        keeps = False
    replaced, deltas = mine.replaced.get(tie.embedding, []), mine.deltas.get(tie.embedding, []) if keeps else []
    rows = [change for change in replaced if keeps or change.rows is not None]
    alone = len(rows) < len(replaced) or (tie.embedding in mine.deltas and not keeps)
    parts = alone or mine.touch(tie.head)
    if rows and tie.head not in mine.replaced:
        mine.replaced[tie.head] += rows
    if deltas and tie.head not in mine.deltas:
        mine.deltas[tie.head] += [replace(one, target=replace(one.target, tensor=tie.head)) for one in deltas]
    return parts


def _follow_shared(tie: Tie, mine: Changes, label: str, touched: list[str]) -> None:
    """Have an encoder's and a decoder's embeddings follow the tokens that were trained in the one they share.

    PEFT trains those in all that are tied, but factors and whole tensors in a module that such a model does not use.
    Raises FitError for them, and where it is not known what is tied.
    """
    changes = mine.replaced.get(tie.embedding, [])
    only_rows = bool(changes) and all(change.rows is not None for change in changes)
    if touched != [tie.embedding] or mine.deltas.get(tie.embedding) or not only_rows:
        raise refuse_shared(tie, label, touched[0])
    for other in tie.others:
        if not tie.equal(other):
            raise refuse_shared(tie, label, touched[0])
        mine.replaced[other] += changes


def refuse_shared(tie: Tie, label: str, name: str) -> FitError:
    """Explain that an adapter cannot be merged that changes `name`."""
    names = ", ".join(one for one in (tie.embedding, *tie.others, tie.head) if one != name)
    return FitError(
        f"{label}: changes {name}, which may be one with {names} in {tie.base.name}: merging into embeddings that an "
        "encoder and a decoder share is not supported, except for trained tokens"
    )


def undecided(tie: Tie) -> str:
    """Why it is not known whether the head is tied, and what to do."""
    unknown = f"whether {tie.base.name} ties {tie.head} to {tie.embedding} is not known: "
    if not tie.base.config:
        return f"{unknown}there is no config.json. Give the directory of the model, with its config."
    model = tie.base.config.get("model_type")
    known = f"model_type {model[:60]!r} is not known here" if model else "has no model_type"
    return (
        f"{unknown}its config.json has no tie_word_embeddings, and {known}. Add the key to config.json: true if the "
        "model's output embedding is its input embedding, else false."
    )
