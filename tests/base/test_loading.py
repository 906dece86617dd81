"""Untrusted models: only the checked weights are loaded, and none of their code is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import adapterkit, contents
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from adapterkit.base.checkpoint import open_checkpoint
from adapterkit.base.models import loading, tokenizer_subprocess, tokenizing
from adapterkit.base.models.loading import load_causal, load_tokenizer, quiet, sanitized
from adapterkit.base.models.tokenizing import decode_text, encode_text
from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.files import sandbox_subprocess
from adapterkit.train.data import chat_template_subprocess, parquet_subprocess

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 4)
    return tmp_path / "text.txt"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def commands(model: Path, text: Path) -> list[tuple[str | Path, ...]]:
    """Every command that makes transformers load a model."""
    out = model.parent / "out"
    return [
        ("train", model, text, "-o", out, "--max-steps", "1"),
        ("eval", model, text),
        ("quantize", model, "-o", out, "--to", "nf4", "--rounding", "compensated", "--calibration", text),
    ]


# --- code ------------------------------------------------------------------------------------------------------------


class Loads:
    """A pickle that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def write_code(model: Path, proof: Path) -> None:
    code = (
        f"open({str(proof)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    )
    code += "class C(LlamaConfig): model_type = 'strange'\nclass M(LlamaForCausalLM): config_class = C\n"
    (model / "canary.py").write_text(code + "class T(PreTrainedTokenizerFast): pass\n")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    tokenizer = {"AutoTokenizer": ["canary.T", "canary.T"]}
    change(model / "config.json", auto_map={"AutoConfig": "canary.C", "AutoModelForCausalLM": "canary.M"} | tokenizer)
    change(model / "tokenizer_config.json", auto_map=tokenizer)


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_model_is_run(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """transformers' own code is used if it has any for the model; otherwise the model is refused before loading."""
    proof = text.with_name("proof")
    write_code(model, proof)
    if not known:
        change(model / "config.json", model_type="strange", architectures=["M"])
    for command in commands(model, text):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        result = adapterkit(*command)
        assert not proof.exists()
        assert sys.stdin.read(1) == "y", "it was asked"
        if known:
            assert result.code == 0, result
            shutil.rmtree(text.with_name("out"), ignore_errors=True)
        else:
            message = result.message(1)
            assert message.startswith(f"{model}/config.json: model_type is 'strange', which transformers")
            assert message.endswith("the model's own code (auto_map) is never run")
            assert "trust_remote_code" not in message


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neox", "vit"])
def test_the_code_of_a_tokenizer_is_not_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, elsewhere: bool
) -> None:
    """Neither code beside it nor code named in its config; refused if transformers has none for the model."""
    write_code(model, proof := tmp_path / "proof")
    change(model / "config.json", model_type=kind)
    named = f"{model}--canary.T" if elsewhere else "canary.T"
    change(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [named, named]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    if kind == "vit":
        with pytest.raises(UnsafeFileError, match=r"^\S+/model/tokenizer_config.json: needs the tokenizer's own code"):
            load_tokenizer(open_checkpoint(model))
    else:
        assert load_tokenizer(open_checkpoint(model))("w1 w5")["input_ids"]
    assert not proof.exists() and sys.stdin.read(1) == "y"


# --- weights ---------------------------------------------------------------------------------------------------------


def canary_pickle(model: Path) -> None:
    torch.save({FIRST: Loads(model.with_name("proof"))}, model / "pytorch_model.bin")


def weights_of_another_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    canary_pickle(model)


def distributed(model: Path) -> None:
    """transformers recognizes a folder of torch distributed checkpoints by its pickled `.metadata`."""
    (model / ".metadata").write_bytes(pickle.dumps(Loads(model.with_name("proof"))))
    (model / "__0_0.distcp").touch()


def named_by_the_config(model: Path) -> None:
    """The config makes transformers load a file with an inconspicuous name."""
    change(model / "config.json", transformers_weights="model.safetensors")


def an_adapter(model: Path) -> None:
    """transformers would load the adapter beside a model, pickled or not."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2}')
    torch.save({"x": Loads(model.with_name("proof"))}, model / "adapter_model.bin")


def kernels(model: Path) -> None:
    change(model / "config.json", attn_implementation="someone/kernel", _attn_implementation_internal="someone/kernel")


def a_link_to_secrets(model: Path) -> None:
    (model / "chat_template.jinja").symlink_to("/proc/self/environ")


def a_pipe(model: Path) -> None:
    for name in ("generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)


def shards(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = {f"model-{i + 1:05}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, model / file, {"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, model / "consolidated.safetensors")


HOSTILE: list[Callable[[Path], None]] = [
    canary_pickle, weights_of_another_name, distributed, named_by_the_config, an_adapter, kernels, a_link_to_secrets,
    a_pipe, shards,
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.__name__)
def test_only_the_checked_weights_are_loaded(model: Path, tiny: Path, hostile: Callable[[Path], None]) -> None:
    hostile(model)
    base, expected = open_checkpoint(model), load_file(tiny / "model.safetensors")
    loaded, tokenizer = load_causal(base), load_tokenizer(base)
    assert {name: bool(torch.equal(t, expected[name])) for name, t in loaded.state_dict().items()} == dict.fromkeys(
        expected, True
    )
    assert not model.with_name("proof").exists()
    assert tokenizer("w1 w5")["input_ids"] and "PATH" not in str(tokenizer.chat_template)


@pytest.mark.parametrize("values", [{"return_dict": False}, {"output_hidden_states": "x"}, {"output_attentions": True}])
def test_a_config_does_not_decide_what_a_model_returns(model: Path, text: Path, values: dict[str, Any]) -> None:
    expected = adapterkit("eval", model, text, "--json")
    change(model / "config.json", **values)
    assert json.loads(adapterkit("eval", model, text, "--json").out)["loss"] == json.loads(expected.out)["loss"]
    assert adapterkit(*commands(model, text)[2]).code == 0


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_weights_that_are_not_quantized_despite_the_config(model: Path, text: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    change(model / "config.json", quantization_config={"quant_method": "bitsandbytes", bits: True})
    for command in commands(model, text)[:2]:
        message = adapterkit(*command).message(1)
        assert message.endswith("_proj.weight is not quantized, but the config says so; remove quantization_config")


def test_saved_files_have_no_local_paths(model: Path, tmp_path: Path) -> None:
    base = open_checkpoint(model)
    load_causal(base).save_pretrained(tmp_path / "saved")
    load_tokenizer(base).save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        assert str(tmp_path.parent).encode() not in file.read_bytes(), file
        assert b"adapterkit-" not in file.read_bytes(), file


def test_calibration_needs_all_weights(model: Path, text: Path) -> None:
    """transformers would fill in random numbers."""
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    before = contents(model)
    for command in commands(model, text)[1:]:
        assert "lacks 1 tensor that its config requires" in adapterkit(*command).message(1)
    assert contents(model) == before


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"], tensors[FIRST]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (narrow, r"model\.norm\.weight has shape \(\d+,\), but its config expects \(\d+,\)"),
        (lacking, rf"lacks 2 tensors that its config requires, such as {FIRST}"),
    ],
)
def test_weights_that_do_not_match_the_config(
    model: Path, spoil: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    tensors = load_file(model / "model.safetensors")
    spoil(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=said):
        load_causal(open_checkpoint(model))


def test_a_sanitized_config() -> None:
    config = {
        "auto_map": {"AutoModel": "x.M"}, "hidden_size": 8, "attn_implementation": "sdpa", "layers": [{"a": None}],
        "_attn_implementation_internal": "org/kernel", "note": "org/kernel", "experts_implementation": {"": "org/kernel"},
        "text_config": {"transformers_weights": "x", "auto_map": 1, "attn_implementation": "org/kernel@main", "dim": 4},
    }  # fmt: skip
    left = {"hidden_size": 8, "attn_implementation": "sdpa", "layers": [{"a": None}], "note": "org/kernel"}
    assert sanitized(config) == left | {"text_config": {"dim": 4}}


@pytest.mark.parametrize("several", [False, True])
def test_the_folder_for_transformers(several: bool, model: Path) -> None:
    """Links to the checked weights, and copies of tokenizer files; nothing else."""
    if several:
        shards(model)
    weights = {file.name for file in model.glob("model*.safetensors")}
    kinds = ("merges.txt", "spiece.model", "t.jinja", "bpe.codes", "source.spm", "q.tiktoken", "t.tokenizer", "b.vocab")
    for name in (*kinds, "notes.md", "data.bin", "code.py", "additional_chat_templates/a.jinja", "more/merges.txt"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    with loading._folder_for(open_checkpoint(model)) as folder:
        seen = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert seen == {
            *(path.name for path in model.glob("*.json")),
            *weights,
            *kinds,
            "additional_chat_templates/a.jinja",
        }
        assert {path.name for path in folder.rglob("*") if path.is_symlink()} == weights
        assert all((folder / name).read_text() == name for name in kinds)
    assert not folder.exists()


# --- tokenizers ------------------------------------------------------------------------------------------------------


class Panics(BaseException):
    """Like pyo3's exception for a Rust panic, not an Exception."""


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([0, 2**31 - 1], None),
        ([], None),
        ([1, 2**31], "returned a token id above 2,147,483,647"),
        ([-1], "returned a token id above"),
        (ValueError("a\nb  c"), "its tokenizer failed: a b c$"),
        (Panics("index out of bounds"), "its tokenizer failed: index out of bounds$"),
        (ValueError("x" * 10_000), "its tokenizer failed: x{240}$"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("name", ["a model", None])
def test_the_result_of_a_tokenizer_is_checked(
    made: list[int] | BaseException, said: str | None, name: str | None
) -> None:
    class Tokenizer:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert (text, options) == ("text", {"verbose": False, "more": 1})
            if isinstance(made, BaseException):
                raise made
            return {"input_ids": made}

    tokenizer = Tokenizer()
    if name:
        tokenizer.name_or_path = name  # type: ignore[attr-defined]
    if said is None:
        assert encode_text(tokenizer, "text", more=1)["input_ids"] == made
        return
    with pytest.raises(FormatError, match=f"^{name or 'the base'}: .*{said}"):
        encode_text(tokenizer, "text", more=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_tokenizer(error: type[BaseException]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise error

    with pytest.raises(error):
        encode_text(interrupted, "text")


@pytest.mark.parametrize(
    "contents", [[], ["", "x"], ["x" * 100], ["x" * 10, "y" * 10], ["x" * 101], ["x" * 51, "y" * 2]]
)
def test_a_normalizer_that_makes_text_much_longer(contents: list[str], model: Path) -> None:
    """In a sequence the factors multiply."""
    nodes = [{"type": "Replace", "pattern": {"String": "w"}, "content": one} for one in contents]
    change(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": nodes} if nodes else None)
    base, grown = open_checkpoint(model), len("".join(contents)) if len(contents) < 2 else 0
    grown = grown or (len(contents[0]) or 1) * len(contents[1]) if contents else 1
    if grown <= 100:
        assert load_tokenizer(base) is not None
    else:
        with pytest.raises(FormatError, match=r"tokenizer\.json: its normalizer makes text more than 100 times"):
            load_tokenizer(base)


# --- what transformers says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_restores_the_settings_of_transformers(bars: bool) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        logging.enable_progress_bar() if bars else logging.disable_progress_bar()
        logging.set_verbosity_info()
        with pytest.raises(ValueError, match="body"), quiet():
            assert not logging.is_progress_bar_enabled() and logging.get_verbosity() >= logging.ERROR
            raise ValueError("body")
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, logging.INFO)
    finally:
        logging.enable_progress_bar() if before[0] else logging.disable_progress_bar()
        logging.set_verbosity(before[1])


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("", "ValueError"),
        ("a\n\tb", "a b"),
        ("no {ours}/config.json", "no {theirs}/config.json"),
        ("x" * 240, "x" * 240),
        ("x" * 241, "x" * 240 + " …"),
    ],
    ids=lambda text: text[:10] or "nothing",
)
def test_errors_of_transformers_are_shortened(said: str, shown: str, model: Path) -> None:
    base = open_checkpoint(model)
    error = ValueError(said.format(ours="/tmp/adapterkit-x")) if said else ValueError()
    assert loading._shorten(error, Path("/tmp/adapterkit-x"), base) == shown.format(theirs=base.path)


# --- regular expressions ---------------------------------------------------------------------------------------------

SLOW = r"(.{0,1500}){2}(?<=~)"  # two million steps per 3000 characters, which is below Oniguruma's limit


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}


@pytest.mark.parametrize("where", ["a text", "what it loads"])
def test_a_tokenizer_with_a_slow_pattern_is_stopped(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """By CPU time; Python cannot be interrupted while it matches."""
    monkeypatch.setattr(tokenizing, "SECONDS", 0)  # the limit is in whole seconds
    text.write_text("w1 " * 9000)
    if where == "a text":
        change(model / "tokenizer.json", pre_tokenizer=split_by(SLOW))
    else:
        change(model / "tokenizer.json", normalizer=replaced(SLOW))
        change(model / "tokenizer_config.json", extra_special_tokens={"token": "a" * 20_000})
    message = adapterkit("eval", model, text).message(1)
    assert "model: its tokenizer took more than 0 s of CPU time" in message


def test_a_regex_under_an_escaped_key_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tokenizing.Sandbox, "ask", lambda self, request, longest: asked.append(request) or {})
    file = model / "tokenizer.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"normalizer": replaced("a")}).replace("Reg", "R\\u0065g")
    )
    load_tokenizer(open_checkpoint(model))
    assert ["folder" in request for request in asked] == [True]


def test_tokens_are_the_same_in_a_sandbox(model: Path) -> None:
    """The same as by transformers' tokenizer, with offsets; also after a text that fails."""
    change(
        model / "tokenizer.json",
        normalizer=replaced("v"),
        pre_tokenizer={
            "type": "Sequence", "pretokenizers": [split_by(r"\s+(?!\S)|\s"), {"type": "WhitespaceSplit"}, split_by("(a+)+b")]
        },
        post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
        },
    )  # fmt: skip
    tokenizer = load_tokenizer(open_checkpoint(model))
    for special in (True, False):
        options = {"add_special_tokens": special, "return_offsets_mapping": True}
        for sample in ("w1  w2\nw59 <eos> é w7", "", "<pad>w3"):
            expected, found = tokenizer(sample, **options), encode_text(tokenizer, sample, **options)
            assert found["input_ids"] == expected["input_ids"]
            assert [tuple(span) for span in found["offset_mapping"]] == expected["offset_mapping"]
    with pytest.raises(FormatError, match="model: its tokenizer failed: Onig"):
        encode_text(tokenizer, "a" * 50)
    ids = encode_text(tokenizer, "w1 w2 <eos>")["input_ids"]
    assert decode_text(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) == "w1 w2"


@pytest.mark.parametrize(
    ("program", "arguments", "request_"),
    [
        (chat_template_subprocess, ["5"], b'{"template": "x", "tokens": {}, "messages": []}\n'),
        (tokenizer_subprocess, ["5"], b'{"ids": []}\n'),
        (parquet_subprocess, ["[]"], b"no Parquet"),
    ],
)
def test_a_sandbox_under_lower_limits(program: Any, arguments: list[str], request_: bytes) -> None:
    """By `ulimit -v` and `ulimit -t`, which it cannot raise and does not try to."""
    bounds = (
        "import resource as r, os, sys; r.setrlimit(r.RLIMIT_CPU, (60,) * 2); r.setrlimit(r.RLIMIT_AS, (1 << 35,) * 2)"
    )
    command = [sys.executable, "-c", f"{bounds}; os.execv(sys.argv[1], sys.argv[1:])", sys.executable]
    ended = subprocess.run(
        [*command, "-P", sandbox_subprocess.__file__, program.__file__, str(1 << 40), *arguments],
        input=request_,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0 and b"limit" not in ended.stderr + ended.stdout, ended
