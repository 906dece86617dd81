"""Evaluation, compared with plain loops over transformers, and scores of texts worked by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, MATERIAL, factors
from handmade import Outcome
from handmade import adapterkit as command

import adapterkit
from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.errors import AdapterkitError, FitError, FormatError, UsageError
from adapterkit.train.data.records import Record, read_records
from adapterkit.train.data.tokenize import encode_all

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterkit.train.evaluate_options import EvaluateOptions
from adapterkit.train.runs.answer_scores import answer_of, compared, f1, words
from adapterkit.train.runs.evaluate import (
    Completed,
    Event,
    Likelihood,
    Read,
    Scored,
    Started,
    evaluate,
    prepared,
    read,
)

WORDS = [
    "ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx", "mole", "newt", "owl", "pig",
    "quail", "rat", "seal", "toad",
]  # fmt: skip
END = "gnu"  # as good as any other word for what ends a text: the tiny model says it often
PAD = "toad"  # special, too
PROMPTED = [(" ".join(WORDS[at : at + 2 + at % 4]), " ".join(WORDS[at + 5 : at + 6 + at % 3])) for at in range(12)]


def write_tokenizer(folder: Path, vocabulary: int = len(WORDS)) -> None:
    """Write a tokenizer of whole words, filled up to `vocabulary` with meaningless ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    known = WORDS + [f"word{at}" for at in range(vocabulary - len(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(known)}, unk_token=END))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=END, pad_token=PAD).save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama of two layers that knows the words above."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def prompted(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "held_out.jsonl", [{"prompt": p, "completion": c} for p, c in PROMPTED])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": " ".join(WORDS[at : at + 3 + 2 * at])} for at in range(5)]
    return write_lines(tmp_path / "texts.jsonl", rows)


def scored(base: Path, data: Path, adapter: Path | None = None, **options: Any) -> Scored:
    *_, last = evaluate(EvaluateOptions(str(base), str(data), adapter and str(adapter), **options))
    assert isinstance(last, Scored)
    return last


def evaluated(*args: str | Path) -> Outcome:
    return command("eval", *args, "--device", "cpu")


def by_hand(model: Any, rows: list[tuple[list[int], int]]) -> list[tuple[float, int, int]]:
    """Return the summed loss, the count and the hits of each sequence, from token `first` on, in float64."""
    found = []
    for ids, first in rows:
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        places = range(max(first, 1), len(ids))
        loss = -sum(log_p[at - 1, ids[at]].item() for at in places)
        found.append((loss, len(places), sum(int(log_p[at - 1].argmax()) == ids[at] for at in places)))
    return found


def numbers(found: Likelihood) -> list[float]:
    return [found.loss, found.by_token, found.by_sequence, found.next_token]


# --- how texts compare -----------------------------------------------------------------------------------------------


def test_words_are_normalized_as_in_squad() -> None:
    assert words("The  Cat's hat, a-b; An apple!\n(the end)") == ["cats", "hat", "ab", "apple", "end"]
    assert words("Theater another") == ["theater", "another"]  # articles are whole words
    assert words("Où? «là»") == ["où", "«là»"]  # its punctuation is ASCII's


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("a cat sat", "The cat sat.", 1.0),
        ("cat", "cat sat on mat", 2 * 1 / (1 + 4)),
        ("cat cat dog", "cat dog dog owl", 2 * 2 / (3 + 4)),  # each word as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "the", 0.0),
        ("?", "!", 1.0),  # nothing to compare on both sides
    ],
)
def test_f1_of_words(text: str, expected: str, value: float) -> None:
    assert f1(text, expected) == pytest.approx(value)
    assert f1(expected, text) == pytest.approx(value)


def test_the_answer_is_the_first_group_of_the_last_match() -> None:
    assert answer_of("#### 1\nno, #### 42 \n", r"####\s*(\S+)") == "42"
    assert answer_of("x = 1, y = 2", r"(\w) = (\d)") == "y"
    assert answer_of("1 then 23", r"\d+") == "23"
    assert answer_of("it is ( 7 )", r"\((.*)\)") == "7"
    assert answer_of("nothing", r"####\s*(\S+)") is None
    assert answer_of("b", r"(a)|b") is None


def test_a_completion_compared_with_the_expected_one() -> None:
    record = Record("t:1", prompt="6 · 7 =", completion=" so it is #### 42\n")
    same = compared(record, "so it is #### 42", r"#### (\d+)")
    assert (same.exact, same.f1, same.right) == (True, 1.0, True)
    assert (same.where, same.prompt, same.expected) == ("t:1", "6 · 7 =", " so it is #### 42\n")
    other = compared(record, "hence #### 42", r"#### (\d+)")
    assert (other.exact, other.f1, other.right) == (False, pytest.approx(2 * 1 / (2 + 4)), True)
    none = compared(record, "So it is 42", r"#### (\d+)")
    assert (none.exact, none.f1, none.right) == (False, 1.0, False)
    assert compared(record, "So it is 42").right is None


def test_perplexity_by_token_and_by_sequence() -> None:
    found = Likelihood((math.log(2) * 1, math.log(8) * 3), (1, 3), (1, 2))
    assert found.by_token == pytest.approx(2 ** ((1 + 9) / 4))
    assert found.by_sequence == pytest.approx(2 ** ((1 + 3) / 2))
    assert found.next_token == 3 / 4
    assert Likelihood((1e6,), (1,), (0,)).by_token == math.inf


# --- against transformers --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_likelihoods_equal_those_of_a_plain_loop(tiny: Path, prompted: Path, texts: Path, batch_size: int) -> None:
    model, end = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), WORDS.index(END)
    ids = [([WORDS.index(word) for word in f"{p} {c}".split()], len(p.split())) for p, c in PROMPTED]
    ids = [(one if one[-1] == end else [*one, end], first) for one, first in ids]
    rows = by_hand(model, ids)
    found = scored(tiny, prompted, batch_size=batch_size, generate=False).likelihood
    assert found.counts == tuple(count for _, count, _ in rows) and found.right == tuple(right for *_, right in rows)
    assert found.losses == pytest.approx([loss for loss, *_ in rows], rel=1e-5)
    assert found.by_token == pytest.approx(math.exp(sum(a for a, *_ in rows) / sum(b for _, b, _ in rows)), rel=1e-5)
    assert found.by_sequence == pytest.approx(math.exp(sum(a / b for a, b, _ in rows) / len(rows)), rel=1e-5)
    assert abs(found.by_token / found.by_sequence - 1) > 1e-3
    rows = by_hand(model, [([*range(at, min(at + 3 + 2 * at, 20)), end], 0) for at in range(5)])
    assert scored(tiny, texts, batch_size=batch_size).likelihood.losses == pytest.approx(
        [a for a, *_ in rows], rel=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 5])
def test_completions_equal_those_of_generate(tiny: Path, prompted: Path, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer, wanted, lengths = AutoTokenizer.from_pretrained(tiny), [], set()
    for prompt, _ in PROMPTED:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0,
            eos_token_id=WORDS.index(END),
        )  # fmt: skip
        written = [WORDS[at] for at in made[0, ids.shape[1] :]]
        wanted.append(" ".join(word for word in written if word not in (END, PAD)))
        lengths.add(len(written))
    found = scored(tiny, prompted, batch_size=batch_size, max_new_tokens=9).predictions
    assert [one.completion for one in found] == wanted
    assert lengths >= {5, 6, 9} and len(set(wanted)) > 6  # some end, and most differ
    assert [one.where for one in found] == [f"held_out.jsonl:{at}" for at in range(1, 13)]
    assert [(one.prompt, one.expected) for one in found] == PROMPTED


def test_scores_of_completions(tiny: Path, prompted: Path, tmp_path: Path) -> None:
    """A quarter of the references equal the completion, a quarter end alike, the others share no word with it."""
    made = scored(tiny, prompted, max_new_tokens=6).predictions
    rows, overlaps = [], []
    for at, one in enumerate(made):
        written = one.completion.split()
        assert written
        expected = [one.completion + "\n", f"oryx {written[-1]}", "oryx yak", "emu"][at % 4]
        overlaps.append([1.0, 2 / (2 + len(written)), 0.0, 0.0][at % 4])
        rows.append({"prompt": one.prompt, "completion": expected})
    file = write_lines(tmp_path / "mixed.jsonl", rows)
    found = scored(tiny, file, max_new_tokens=6, answer=r"\w+")
    assert (found.exact, found.accuracy) == (3 / 12, 6 / 12)
    assert found.f1 == pytest.approx(sum(overlaps) / 12)
    assert scored(tiny, file, max_new_tokens=6).accuracy is None


def test_the_events_of_an_evaluation(tiny: Path, prompted: Path) -> None:
    events: list[Event] = list(evaluate(EvaluateOptions(str(tiny), str(prompted), batch_size=5)))
    started = events[0]
    assert isinstance(started, Started) and isinstance(events[-1], Scored)
    assert (started.prompts, len(started.data.examples), started.unpadded) == (12, 12, True)
    assert started.max_new_tokens == 3 + 1 + 8  # three words, the end, and a few more
    assert events[1:-1] == [*(Read(n, 12) for n in (5, 10, 12)), *(Completed(n, 12) for n in (5, 10, 12))]
    again = list(evaluate(EvaluateOptions(str(tiny), str(prompted), batch_size=5)))
    assert again[1:] == events[1:]  # to the last bit


def test_only_prompts_are_completed(tiny: Path, tmp_path: Path) -> None:
    """Texts are only scored; a prompt without a token cannot be completed."""
    rows = [
        {"text": "cat dog owl"},
        {"prompt": "", "completion": "cat dog"},
        {"prompt": "cat", "completion": "dog owl"},
    ]
    found = scored(tiny, write_lines(tmp_path / "m.jsonl", rows))
    assert found.likelihood.counts == (3, 2, 3)
    assert [one.where for one in found.predictions] == ["m.jsonl:3"]
    none = scored(tiny, write_lines(tmp_path / "n.jsonl", rows[:2]))
    assert none.predictions == () and none.exact is none.f1 is none.accuracy is None


# --- adapters and 4 bits ---------------------------------------------------------------------------------------------


@pytest.fixture
def with_words(tmp_path: Path) -> Path:
    """The base of the tiny fixtures, with a tokenizer."""
    import shutil

    folder = tmp_path / "tiny-llama"
    shutil.copytree(FIXTURES / "bases" / "tiny-llama", folder)
    write_tokenizer(folder, 128)
    return folder


@pytest.mark.parametrize("name", ["tiny-rslora", "tiny-patterns", "tiny-dora"])
def test_an_adapter_scores_like_its_merge(with_words: Path, prompted: Path, tmp_path: Path, name: str) -> None:
    adapterkit.merge(with_words, [FIXTURES / name], tmp_path / "merged", dtype="fp32")
    merged = scored(tmp_path / "merged", prompted, dtype="fp32")
    beside = scored(with_words, prompted, FIXTURES / name, dtype="fp32")
    assert numbers(beside.likelihood) == pytest.approx(numbers(merged.likelihood), rel=2e-5)
    assert beside.predictions == merged.predictions
    without = scored(with_words, prompted, dtype="fp32", generate=False)
    assert abs(without.likelihood.loss - merged.likelihood.loss) > 1e-3


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_factors_at_the_ends_of_the_model_count(
    tiny: Path, prompted: Path, make_adapter: Callable[..., Path], tmp_path: Path, module: str
) -> None:
    tensors = factors(module, len(WORDS), 64, size=0.4)
    if module != "lm_head":
        tensors = {
            f"{module}.lora_embedding_A": torch.randn(4, len(WORDS)),
            f"{module}.lora_embedding_B": torch.randn(64, 4),
        }
    adapter = make_adapter(tensors)
    adapterkit.merge(tiny, [adapter], tmp_path / "merged")
    merged, beside = scored(tmp_path / "merged", prompted), scored(tiny, prompted, adapter)
    assert numbers(beside.likelihood) == pytest.approx(numbers(merged.likelihood), rel=2e-5)
    assert beside.predictions == merged.predictions
    assert abs(scored(tiny, prompted, generate=False).likelihood.loss - merged.likelihood.loss) > 1e-2


def test_factors_on_a_tied_head(tiny: Path, prompted: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """The embedding is unchanged, as in a merge, which unties them."""
    tied = tmp_path / "tied"
    config = LlamaConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tied)
    assert not any("lm_head" in name for name in open_checkpoint(tied).tensors)
    write_tokenizer(tied)
    adapter = make_adapter(factors("lm_head", len(WORDS), 64, size=0.4))
    adapterkit.merge(tied, [adapter], tmp_path / "merged")
    merged, beside = scored(tmp_path / "merged", prompted), scored(tied, prompted, adapter)
    assert numbers(beside.likelihood) == pytest.approx(numbers(merged.likelihood), rel=2e-5)
    assert beside.predictions == merged.predictions


def test_problems_of_an_adapter_are_noted(tiny: Path, prompted: Path, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter(factors("model.layers.1.self_attn.q_proj", 64, 64), target_modules=["q_proj", "gate_proj"])
    done = evaluated(tiny, adapter, prompted, "--no-generate")
    assert done.err == "note: adapter: adapter_config.json: target_modules: 'gate_proj' has no tensors\n"
    assert done.code == 0 and done.out.startswith("records    12 ")


def test_doras_norms_are_computed_once(with_words: Path, prompted: Path) -> None:
    from adapterkit.train.layers import LoraLayer
    from adapterkit.train.runs.load_model import load_model

    loaded = load_model(open_checkpoint(with_words), torch.float32, torch.device("cpu"))
    loaded.model.train()
    model = prepared(loaded, adapterkit.load(FIXTURES / "tiny-dora"))
    layers = [layer for layer in model.model.modules() if isinstance(layer, LoraLayer)]
    assert layers and not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not any(module.training for module in model.model.modules())
    for layer in layers:
        fresh = type(layer).norm(layer)
        assert torch.equal(layer.norm(), fresh)
        layer.dense = None  # type: ignore[assignment,method-assign]  # what a norm is computed from
        assert torch.equal(layer.norm(), fresh)


@torch.no_grad()
def test_a_base_in_4_bits(tiny: Path, prompted: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """Stored so, quantized while loading, and the former dequantized into a plain file, with an adapter."""
    small, adapter = tmp_path / "small", make_adapter(factors("model.layers.1.self_attn.q_proj", 64, 64, size=0.3))
    adapterkit.quantize(tiny, small, to="nf4", nested=True)
    adapterkit.merge(small, [adapter], tmp_path / "merged", dtype="fp32")
    on_disk, plain = scored(small, prompted), scored(tiny, prompted)
    loaded = scored(tiny, prompted, quantize="nf4")
    assert numbers(on_disk.likelihood) == pytest.approx(numbers(loaded.likelihood), rel=1e-4)
    assert abs(on_disk.likelihood.loss - plain.likelihood.loss) > 1e-3
    beside, merged = scored(small, prompted, adapter), scored(tmp_path / "merged", prompted)
    assert numbers(beside.likelihood) == pytest.approx(numbers(merged.likelihood), rel=1e-4)
    assert beside.predictions == merged.predictions
    assert abs(beside.likelihood.loss - on_disk.likelihood.loss) > 1e-3
    assert scored(tiny, prompted, quantize="fp4", generate=False).likelihood.loss != loaded.likelihood.loss
    with pytest.raises(UsageError, match="`quantize=nf4`: small is already quantized"):
        scored(small, prompted, quantize="nf4")


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    source = MATERIAL / "text" / "mlx_wikisql_test.jsonl"
    if not source.exists():
        pytest.skip("no ../shared/material/text here")
    pairs = [json.loads(line)["text"].split("\nA: ") for line in source.read_text().splitlines()[:4]]
    rows = [{"question": f"{question}\nA:", "query": f" {query}"} for question, query in pairs]
    return write_lines(tmp_path / "sql.jsonl", rows)


@pytest.mark.base
def test_a_trained_adapter_helps(smollm2: Path, sql: Path) -> None:
    names = ("--prompt-field", "question", "--completion-field", "query", "--json")
    before = evaluated(smollm2, sql, "--no-generate", *names)
    after = evaluated(smollm2, FIXTURES / "smollm2-wikisql", sql, "--max-new-tokens", "24", "--limit", "3", *names)
    assert (before.code, after.code) == (0, 0), after.err
    one, other = json.loads(before.out), json.loads(after.out)
    assert one["dtype"] == other["dtype"] == "bfloat16" and (one["records"], other["records"]) == (4, 3)
    assert other["perplexity"]["by_token"] < 1.5 < 5 < one["perplexity"]["by_token"]
    assert other["next_token"] > 0.9 > one["next_token"]
    assert one["completed"] is None and other["completed"]["f1"] > 0.5


# --- the command line ------------------------------------------------------------------------------------------------


def test_what_is_printed(tiny: Path, prompted: Path, tmp_path: Path) -> None:
    done = evaluated(tiny, prompted, "--max-length", "6", "--limit", "7", "--answer", r"\w+$")
    found = scored(tiny, prompted, max_length=6, limit=7, answer=r"\w+$")
    lines = done.out.splitlines()
    data = encode_all(list(read_records(prompted))[:7], AutoTokenizer.from_pretrained(tiny), 6)
    cut = len(data.truncated)
    assert (done.code, cut) == (0, 3)
    assert done.err == f"note: truncated {cut} records, the first at held_out.jsonl:3\n"
    assert lines[:6] == [
        f"records    7 ({data.tokens} tokens, {data.counted} counted, {cut} truncated to 6 tokens)",
        f"perplexity (per token) {found.likelihood.by_token:#.4g}, (per sequence) {found.likelihood.by_sequence:#.4g}",
        f"next-token accuracy {found.likelihood.next_token:.1%}",
        "completed  7 prompts, up to 12 tokens each",
        f"exact      {found.exact:.1%}",
        f"F1         {found.f1:.1%}",
    ]
    assert lines[6] == f"answer     accuracy {found.accuracy:.1%}"
    assert lines[7].startswith("took ") and lines[7].endswith(" on cpu in float32") and len(lines) == 8
    plain = evaluated(tiny, prompted, "--no-generate").out
    assert "truncated" not in plain and "completed" not in plain and "F1" not in plain


def test_json_has_the_same_values(tiny: Path, prompted: Path) -> None:
    with open(prompted, "a") as stream:
        stream.write('{"prompt": "cat"}\n')
    done = evaluated(tiny, prompted, "--skip-bad", "--json")
    facts, found = json.loads(done.out), scored(tiny, prompted, skip_bad=True)
    assert facts["perplexity"] == {"by_token": found.likelihood.by_token, "by_sequence": found.likelihood.by_sequence}
    assert (facts["loss"], facts["next_token"]) == (found.likelihood.loss, found.likelihood.next_token)
    assert facts["completed"] == {
        "prompts": 12, "max_new_tokens": 12, "exact": found.exact, "f1": found.f1, "answer": None, "accuracy": None,
    }  # fmt: skip
    assert (facts["base"], facts["adapter"], facts["data"]) == (str(tiny), None, str(prompted))
    assert facts["records"] == 12 and facts["counted"] == sum(found.likelihood.counts)
    [left] = facts["left_out"]
    assert left["where"] == "held_out.jsonl:13" and f"note: skipped held_out.jsonl:13: {left['why']}" in done.err


def test_predictions_do_not_replace_other_files(tiny: Path, prompted: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.jsonl"
    done = evaluated(tiny, prompted, "--predictions", out, "--answer", r"\w+")
    assert done.code == 0 and done.out.rstrip().endswith(f"\nwrote      {out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = scored(tiny, prompted, answer=r"\w+").predictions
    names = ("where", "prompt", "expected", "completion", "exact", "f1", "right")
    assert rows == [{name: getattr(one, name) for name in names} for one in wanted]
    before = out.read_bytes()
    in_python = adapterkit.evaluate(tiny, prompted, answer=r"\w+", device="cpu", predictions=tmp_path / "python.jsonl")
    assert (tmp_path / "python.jsonl").read_bytes() == before and in_python.predictions == wanted
    printed = [line for line in str(in_python).splitlines() if not line.startswith(("took", "wrote"))]
    assert printed == done.out.splitlines()[: len(printed)] and len(repr(in_python)) < 300 + len(str(tiny))
    (tmp_path / "python.jsonl").unlink()
    assert "already exists" in evaluated(tiny, prompted, "--predictions", out).message(7)
    assert out.read_bytes() == before
    assert evaluated(tiny, prompted, "--predictions", out, "--overwrite").code == 0
    assert "right" not in json.loads(out.read_text().splitlines()[0])
    evaluated(tiny, tmp_path / "none.jsonl", "--predictions", tmp_path / "never.jsonl").message(1)
    assert {path.name for path in tmp_path.iterdir()} == {"held_out.jsonl", "made.jsonl"}


def test_a_progress_bar_on_a_terminal(tiny: Path, prompted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import handmade

    monkeypatch.setattr(handmade.Terminal, "isatty", lambda self: True)
    monkeypatch.setenv("TERM", "xterm")
    done = evaluated(tiny, prompted)
    assert done.code == 0 and "completing" in done.err and "12/12" in done.err and "━" not in done.out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "expected two or three arguments, found 0: adapterkit eval BASE [ADAPTER] DATA"),
        (["BASE"], 2, "found 1"),
        (["BASE", "ADAPTER", "DATA", "DATA"], 2, "found 4"),
        (["BASE", "ADAPTER"], 2, "is a directory, expected the records to evaluate on"),
        (["DATA", "BASE"], 2, "is a directory, expected the records"),
        (["DATA", "DATA"], 2, "held_out.jsonl: not a transformers model"),
        (["BASE", "none.jsonl"], 1, "none.jsonl: no such file"),
        (["ADAPTER", "DATA"], 2, "adapter: is an adapter, expected a model"),
        (["ADAPTER", "BASE", "DATA"], 2, "adapter: is an adapter, expected a model"),
        (["none", "DATA"], 1, "none: no such file or directory"),
        (["BASE", "BASE", "DATA"], 2, "is a model, expected an adapter"),
        (["BASE", "DATA", "--answer", "("], 2, "--answer (: invalid regular expression"),
        (["BASE", "DATA", "--answer", "#### (.*)"], 2, "no match in the completions of 12 records, the first at held_out.jsonl:1"),
        (["BASE", "DATA", "--answer", "x", "--no-generate"], 2, "--answer and --no-generate cannot be combined"),
        (["BASE", "DATA", "--max-new-tokens", "3", "--no-generate"], 2, "--max-new-tokens and --no-generate cannot be combined"),
        (["BASE", "DATA", "--predictions", "x", "--no-generate"], 2, "--predictions and --no-generate cannot be combined"),
        (["BASE", "DATA", "--overwrite"], 2, "--overwrite needs --predictions FILE"),
        (["BASE", "DATA", "--predictions", "DATA", "--overwrite"], 2, "held_out.jsonl: is the input"),
        (["BASE", "TEXTS", "--generate"], 2, "no record has a prompt with a completion"),
        (["BASE", "TEXTS", "--answer", "x"], 2, "no record has a prompt with a completion"),
        (["BASE", "TEXTS", "--predictions", "x"], 2, "no record has a prompt with a completion"),
        (["BASE", "DATA", "--limit", "0"], 2, "--limit 0: expected 1 or more"),
        (["BASE", "DATA", "--batch-size", "0"], 2, "--batch-size 0: expected 1 or more"),
        (["BASE", "DATA", "--max-length", "1"], 2, "--max-length is 1"),
        (["BASE", "DATA", "--max-new-tokens", "60"], 2, "60 more do not fit into the 64 that model supports"),
        (["BASE", "DATA", "--device", "nonsense"], 2, "--device nonsense"),
    ],
)  # fmt: skip
def test_invalid_arguments(
    tiny: Path, prompted: Path, texts: Path, make_adapter: Callable[..., Path], args: list[str], code: int, message: str
) -> None:
    adapter = make_adapter(factors("model.layers.1.self_attn.q_proj", 64, 64))
    paths = {"BASE": tiny, "ADAPTER": adapter, "DATA": prompted, "TEXTS": texts}
    assert message in command("eval", *(paths.get(arg, arg) for arg in args)).message(code)


def test_records_that_cannot_be_used_have_a_line_each(tiny: Path, prompted: Path) -> None:
    result = command("eval", tiny, prompted, "--prompt-field", "question")
    first, *lines, last = result.err.splitlines()
    assert (result.code, first) == (1, "error: 12 of 12 records cannot be used")
    assert all(re.match(r"  held_out.jsonl:\d+: .*expected a text, a prompt with a completion", line) for line in lines)
    assert re.fullmatch(r"  and \d+ more", last)


def test_adapters_that_do_not_fit(
    tiny: Path, prompted: Path, with_words: Path, make_adapter: Callable[..., Path]
) -> None:
    for number, (tensors, config, message) in enumerate([
        (factors("model.layers.7.self_attn.q_proj", 64, 64), {}, "1 of 1 modules and tensors not found in model"),
        (factors("model.layers.1.self_attn.q_proj", 65, 64), {}, "65"),
        (factors("model.layers.1.self_attn.q_proj", 64, 64) | {"nonsense": torch.ones(2)}, {}, "1 unrecognized tensor: "),
        (factors("model.layers.1.self_attn.q_proj", 64, 64), {"use_dora": True}, "have no magnitude"),
    ]):  # fmt: skip
        adapter = make_adapter(tensors, f"adapter{number}", **config)
        assert message in evaluated(tiny, adapter, prompted, "--no-generate").message(3)
    whole = evaluated(with_words, FIXTURES / "tiny-embed-save", prompted).message(3)
    assert "trains this tensor in full" in whole and "Merge the adapter" in whole


def test_non_finite_losses_and_unknown_tokens(tiny: Path, prompted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    broken = tmp_path / "broken"
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(broken)
    write_tokenizer(broken)
    tensors["model.embed_tokens.weight"][WORDS.index("pig")] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterkitError, match=r"held_out.jsonl:\d+: the loss is nan; try `dtype='fp32'`"):
        scored(broken, prompted)
    write_tokenizer(broken, 30)
    rows = [{"text": "cat word5"}]
    with pytest.raises(FitError, match="has token 25, the vocabulary of broken has 20"):
        scored(broken, write_lines(tmp_path / "unknown.jsonl", rows))
    long = write_lines(tmp_path / "long.jsonl", [{"text": "cat " * 100}])
    with pytest.raises(UsageError, match="has 101 tokens, model supports at most 64; use `max_length=64`"):
        scored(tiny, long)
    assert scored(tiny, long, max_length=64).likelihood.counts == (63,)
    with pytest.raises(FormatError, match="cannot load a tokenizer"):
        scored(FIXTURES / "bases" / "tiny-llama", prompted)


def test_an_evaluation_that_needs_too_much_memory(tiny: Path, prompted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.train.runs.evaluate.available", lambda device: 1000)
    with pytest.raises(UsageError, match="0.0 GB are free on cpu; `quantize='nf4'` needs less"):
        scored(tiny, prompted)


def test_a_default_length_that_stays_within_the_model(tiny: Path, tmp_path: Path) -> None:
    """58 tokens of prompt leave six, although the completion and its margin would be ten."""
    data = write_lines(tmp_path / "long.jsonl", [{"prompt": "cat " * 58, "completion": "dog"}])
    started = next(iter(evaluate(EvaluateOptions(str(tiny), str(data)))))
    assert isinstance(started, Started) and started.max_new_tokens == 6


def test_reading_takes_records_in_any_order(tiny: Path, prompted: Path) -> None:
    from adapterkit.train.runs.load_model import load_model

    model = prepared(load_model(open_checkpoint(tiny), torch.float32, torch.device("cpu")), None)
    data = encode_all(read_records(prompted), AutoTokenizer.from_pretrained(tiny), 64)
    both = []
    for examples in (data.examples, data.examples[::-1]):
        reading = read(model, examples, 4)
        with pytest.raises(StopIteration) as end:
            while True:
                next(reading)
        both.append(end.value.value)
    assert both[0].counts == both[1].counts[::-1]
    assert both[0].losses == pytest.approx(both[1].losses[::-1], rel=1e-5)
