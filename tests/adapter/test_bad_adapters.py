"""Invalid and hostile adapters: each ends in one clear error line and its exit code, and leaves nothing on the disk."""

from __future__ import annotations

import json
import os
import pickle
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import COLUMNS, CONFIG, MODULES, RANK, ROWS, adapterkit, contents, factors, write_adapter, write_base
from safetensors.torch import save_file

import adapterkit as package
from adapterkit.errors import OutputExistsError

FIRST = f"base_model.model.{MODULES[0]}"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def refused(base: Path, adapter: Path, code: int, *options: str) -> str:
    """Return the message of a merge that must fail without changing anything."""
    folder = base.parent
    before = contents(folder)
    result = adapterkit("merge", base, adapter, "-o", folder / "out", *options)
    assert contents(folder) == before
    assert result.out == ""
    return result.message(code)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Touch:
    """A pickle that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def make_bin(folder: Path, state: Any, **options: Any) -> Path:
    folder.mkdir()
    torch.save(state, folder / "adapter_model.bin", **options)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("how", ["plain pickle", "torch zip", "torch legacy"])
def test_code_in_a_pickle_does_not_run(base: Path, how: str) -> None:
    proof = base.parent / "proof"
    state = factors() | {"evil": Touch(proof)}
    adapter = make_bin(base.parent / "a", state, _use_new_zipfile_serialization=how == "torch zip")
    if how == "plain pickle":
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Touch(proof)))
    message = refused(base, adapter, 1)
    assert "none of its code was run" in message
    assert "safetensors" in message
    assert not proof.exists()


def test_unpickling_would_be_detected(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


STATES = {
    "a list": ([torch.zeros(2)], "expected a dictionary of named tensors, found list"),
    "a tensor": (torch.zeros(2), "expected a dictionary of named tensors, found Tensor"),
    "numbered": ({1: torch.zeros(2)}, "expected a dictionary of named tensors"),
    "a line break in a name": (
        {"a\nb": torch.zeros(2)},
        r"the tensor name 'a\nb' has the unprintable character U+000A",
    ),
    "nested": ({"model": factors()}, "model is a dict, expected a tensor"),
    "numpy": ({"a": np.zeros(2)}, "not a plain dictionary of tensors"),
    "huge by stride 0": ({f"{FIRST}.lora_A.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, "more than fits in"),
    "sparse": ({"a": torch.zeros(2, 2).to_sparse()}, "it uses 'torch._utils _rebuild_sparse_tensor'"),
    "without storage": ({"a": torch.zeros(2, device="meta")}, "expected a plain CPU tensor"),
    "complex128": ({"a": torch.zeros(2, dtype=torch.complex128)}, "expected a plain CPU tensor"),
}


@pytest.mark.parametrize(("state", "expected"), STATES.values(), ids=STATES)
def test_a_bin_of_something_else(base: Path, state: Any, expected: str) -> None:
    assert expected in refused(base, make_bin(base.parent / "a", state), 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_takes_all_memory(base: Path, zipped: bool) -> None:
    """torch.load runs no code in such a file, but allocates bytearrays of any size."""
    adapter = make_bin(base.parent / "a", {"a": bytearray(3)}, _use_new_zipfile_serialization=zipped)
    assert "it uses " in refused(base, adapter, 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_a_million_operations(base: Path, zipped: bool) -> None:
    """20 MB of empty lists once took 1.4 GB and half a minute."""
    adapter = make_bin(base.parent / "a", [None] * 1_000_001, _use_new_zipfile_serialization=zipped)
    assert "it has more than 1,000,000 operations" in refused(base, adapter, 1)


def test_a_zip_bomb(base: Path) -> None:
    adapter = make_bin(base.parent / "a", factors())
    with zipfile.ZipFile(adapter / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 24))
    assert "decompress to 16,777,216 bytes" in refused(base, adapter, 1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1])
def test_a_truncated_bin(base: Path, zipped: bool, keep: float) -> None:
    adapter = make_bin(base.parent / "a", factors(), _use_new_zipfile_serialization=zipped)
    raw = (adapter / "adapter_model.bin").read_bytes()
    (adapter / "adapter_model.bin").write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    assert "adapter_model.bin: " in refused(base, adapter, 1)


def test_a_zip_with_a_broken_directory(base: Path) -> None:
    adapter = make_bin(base.parent / "a", factors())
    raw = (adapter / "adapter_model.bin").read_bytes()
    (adapter / "adapter_model.bin").write_bytes(raw.replace(b"PK\x01\x02", b"PK\x01\xff"))
    assert "cannot be read as a torch file" in refused(base, adapter, 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_bin_is_read(base: Path, zipped: bool) -> None:
    """As torch.save writes it, today and before 1.6, also with Parameters in it; it merges like the safetensors."""
    state = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in factors().items())
    pickled = make_bin(base.parent / "a", state, _use_new_zipfile_serialization=zipped)
    plain = write_adapter(base.parent / "b")
    for adapter in (pickled, plain):
        assert adapterkit("merge", base, adapter, "-o", base.parent / f"of-{adapter.name}").code == 0
    for shard in base.glob("*.safetensors"):
        assert (base.parent / "of-a" / shard.name).read_bytes() == (base.parent / "of-b" / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("diffusers-catundchat/pytorch_lora_weights.bin", "a LoRA of diffusers"),  # its tensors were saved on a GPU
        ("diffusers-catundchat/pytorch_lora_weights.safetensors", "a LoRA of diffusers"),
        ("sam-lora-mathieu-mit/lora_rank2.safetensors", "a LoRA of Sam_LoRA"),
        ("sd-cloneofsimo-apache/lora_disney.safetensors", "a LoRA of cloneofsimo's scripts"),
        ("mlx-wyek1n", "an adapter of MLX"),
    ],
)
def test_a_real_adapter_of_an_unknown_format(
    base: Path, material: Callable[[str], Path], name: str, format: str
) -> None:
    message = refused(base, material(name), 1)
    assert f"is {format}" in message and ", an unsupported adapter format (tensors: " in message
    assert "supported formats: peft" in message


FOREIGN = {
    "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": "kohya's scripts or LyCORIS",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "kohya's scripts or LyCORIS",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "a LoRA of diffusers",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA of diffusers",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": "a LoRA of diffusers",
    "diffusion_model.layers.0.attention.to_q.lora_A.weight": "a LoRA for ComfyUI",
    "model.layers.0.self_attn.q_proj.lora_a": "an adapter of MLX",
    "layers.0.attn.q_proj.lora_a.weight": "an adapter of torchtune",
    "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": "Megatron or NeMo",
    "prompt_embeddings": "prompt tuning, which changes no weights",
    "base_model.model.model.layers.0.self_attn.k_proj.ia3_l": "IA³",
    "base_model.model.model.layers.0.self_attn.k_proj.vera_lambda_b": "VeRA",
    "base_model.model.model.layers.0.self_attn.k_proj.hada_w1_a": "LoHa",
}


@pytest.mark.parametrize(("tensor", "format"), FOREIGN.items(), ids=FOREIGN)
def test_other_formats_are_named_by_their_tensors(base: Path, tensor: str, format: str) -> None:
    folder = write_adapter(base.parent / "a", {tensor: torch.ones(2, 2)}, None)
    assert format in refused(base, folder, 1)
    message = refused(folder / "adapter_model.safetensors", folder, 2)
    assert "adapter_model.safetensors: is an adapter, expected a model" in message


@pytest.mark.parametrize(
    "names", [["text_encoder.shared.weight", "decoder.w"], ["prompt_encoder.mask_embed.conv1.weight", "clip_l"], []]
)
def test_models_with_names_of_other_formats_stay_models(tmp_path: Path, names: list[str]) -> None:
    """MusicGen has a text_encoder, SAM a prompt_encoder."""
    (base := tmp_path / "base").mkdir()
    tensors = {f"{module}.weight": torch.zeros(ROWS, COLUMNS) for module in MODULES}
    save_file(tensors | {name: torch.ones(2) for name in names}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert adapterkit("merge", base, write_adapter(tmp_path / "a"), "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn", "model.layers.0.self_attn.q_proj"])
def test_language_models_are_not_taken_for_diffusion(tmp_path: Path, name: str) -> None:
    tensors = {f"{name}.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
    assert list(package.load(write_adapter(tmp_path / "a", tensors, None), alpha=4).modules) == [name]


@pytest.mark.parametrize(
    ("file", "format"),
    [("adapters.npz", "an adapter of MLX"), ("a.gguf", "GGUF"), ("pytorch_adapter.bin", "an adapter of AdapterHub"),
     ("zero_to_fp32.py", "a DeepSpeed checkpoint: gather its weights with zero_to_fp32.py")],
)  # fmt: skip
def test_other_formats_are_named_by_their_files(base: Path, file: str, format: str) -> None:
    folder = base.parent / "a"
    folder.mkdir()
    (folder / file).touch()
    assert f"no adapter weights in this directory, but {file}, " in (message := refused(base, folder, 1))
    assert format in message
    assert format in refused(base, folder / file, 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("PROMPT_TUNING", "changes no weights, so that it has nothing to merge"), ("IA3", "merge it with PEFT"),
     ("ADALORA", "merge it with PEFT")],
)  # fmt: skip
def test_other_methods_of_peft_are_named(base: Path, kind: str, expected: str) -> None:
    message = refused(base, write_adapter(base.parent / "a", config={"peft_type": kind}), 1)
    assert f"peft_type is '{kind}'" in message and expected in message


@pytest.mark.parametrize("base_beside", [False, True])
def test_an_adapter_beside_a_models_config(base: Path, base_beside: bool) -> None:
    """Without adapter_config.json, transformers loads the model if there is one, and nothing otherwise."""
    folder = write_adapter(base.parent / "a", config=None)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if base_beside:
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        assert "a: is a model, expected an adapter" in refused(base, folder, 2)
        return
    assert "--alpha" in refused(base, folder, 2)
    assert adapterkit("inspect", folder).out.splitlines()[0].startswith("adapter  ")
    assert "a: is an adapter, expected a model" in refused(folder, write_adapter(base.parent / "b"), 2)
    assert adapterkit("merge", base, folder, "--alpha", "6", "-o", base.parent / "of-a").code == 0


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty directory", "fifo", "two files", "nested", "text", "empty file"])
def test_paths_that_are_not_an_adapter(base: Path, kind: str) -> None:
    adapter = base.parent / "a"
    if kind == "fifo":
        os.mkfifo(adapter)
    elif kind in ("text", "empty file"):
        adapter.write_text("hello" if kind == "text" else "")
    elif kind != "missing":
        adapter.mkdir()
    if kind == "two files":
        (adapter / "x.safetensors").touch()
        (adapter / "y.safetensors").touch()
    if kind == "nested":
        write_adapter(adapter / "checkpoint-10")
    expected = {"nested": "Did you mean", "two files": "(x.safetensors, y.safetensors); give the path of one of them"}
    assert expected.get(kind, str(adapter)) in refused(base, adapter, 1)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "the environment": lambda file: file.symlink_to("/proc/self/environ"),
    "itself": lambda file: file.symlink_to(file),
    "a directory": Path.mkdir,
    "a socket": lambda file: os.mknod(file, stat.S_IFSOCK | 0o600),
    "many values": lambda file: file.write_bytes(b'{"a":[' + b"{}," * 300_000 + b"{}]}"),
    "many bytes": lambda file: file.write_bytes(b" " * (1 << 24) + b"{}"),
    "deep": lambda file: file.write_bytes(b'{"a":' * 50_000),
}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_folder_of_hostile_adapters(base: Path, tmp_path: Path, name: str) -> None:
    """Nothing blocks, and each ends in one line; `list` shows the good one among them."""
    adapters = tmp_path / "adapters"
    write_adapter(adapters / "good")
    for kind, make in HOSTILE.items():
        folder = write_adapter(adapters / kind)
        if name == "adapter_model.bin":
            (folder / "adapter_model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        for args in (("merge", base, folder, "-o", tmp_path / "out"), ("inspect", folder)):
            assert adapterkit(*args).message(1).startswith(str(folder)), kind
    listed = adapterkit("list", adapters, "--json")
    rows = {row["name"].rpartition("/")[2]: row for row in json.loads(listed.out)["adapters"]}
    assert listed.code == 0 and rows["good"]["problem"] is None
    assert "PATH" not in listed.out


# --- adapter_config.json ---------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, Any] = {
    "is not valid JSON": [b"", b"{", b"\xff\xff", b'{"r": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    "expected a JSON object": [b"[]", b"null", b'"LORA"'],
    "duplicate key 'r'": [b'{"r": 8, "r": 16}'],
    "peft_type is": [{"peft_type": "IA3"}, {"peft_type": "LOHA"}, {"peft_type": 1}, {"peft_type": ["LORA"]}],
    "r is": [{"r": "8"}, {"r": 8.0}, {"r": True}, {"r": [8]}, {"r": 0}, {"r": -4}, {"r": 10**30}],
    "lora_alpha is": [
        {"lora_alpha": "16"}, {"lora_alpha": True}, {"lora_alpha": NAN}, {"lora_alpha": INF}, {"lora_alpha": -INF},
        {"lora_alpha": 10**400}, {"lora_alpha": {}},
    ],
    "rank_pattern": [
        {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_proj": "8"}}, {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 0.5}}, {"rank_pattern": {"q_proj": True}}, {"rank_pattern": {"q_proj": None}},
    ],
    "alpha_pattern": [
        {"alpha_pattern": "q_proj"}, {"alpha_pattern": {"q_proj": "8"}}, {"alpha_pattern": {"q_proj": NAN}},
        {"alpha_pattern": {"q_proj": INF}}, {"alpha_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": {}}},
    ],
    "is not a regular expression": [
        {"alpha_pattern": {"(": 8}}, {"alpha_pattern": {"a{99999999999}": 8}}, {"alpha_pattern": {"(?i)q": 8}},
    ],
    "cannot be matched in bounded time": [
        {"alpha_pattern": {key: 8}}
        for key in (r"(?!x)q_proj", r"(?<=\.)q", r"(a)\1", "(?P<a>a)(?P=a)", "a++b", "a{,3}b", "[[:alpha:]]", "(a{900}){900}")
    ],
    "has 501 characters, expected at most 500": [{"alpha_pattern": {"a" * 501: 8}}],
    "more than 2000 patterns": [{"rank_pattern": dict.fromkeys(map("a{}".format, range(2001)), 8)}],
    "target_modules is": [{"target_modules": 1}, {"target_modules": [1]}, {"target_modules": {"q_proj": 1}}],
    "modules_to_save is": [{"modules_to_save": "score"}, {"modules_to_save": [["score"]]}, {"modules_to_save": 1}],
    "target_parameters is": [{"target_parameters": "experts"}, {"target_parameters": [None]}],
    "use_rslora is": [{"use_rslora": "true"}, {"use_rslora": 1}],
    "use_dora is": [{"use_dora": "no"}, {"use_dora": 0}],
    "fan_in_fan_out is": [{"fan_in_fan_out": "false"}],
    "base_model_name_or_path is": [{"base_model_name_or_path": {"a": 1}}, {"base_model_name_or_path": 1}],
    "bias is": [{"bias": True}],
    "trainable_token_indices is": [{"trainable_token_indices": "all"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "config"),
    [(expected, config) for expected, configs in BAD_CONFIGS.items() for config in configs],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_bad_config(base: Path, expected: str, config: Any) -> None:
    config = config if isinstance(config, bytes) else CONFIG | config
    message = refused(base, write_adapter(base.parent / "a", config=config), 1)
    assert message.startswith(f"{base.parent}/a/adapter_config.json: ")
    assert expected in message


SLOW = [
    "(a+)+b",
    "((a+))+b",
    "(a|a)*b",
    "(?:a|aa){5,}b",
    "a?" * 50,
    ".*" * 9 + "x",
    "(a|a)" * 40,
    "(" + "|" * 469 + ")x",
]


def test_patterns_that_backtrack_are_matched_fast(base: Path, tmp_path: Path) -> None:
    """With `re`, six modules took 40 s with 469 empty alternatives, and `list` never ended."""
    names = [".".join("a" * 100) + f".{name}" for name in MODULES]
    tensors = {f"base_model.model.{name}.lora_{k}.weight": torch.ones(RANK, RANK) for name in names for k in "AB"}
    patterns = {"alpha_pattern": dict.fromkeys(SLOW, 2), "rank_pattern": dict.fromkeys(SLOW, RANK)}
    adapter = write_adapter(tmp_path / "a", tensors, CONFIG | patterns | {"target_modules": SLOW[0]})
    assert adapterkit("list", tmp_path).code == 0
    assert adapterkit("inspect", adapter).code == 0
    assert "not found in base" in refused(base, adapter, 3)


def test_too_many_patterns(base: Path) -> None:
    names = ["a" * 900 + f".{i}.{MODULES[0]}" for i in range(40)]
    tensors = {f"base_model.model.{name}.lora_{k}.weight": torch.ones(RANK, RANK) for name in names for k in "AB"}
    patterns = {f"({i}" + "a{0,90}" * 9 + ")x": 2 for i in range(400)}
    adapter = write_adapter(base.parent / "a", tensors, CONFIG | {"alpha_pattern": patterns})
    assert "400 patterns would take too long to match against 40 names" in refused(base, adapter, 1)


UNMERGEABLE = {
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 4], [2, 6]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "arrow_config": {"a": 1},
    "kasa_config": {"beta": 1e-4},
}


@pytest.mark.parametrize(("name", "value"), UNMERGEABLE.items())
def test_configs_that_cannot_be_merged(base: Path, name: str, value: Any) -> None:
    adapter = write_adapter(base.parent / "a", config=CONFIG | {name: value})
    assert f"adapter_config.json: {name}" in refused(base, adapter, 3)


def test_alpha_is_required_without_a_config(base: Path) -> None:
    message = refused(base, write_adapter(base.parent / "a", config=None), 2)
    assert "adapter_config.json is missing" in message
    assert "--alpha" in message
    message = refused(base, write_adapter(base.parent / "b", config={"peft_type": "LORA", "r": 4}), 2)
    assert "has no lora_alpha" in message


@pytest.mark.parametrize("option", ["--alpha", "--scaling"])
def test_alpha_is_refused_with_a_config(base: Path, option: str) -> None:
    assert "already defines lora_alpha" in refused(base, write_adapter(base.parent / "a"), 2, option, "1")


@pytest.mark.parametrize("option", ["--alpha", "--scaling"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_alpha_or_scaling_that_is_not_a_number(base: Path, option: str, value: str) -> None:
    message = refused(base, write_adapter(base.parent / "a", config=None), 2, f"{option}={value}")
    assert f"{option} {value}" in message


def test_both_alpha_and_scaling(base: Path) -> None:
    adapter = write_adapter(base.parent / "a", config=None)
    assert "give one of them" in refused(base, adapter, 2, "--alpha", "1", "--scaling", "1")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_scale_or_weight_that_is_not_a_number(base: Path, value: str) -> None:
    adapter = write_adapter(base.parent / "a")
    assert "finite" in refused(base, adapter, 2, f"--scale={value}")
    assert "finite" in refused(base, Path(f"{adapter}:{value}"), 2)


# --- the tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite(base: Path, factor: str, value: float) -> None:
    tensors = factors()
    tensors[f"{FIRST}.{factor}.weight"][1, 1] = value
    message = refused(base, write_adapter(base.parent / "a", tensors), 3)
    assert message.startswith(MODULES[0])
    assert "NaN or Inf" in message


BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], int, str]] = {
    "no B": ({f"{FIRST}.lora_B.weight": None}, 3, "lora_B missing"),
    "no A": ({f"{FIRST}.lora_A.weight": None}, 3, "lora_A missing"),
    "ranks differ": ({f"{FIRST}.lora_A.weight": torch.ones(RANK + 1, COLUMNS)}, 3, "ranks differ, 5 and 4"),
    "rank 0": (
        {f"{FIRST}.lora_A.weight": torch.ones(0, COLUMNS), f"{FIRST}.lora_B.weight": torch.ones(ROWS, 0)},
        3, "2 of 8 tensors are empty",
    ),
    "another rank than the config's": (
        {f"{FIRST}.lora_A.weight": torch.ones(3, COLUMNS), f"{FIRST}.lora_B.weight": torch.ones(ROWS, 3)},
        3, "rank 3, adapter_config.json says 4",
    ),
    "0-d factors": ({f"{FIRST}.lora_A.weight": torch.tensor(1.0)}, 3, MODULES[0]),
    "1-d factors": ({f"{FIRST}.lora_A.weight": torch.ones(RANK)}, 3, "expected (rank, in) and (out, rank)"),
    "3-d B": ({f"{FIRST}.lora_B.weight": torch.ones(ROWS, RANK, 2)}, 3, MODULES[0]),
    "another width": ({f"{FIRST}.lora_A.weight": torch.ones(RANK, COLUMNS + 1)}, 3, "the base weight is (48, 32)"),
    "integers": ({f"{FIRST}.lora_A.weight": torch.ones(RANK, COLUMNS, dtype=torch.int8)}, 3, MODULES[0]),
    "complex": ({f"{FIRST}.lora_A.weight": torch.ones(RANK, COLUMNS, dtype=torch.complex64)}, 3, MODULES[0]),
    "a magnitude without use_dora": ({f"{FIRST}.lora_magnitude_vector": torch.ones(ROWS)}, 3, "use_dora"),
    "a short magnitude": ({f"{FIRST}.lora_magnitude_vector": torch.ones(ROWS - 1)}, 3, "the magnitude is (47,)"),
    "a short bias": ({f"{FIRST}.lora_B.bias": torch.ones(ROWS - 1)}, 3, "the bias is (47,)"),
    "a tensor of no kind": ({"base_model.model.mystery": torch.ones(1)}, 3, "1 unrecognized tensor: "),
    "a 0-d token delta": ({"base_model.model.e.token_adapter.trainable_tokens_delta": torch.tensor(1.0)}, 3, "e: "),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "expected"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(base: Path, changes: dict[str, torch.Tensor | None], code: int, expected: str) -> None:
    tensors = {name: tensor for name, tensor in (factors() | changes).items() if tensor is not None}
    assert expected in refused(base, write_adapter(base.parent / "a", tensors), code)


ZERO3: dict[str, tuple[int, ...] | None] = {"none": None, "size 0": (0,), "size 0 in two dimensions": (0, 0)}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("left", ["all", "one module"])
@pytest.mark.parametrize("shape", ZERO3.values(), ids=ZERO3)
def test_what_zero3_leaves_is_refused_with_the_remedy(
    base: Path, shape: tuple[int, ...] | None, left: str, pickled: bool
) -> None:
    """DeepSpeed #7900, peft #2892: a run saved the shards of its first process, or nothing."""
    empty = {} if shape is None else {name: torch.zeros(shape) for name in factors() if left == "all" or FIRST in name}
    tensors = empty if shape is None or left == "all" else factors() | empty
    folder = write_adapter(base.parent / "a", tensors)
    if pickled:
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    message = refused(base, folder, 3)
    count = f"{len(empty)} of 8 tensors are empty (first: base_model." if empty else "has no tensors; DeepSpeed ZeRO-3"
    assert message.startswith(f"a: adapter_model.{'bin' if pickled else 'safetensors'}: {count}")
    assert message.endswith("stage3_gather_16bit_weights_on_model_save (accelerate: zero3_save_16bit_model)")
    assert "Gather the checkpoint with the zero_to_fp32.py" in " ".join(adapterkit("inspect", folder).out.split())


def test_a_file_without_tensors_and_config(base: Path) -> None:
    assert "has no tensors; DeepSpeed ZeRO-3" in refused(base, write_adapter(base.parent / "a", {}, None), 1)


def test_the_folder_of_a_run_leads_to_its_last_checkpoint(base: Path) -> None:
    for step in (500, 1000, 90):
        write_adapter(base.parent / "run" / f"checkpoint-{step}")
    assert "Did you mean " in (message := refused(base, base.parent / "run", 1))
    assert message.endswith("run/checkpoint-1000?")


def test_two_adapters_in_one_file(base: Path) -> None:
    tensors = {}
    for name, tensor in factors().items():
        for adapter in ("default", "other"):
            tensors[name.removesuffix("weight") + f"{adapter}.weight"] = tensor.clone()
    message = refused(base, write_adapter(base.parent / "a", tensors), 3)
    assert "several adapters for this module" in message or "several adapters (default, other)" in message


PAIR = {"lora_A.weight": torch.ones(RANK, 6), "lora_B.weight": torch.ones(8, RANK)}
TOKENS = "token_adapter.trainable_tokens_delta"
# Tensors without PEFT's prefix, changes to the usual config: modules, replaced, unrecognized, and noted problems.
READ: dict[str, tuple[list[str], dict[str, Any], list[str], list[str], list[str], list[str]]] = {
    "layers in order": (["m.10.q", "m.9.q", "m.x.q", "m.2.q"], {}, ["m.x.q", "m.2.q", "m.9.q", "m.10.q"], [], [], []),
    "a target without tensors": (["a.q"], {"target_modules": ["q", "a.q", "qq"]}, ["a.q"], [], [], ["'qq' has no tensors"]),
    "a pattern of targets": (["a.q"], {"target_modules": "zz"}, ["a.q"], [], [], []),
    "a saved module": (["q", "=a.score.weight"], {"modules_to_save": ["score"]}, ["q"], ["a.score.weight"], [], []),
    "a saved module within one": (["q", "=score.out.weight"], {"modules_to_save": ["score"]}, ["q"], ["score.out.weight"], [], []),
    "a name that ends alike, which PEFT saves too": (["q", "=a.myscore.weight"], {"modules_to_save": ["score"]}, ["q"], ["a.myscore.weight"], [], []),
    "saved as PEFT wraps it": (["q", "=score.modules_to_save.default.weight"], {}, ["q"], ["score.weight"], [], []),
    "saved twice": (["q", "=score.weight", "=score.modules_to_save.x.weight"], {"modules_to_save": ["score"]}, ["q"], ["score.weight"], [], []),
    "saved by two adapters": (["q", "=score.modules_to_save.x.weight", "=score.modules_to_save.y.weight"], {}, ["q"], ["score.weight"], [], ["the file has several adapters (x, y): split it first"]),
    "only the copy from before training": (["q", "=score.original_module.weight"], {"modules_to_save": ["score"]}, ["q"], [], ["score.original_module.weight"], ["'score' has no tensors"]),
    "wrappers of a grown vocabulary": (["q", *(f"={e}.{w}weight" for e in ("lm_head", "m.embed_tokens") for w in ("", "modules_to_save.", "original_module."))], {"modules_to_save": ["lm_head", "embed_tokens"]}, ["q"], ["lm_head.weight", "m.embed_tokens.weight"], [], []),
    "tokens of a grown vocabulary": (["q", "=e.token_adapter.base_layer.weight", f"=e.{TOKENS}"], {"trainable_token_indices": [*range(8)]}, ["q"], ["e.weight"], [], []),
    "a saved module in a saved module": (["q", *(f"=c.{w}weight" for w in ("out.", "out.modules_to_save.", "out.original_module.", "modules_to_save.default.out.", "modules_to_save.out."))], {"modules_to_save": ["c", "out"]}, ["q"], ["c.out.weight"], [], []),
    "factors on a saved module": (["q", "c.modules_to_save.default.up", "=c.modules_to_save.default.up.base_layer.weight", "=c.original_module.up.base_layer.weight"], {"modules_to_save": ["c"]}, ["c.up", "q"], ["c.up.weight"], [], []),
    "biases beside a saved module": (["q", *(f"=v.{w}bias" for w in ("", "modules_to_save.", "original_module.")), "=v.weight"], {"bias": "all", "modules_to_save": ["v"]}, ["q"], ["v.bias", "v.weight"], [], []),
    "the head of a task": (["q", "=a.pre_classifier.weight", "=classifier.weight"], {"task_type": "SEQ_CLS"}, ["q"], ["a.pre_classifier.weight", "classifier.weight"], [], []),
    "another head of a task": (["q", "=score.weight", "=qa_outputs.weight"], {"task_type": "TOKEN_CLS", "modules_to_save": ["classifier", "score"]}, ["q"], ["score.weight"], ["qa_outputs.weight"], []),
    "a head without a task": (["q", "=classifier.weight"], {"task_type": None}, ["q"], [], ["classifier.weight"], []),
    "a task without its head": (["q"], {"task_type": "QUESTION_ANS"}, ["q"], [], [], ["is QUESTION_ANS, but no qa_outputs has tensors"]),
    "biases": (["q", "=a.bias", "=a.weight"], {"bias": "all"}, ["q"], ["a.bias"], ["a.weight"], []),
    "biases that are not trained": (["q", "=a.bias"], {"bias": "none"}, ["q"], [], ["a.bias"], []),
    "embeddings of a grown vocabulary": (["q", "=m.embed_tokens.weight", "=lm_head.weight", "=m.wte.x"], {}, ["q"], ["m.embed_tokens.weight", "lm_head.weight"], ["m.wte.x"], []),
    "some without a magnitude": (["q", "k", "=q.lora_magnitude_vector"], {"use_dora": True}, ["k", "q"], [], [], ["1 of 2 modules have no magnitude"]),
    "none with a magnitude": (["q", "k"], {"use_dora": True}, ["k", "q"], [], [], ["2 of 2 modules have no magnitude"]),
    "a magnitude each": (["q", "=q.lora_magnitude_vector"], {"use_dora": True}, ["q"], [], [], []),
    "tokens as the config names them": (["q", f"=e.{TOKENS}"], {"trainable_token_indices": [*range(8)]}, ["q"], [], [], []),
    "half an embedding": (["q", "=e.lora_embedding_B"], {}, ["q"], [], [], ["lora_embedding_A missing, found embedding_B"]),
    "the other half": (["q", "=e.lora_embedding_A"], {}, ["q"], [], [], ["lora_embedding_B missing, found embedding_A"]),
    "fewer tokens than it names": (["q", f"=e.{TOKENS}"], {"trainable_token_indices": [*range(9)]}, ["q"], [], [], ["has 8 trained tokens, but trainable_token_indices lists 9"]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_the_role_of_each_tensor(tmp_path: Path, case: str) -> None:
    names, config, modules, replaced, unread, problems = READ[case]
    tensors = {f"{name}.{leaf}": tensor for name in names if name[0] != "=" for leaf, tensor in PAIR.items()}
    for name in (name[1:] for name in names if name[0] == "="):
        tensors[name] = torch.ones(8, 6) if name.endswith((".weight", "delta")) else torch.ones(8)
    folder = tmp_path / "a"
    write_adapter(folder, {f"base_model.model.{k}": t.clone() for k, t in tensors.items()}, {"peft_type": "LORA", "r": RANK, "lora_alpha": 6} | config)  # fmt: skip
    adapter = package.load(folder)
    assert (list(adapter.modules), sorted(adapter.replaced)) == (modules, sorted(replaced))
    assert [
        info.name.removeprefix("base_model.model.").replace("modules_to_save.x.", "") for info in adapter.unrecognized
    ] == unread
    assert [problem.what for problem in adapter.problems] == problems
    assert all(
        problem.fatal is not problem.what.endswith(("no tensors", "has tensors")) for problem in adapter.problems
    )


@pytest.mark.parametrize(
    ("enabled", "B", "fits"),
    [
        ([True, False, True], (8, RANK // 2, 1), True),
        ([True, True, True], (9, RANK // 2, 1), False),
        ([True, False, True], (7, RANK // 2, 1), False),
        ([False, False], (8, RANK // 2, 1), False),
        ([True, False, True], (8, RANK, 1), False),
        (None, (8, RANK // 2, 1), False),
    ],
    ids=str,
)
def test_a_merged_linear_has_as_many_groups_as_are_enabled(
    tmp_path: Path, enabled: list[bool] | None, B: tuple[int, ...], fits: bool
) -> None:
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(RANK, 6),
        "base_model.model.q.lora_B.weight": torch.ones(B),
    }
    config = {"peft_type": "LORA", "r": RANK // 2, "lora_alpha": 6, "enable_lora": enabled}
    adapter = package.load(write_adapter(tmp_path / "a", tensors, config))
    assert [problem.where for problem in adapter.problems] == ([] if fits else ["q"])
    if fits:
        assert (adapter["q"].A.shape, adapter["q"].B.shape) == ((RANK, 6), (12, RANK))


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("base_model.model.a.q", "a.q"),
        ("module.base_model.model.a.q", "a.q"),
        ("module.a.q", "module.a.q"),
        ("base_model.model.module.q", "module.q"),
        ("base_model.model.a._orig_mod.q", "a.q"),
        ("a.q", "a.q"),
    ],
)
def test_module_names_are_without_wrappers(tmp_path: Path, key: str, module: str) -> None:
    tensors = {f"{key}.{leaf}": tensor for leaf, tensor in PAIR.items()}
    assert list(package.load(write_adapter(tmp_path / "a", tensors)).modules) == [module]


@pytest.mark.parametrize("r", [RANK // 2, RANK, 3, 2 * RANK, None])
@pytest.mark.parametrize("nested", [False, True])
def test_the_number_of_stacked_experts(tmp_path: Path, r: int | None, nested: bool) -> None:
    """PEFT's tensor names don't include parameters, and it wraps the module once for each, the last one outermost."""
    module = "mlp.experts.base_layer" if nested else "mlp.experts"
    tensors = {f"base_model.model.{module}.{leaf}": tensor for leaf, tensor in PAIR.items()}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "target_parameters": ["up_proj", "q.x", "mlp.experts.down_proj", "up_proj"],
    }
    adapter = package.load(write_adapter(tmp_path / "a", tensors, config))
    if r in (3, 2 * RANK):
        assert f"no whole number of experts of rank {r}" in adapter.problems[0].what
        return
    weights = adapter.modules["mlp.experts.up_proj" if nested else "mlp.experts.down_proj"]
    assert (weights.experts, weights.rank) == ((2, RANK // 2) if r == RANK // 2 else (1, RANK))


@pytest.mark.parametrize(("named", "base"), [("org/model", "org/model"), ("", None), (None, None)])
def test_the_base_model_of_an_adapter(tmp_path: Path, named: str | None, base: str | None) -> None:
    folder = write_adapter(tmp_path / "a", config=CONFIG | {"base_model_name_or_path": named})
    assert package.load(folder).base_model == base


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file in it"])
def test_an_adapter_is_written_to_a_new_folder_only(tmp_path: Path, there: str) -> None:
    adapter, out = package.load(write_adapter(tmp_path / "a")), tmp_path / "deep" / "out"
    if there != "nothing":
        out.mkdir(parents=True)
    if there == "a file in it":
        (out / "thesis.tex").touch()
        with pytest.raises(OutputExistsError, match="out: is not empty; choose another directory"):
            package.save(adapter, out)
        assert os.listdir(out) == ["thesis.tex"]
        return
    package.save(adapter, out)
    assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_for_another_model(base: Path) -> None:
    tensors = {name.replace("self_attn", "attention"): tensor for name, tensor in factors().items()}
    message = refused(base, write_adapter(base.parent / "a", tensors), 3)
    assert "4 of 4 modules and tensors not found in base" in message
    assert "--map attention=self_attn" in message


def test_untrusted_names_stay_on_one_line(base: Path) -> None:
    tensors = {f"x{name}": tensor for name, tensor in factors().items()}
    config = CONFIG | {"init_lora_weights": "pissa\n\x1b[2J", "target_modules": ["a\nb"]}
    result = adapterkit("merge", base, write_adapter(base.parent / "a", tensors, config), "-o", base.parent / "out")
    assert result.code == 3
    assert all(line.isprintable() for line in result.err.splitlines())


# --- what a base says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [["llama"], {"a": 1}])
def test_a_model_type_that_is_not_a_string(base: Path, model_type: Any) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert "model_type" in refused(base, write_adapter(base.parent / "a"), 1)


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 4, "head_dim": -8},
        {"num_attention_heads": 4, "head_dim": "8"},
        {"num_attention_heads": 4, "head_dim": 8.0},
        {"num_attention_heads": 4, "head_dim": [8]},
        {"num_attention_heads": 4, "num_key_value_heads": "4", "hidden_size": 32},
    ],
    ids=str,
)
def test_invalid_head_counts(tmp_path: Path, config: dict[str, Any]) -> None:
    (base := tmp_path / "base").mkdir()
    save_file({"layers.0.qkv_proj.weight": torch.ones(96, COLUMNS)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    tensors = {"lora_A.weight": torch.ones(RANK, COLUMNS), "lora_B.weight": torch.ones(48, RANK)}
    named = {f"base_model.model.layers.0.q_proj.{name}": tensor for name, tensor in tensors.items()}
    message = refused(base, write_adapter(tmp_path / "a", named), 3)
    assert "layers.0.q_proj: " in message


@pytest.mark.parametrize(
    "names",
    [["q_proj"], ["qkv_proj"], ["k_proj", "v_proj", "q_proj"]],
)
def test_a_base_of_scalars(tmp_path: Path, names: list[str]) -> None:
    (base := tmp_path / "base").mkdir()
    save_file({f"layers.0.{name}.weight": torch.tensor(1.0) for name in names}, base / "model.safetensors")
    module, rows = ("qkv_proj", 96) if len(names) == 3 else ("q_proj", 32)
    tensors = {"lora_A.weight": torch.ones(RANK, COLUMNS), "lora_B.weight": torch.ones(rows, RANK)}
    named = {f"base_model.model.layers.0.{module}.{name}": tensor for name, tensor in tensors.items()}
    refused(base, write_adapter(tmp_path / "a", named), 3)


# --- numbers that are finite until they are used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "options"),
    [
        (torch.full((RANK, COLUMNS), 1e200, dtype=torch.float64), []),
        (torch.full((RANK, COLUMNS), 1e38), []),
        (torch.full((RANK, COLUMNS), 1e5), ["--dtype", "fp16"]),
        (torch.ones(RANK, COLUMNS), ["--scale", "1e300"]),
    ],
    ids=["float64 beyond float32", "bf16 overflows", "fp16 overflows", "scale beyond float32"],
)
def test_results_that_overflow(base: Path, factor: torch.Tensor, options: list[str]) -> None:
    adapter = write_adapter(base.parent / "a", factors() | {f"{FIRST}.lora_A.weight": factor})
    refused(base, adapter, 3, *options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_a_saved_module_of_integers(base: Path, dtype: torch.dtype) -> None:
    tensors = factors() | {"base_model.model.score.weight": torch.ones(2, COLUMNS, dtype=dtype)}
    refused(base, write_adapter(base.parent / "a", tensors, CONFIG | {"modules_to_save": ["score"]}), 3)


@pytest.mark.parametrize("rows", [[-1], [True], [0.0], "0", [10**30], [1, 1]], ids=str)
def test_invalid_rows_of_trained_tokens(tmp_path: Path, rows: Any) -> None:
    (base := tmp_path / "base").mkdir()
    save_file({"embed_tokens.weight": torch.ones(4, 2)}, base / "model.safetensors")
    count = len(rows) if isinstance(rows, list) else 1
    tensors = {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(count, 2)}
    config = CONFIG | {"trainable_token_indices": {"embed_tokens": rows}}
    refused(base, write_adapter(tmp_path / "a", tensors, config), 3)


@pytest.mark.parametrize("number", ["²", "9" * 900], ids=["²", "900"])
def test_layer_numbers_of_unusual_digits(base: Path, number: str) -> None:
    tensors = {f"base_model.model.layers.{number}.q_proj.lora_{k}.weight": torch.ones(4, 4) for k in "AB"}
    refused(base, make_bin(base.parent / "a", tensors), 3)
