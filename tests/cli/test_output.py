"""Output of commands: consistent between commands, with correct plurals, about every written file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from handmade import CONFIG, adapterkit, write_adapter, write_base, write_cache
from tiny import save_tiny_model

from adapterkit.text import counted


def factors(module: str, layers: int = 2) -> dict[str, torch.Tensor]:
    """Write an adapter of `module` in some layers."""
    shapes = {"A": (4, 32), "B": (48, 4)}
    return {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight": torch.randn(*shape)
        for layer in range(layers)
        for side, shape in shapes.items()
    }


def saved_alone(folder: Path) -> Path:
    """Write an adapter with a whole tensor and no factors."""
    return write_adapter(
        folder, {"base_model.model.lm_head.weight": torch.randn(48, 32)}, CONFIG | {"target_modules": []}
    )


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one")
    for words in ([tmp_path / "nope"], [tmp_path, tmp_path / "nope"], [tmp_path / "nope", "--json"]):
        assert adapterkit("list", *words).message(1) == f"{tmp_path / 'nope'}: no such folder"


def test_list_and_inspect_agree(material: Callable[[str], Path]) -> None:
    checked = 0
    for path in sorted(file.parent for file in FIXTURES.glob("*/adapter_config.json")):
        [row] = json.loads(adapterkit("list", path, "--json").out)["adapters"]
        summary = json.loads(adapterkit("inspect", path, "--json", "--header-only").out)["summary"]
        known = {
            "ranks": "ranks",
            "alphas": "alphas",
            "targets": "targets",
            "size": "bytes",
            "base_model": "base_model",
        }
        assert {key: row[key] for key in known} == {key: summary[name] for key, name in known.items()}
        checked += 1
    assert checked > 5


def test_list_and_inspect_agree_on_parts_of_fused_layers(material: Callable[[str], Path]) -> None:
    path = material("bloom-lora-bin")
    [row] = json.loads(adapterkit("list", path, "--json").out)["adapters"]
    summary = json.loads(adapterkit("inspect", path, "--json", "--header-only").out)["summary"]
    assert row["ranks"] == summary["ranks"] == [16]


DAMAGED = {
    "inspect": ("inspect adapter", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]),
    "inspect, against": ("inspect plain --against model", ["model/model.safetensors"]),
    "compare": ("compare adapter plain", ["adapter/adapter_model.safetensors"]),
    "verify": ("verify merged --base model --adapter adapter", ["model/model.safetensors", "adapter/adapter_config.json"]),
    "train": (
        "train model data.jsonl -o out --max-steps 1",
        ["model/model.safetensors", "model/tokenizer.json", "model/config.json"],
    ),
    "eval": ("eval model adapter data.jsonl", ["adapter/adapter_model.safetensors", "model/tokenizer_config.json"]),
    "extract": ("extract model merged -o out --rank 2", ["model/model.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", ["flipped", "cut", "no hash"])
@pytest.mark.parametrize(("command", "files"), DAMAGED.values(), ids=DAMAGED)
def test_corrupt_files_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, command: str, files: list[str], damage: str
) -> None:
    """One error rather than other numbers; a warning where the cache has no hash."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("a-model"))
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(*shape)
        for side, shape in {"A": (4, 32), "B": (32, 4)}.items()
    }
    write_adapter(Path("plain"), tensors)
    if "merged" in command:
        assert adapterkit("merge", "a-model", "plain", "-o", "merged").code == 0
    for name, source in {"model": Path("a-model"), "adapter": Path("plain")}.items():
        Path(name).symlink_to(write_cache(source, Path(f"models--o--{name}")))
    Path("data.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    for file in map(Path, files):
        blob = file.resolve()
        data = blob.read_bytes()
        if damage == "no hash":
            blob = blob.rename(blob.with_name(f"etag-{file.name}"))
            file.unlink()
            file.symlink_to(f"../../blobs/{blob.name}")
            result = adapterkit(*command.split())
            assert result.code == 0 and f"{file.name}: could not be verified: the Hub gives no hash" in result.err, (
                result
            )
            shutil.rmtree("out", ignore_errors=True)
            continue
        at = len(data) - 2 if file.suffix == ".safetensors" else data.index(b'"', 2)
        changed = data[: len(data) // 2] if damage == "cut" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        blob.write_bytes(changed)
        message = adapterkit(*command.split()).message_of_last(1)
        assert file.name in message and "Traceback" not in message
        assert not Path("out").exists()
        blob.write_bytes(data)


NOTED = {
    "merge": "merge model adapter -o out",
    "merge, in a dry run": "merge model adapter -o out --dry-run",
    "merge of nothing": "merge model zero -o out --allow-partial",
    "unmerge": "unmerge merged -o out",
    "unmerge, in a dry run": "unmerge merged -o out --dry-run",
    "unmerge, approximately": "unmerge merged -o out --approximate",
    "quantize": "quantize model -o out --to nf4",
    "combine": "combine adapter adapter:-1 -o out",
    "train": "train model data.jsonl -o out --skip-bad --max-steps 1",
    "eval": "eval model data.jsonl --skip-bad",
}


@pytest.mark.parametrize("command", NOTED.values(), ids=NOTED)
def test_json_has_every_note_and_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model")
    (model / "notes.dat").symlink_to("elsewhere")
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.randn(*shape)
        for side, shape in {"A": (4, 32), "B": (32, 4)}.items()
    }
    write_adapter(tmp_path / "adapter", tensors)
    write_adapter(tmp_path / "zero", {name: tensor * 0 for name, tensor in tensors.items()})
    Path("data.jsonl").write_text('{"text": "one two three"}\n{"text": ""}\n{"nothing": 1}\n')
    if "merged" in command:
        assert adapterkit("merge", "model", "adapter", "-o", "merged").code == 0
        Path("merged/more.txt").write_text("new")
    told = adapterkit(*command.split())
    assert told.code == 0, told
    shutil.rmtree("out", ignore_errors=True)
    facts = json.loads(adapterkit(*command.split(), "--json").out)
    lines = [f"note: {line}" for line in facts["notes"]] + [f"warning: {line}" for line in facts["warnings"]]
    assert sorted(lines) == sorted(line for line in told.err.splitlines() if line.startswith(("note: ", "warning: ")))
    assert lines


@pytest.mark.parametrize("length", [40, 61, 62, 63, 90, 200])
def test_targets_with_long_names(tmp_path: Path, length: int) -> None:
    path = write_adapter(tmp_path / "long", factors("語" * (length // 4) + "t" * (length - length // 4), layers=40))
    result = adapterkit("inspect", path, "--modules")
    assert result.code == 0, result
    [bars] = [line for line in result.out.splitlines() if re.search("[▁▂▃▄▅▆▇█]{2}", line) and "least" not in line]
    assert len(bars) <= 80


def test_adapters_with_whole_tensors_only(tmp_path: Path) -> None:
    a, b = saved_alone(tmp_path / "a"), saved_alone(tmp_path / "b")
    expected = "a and b: no low-rank modules to compare, only lm_head.weight"
    assert adapterkit("compare", a, b).message(3) == expected
    assert "shares no module" in adapterkit("compare", a, write_adapter(tmp_path / "one")).message(3)
    result = adapterkit("combine", a, b, "-o", tmp_path / "c", "--saved", "first")
    assert re.search(r"combined  2 adapters by linear in .* s: 1 whole tensor\n", result.out), result
    shown = adapterkit("inspect", a, "--modules")
    assert shown.code == 0
    assert "lora_alpha" not in shown.out
    for method in ("svd", "ties", "dare_linear", "knots", "core", "tsv", "iso"):
        made = adapterkit(
            "combine", a, b, "-o", tmp_path / method, "--saved", "first", "--method", method, "--rank", "2"
        )
        assert made.code in (0, 1, 2, 3), made


def test_convert_counts_the_modules_it_rewrites(tmp_path: Path) -> None:
    result = adapterkit("convert", write_adapter(tmp_path / "one"), "-o", tmp_path / "rs", "--to", "rslora", "--json")
    assert [row["rank"] for row in json.loads(result.out)["modules"]] == [4] * 4
    result = adapterkit("convert", tmp_path / "one", "-o", tmp_path / "again", "--to", "rslora")
    assert ": 4 modules, rank 4\n" in result.out


def test_a_plan_shows_the_dtype_of_dequantized_weights(tmp_path: Path) -> None:
    base, one = write_base(tmp_path / "base", shards=1), write_adapter(tmp_path / "one")
    assert "4 of 6 tensors, dtype as the base\n" in adapterkit("merge", base, one, "--dry-run").out
    assert "dtype F32\n" in adapterkit("merge", base, one, "--dry-run", "--dtype", "fp32").out
    assert adapterkit("quantize", base, "-o", tmp_path / "nf4", "--to", "nf4").code == 0
    assert "dtype BF16\n" in adapterkit("merge", tmp_path / "nf4", one, "--dry-run").out
    assert json.loads(adapterkit("merge", tmp_path / "nf4", one, "--dry-run", "--json").out)["dtype"] == "BF16"
    assert adapterkit("merge", tmp_path / "nf4", one, "-o", tmp_path / "out").code == 0
    assert "rounded once (dtype BF16)" in (tmp_path / "out" / "README.md").read_text()


def test_the_path_of_a_plot_is_printed(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    result = adapterkit("compare", one, two, "--plot", tmp_path / "a.svg", "--json")
    assert result.err == f"drawn to {tmp_path / 'a.svg'}\n"
    json.loads(result.out)


def test_plurals(tmp_path: Path) -> None:
    assert [counted(count, "file") for count in (0, 1, 2, 1000)] == ["0 files", "1 file", "2 files", "1,000 files"]
    one = write_adapter(tmp_path / "one", factors("q_proj", layers=1))
    base = write_base(tmp_path / "base")
    said = [
        adapterkit("combine", one, "-o", tmp_path / "c"), adapterkit("resize", one, "-o", tmp_path / "r", "--rank", "2"),
        adapterkit("resize", one, "-o", tmp_path / "s", "--rank", "2", "--dry-run"), adapterkit("compare", one, one),
        adapterkit("merge", base, one, "--dry-run", "--threads", "1", "--allow-partial"), adapterkit("list", tmp_path),
    ]  # fmt: skip
    for result in said:
        assert not re.search(r"(?<![\d,.])1 [a-z]+s\b(?! and)", result.out + result.err), result
