"""Undoing merges: every file of the base is restored byte for byte, or one clear error is raised."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import permutations, product
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import adversarial
import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run
from handmade import contents, packed
from safetensors.torch import load_file, save_file
from test_merge import TINY

import adapterkit
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.algebra import residual
from adapterkit.api import inputs
from adapterkit.cli.next_commands import undo_command
from adapterkit.errors import AdapterkitError, FitError, FormatError, UsageError
from adapterkit.files import jsonfile
from adapterkit.files.safetensors import encode_header, read_header
from adapterkit.merging.blocks import device, residual_codec
from adapterkit.merging.receipts import sidecar
from adapterkit.merging.receipts.receipt import read_receipt
from adapterkit.merging.run import pieces

Make = Callable[..., Path]


def same(folder: Path, other: Path) -> bool:
    return contents(folder) == contents(other)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


@pytest.fixture
def merged(make_base: Make, make_adapter: Make, tmp_path: Path) -> Path:
    """A merge of `base` (two shards, one unchanged) and `adapter`, all in one folder."""
    tensors = {name: torch.randn(40, 24).bfloat16() for name in ("a.q.weight", "norm.weight", "b.q.weight")}
    make_base(tensors, {"model_type": "llama"}, shards=2)
    make_adapter(factors("a.q", 40, 24) | factors("b.q", 40, 24))
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    return tmp_path / "merged"


def test_a_dry_run_prints_the_plan_and_writes_nothing(merged: Path, tmp_path: Path) -> None:
    before, out = contents(tmp_path), tmp_path / "again"
    result = run("unmerge", merged, "-o", out, "--adapter", tmp_path / "adapter", "--dry-run")
    assert result.code == 0, result
    assert "restores  2 of 3 tensors, changed by adapter\n" in result.out
    facts = json.loads(run("unmerge", merged, "-o", out, "--base", tmp_path / "base", "--dry-run", "--json").out)
    assert facts["bytes_to_write"] == sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    every = run("unmerge", merged, "-o", out, "--all", "--dry-run")
    assert every.out.startswith("undo      1 merge, in this order:\n  1.      adapter\n"), every
    assert contents(tmp_path) == before


# --- every kind comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_adapter_is_undone(name: str, tmp_path: Path) -> None:
    base = FIXTURES / "bases" / TINY[name]
    adapterkit.merge(base, [FIXTURES / name], tmp_path / "merged")
    result = adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=[FIXTURES / name])
    assert same(base, tmp_path / "again")
    assert result.hashes.outputs == hashes(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1e3])
@pytest.mark.parametrize("rank", [1, 4, 256])
def test_every_size_is_undone(
    dtype: torch.dtype, size: float, rank: int, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    W = torch.randn(70, 50) * torch.logspace(-3, 1, 50)
    W[::7] = 0.0
    W[1::7] *= -0.0
    base = make_base(
        {"m.weight": W.to(dtype), "odd.weight": torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]).to(dtype)}
    )
    parts = factors("m", 70, 50, rank, (size / rank) ** 0.5) | factors("odd", 1, 4, rank, (size / rank) ** 0.5)
    adapter = make_adapter(parts, r=rank, lora_alpha=rank)
    adapterkit.merge(base, [adapter], tmp_path / "merged")
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(base, tmp_path / "again")


@pytest.mark.parametrize("name", adversarial.CASES)
def test_adversarial_sums_are_undone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums on midpoints of powers of two; `pytest tests/merging/stress.py` runs many more."""
    case = adversarial.write(name, tmp_path, 3_000, 1)
    adapterkit.merge(case.base, case.adapters, tmp_path / "merged", **case.how)
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=case.adapters)
    assert same(case.base, tmp_path / "again")
    adversarial.undo_by(adversarial.ARITHMETIC["backwards"], monkeypatch)
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "backwards", adapters=case.adapters)
    assert same(case.base, tmp_path / "backwards")


@pytest.mark.parametrize("flipped", [False, True], ids=["(E, out, in)", "(E, in, out)"])
def test_stacked_experts_are_undone(flipped: bool, make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    W = (torch.randn(3, 10, 6) if flipped else torch.randn(3, 6, 10)).bfloat16()
    parts = {"mlp.experts.lora_A.weight": torch.randn(12, 10), "mlp.experts.lora_B.weight": torch.randn(6, 12)}
    adapter = make_adapter(parts, target_parameters=["mlp.experts.gate_up_proj"])
    base = make_base({"mlp.experts.gate_up_proj": W})
    adapterkit.merge(base, [adapter], tmp_path / "merged")
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(base, tmp_path / "again")


def test_several_adapters_dora_among_them(tmp_path: Path) -> None:
    base, given = FIXTURES / "bases" / "tiny-llama", [(FIXTURES / "tiny-dora", 0.6), (FIXTURES / "tiny-rslora", -1.5)]
    adapterkit.merge(base, given, tmp_path / "merged")
    adapterkit.unmerge(
        tmp_path / "merged", tmp_path / "again", adapters=[FIXTURES / n for n in ("tiny-rslora", "tiny-dora")]
    )
    assert same(base, tmp_path / "again")


@pytest.mark.parametrize("small", [8, 16])
def test_dora_by_column_with_large_residuals(
    small: int, make_base: Make, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first blocks, or all, leave whole differences, which need no gains."""
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 96)
    W = torch.randn(16, 48)  # stored (in, out)
    W[small:] *= 1e4
    base = make_base({"m.weight": W.bfloat16()}, {"model_type": "gpt2"})
    parts = factors("m", 48, 16, size=8.0) | {"m.lora_magnitude_vector": torch.full((48,), 6.0)}
    adapter = make_adapter(parts, use_dora=True)
    adapterkit.merge(base, [adapter], tmp_path / "merged")
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(base, tmp_path / "again")
    sidecar = load_file(tmp_path / "merged" / "adapterkit_receipt" / "model.safetensors.residuals")
    kinds = [int(code[0]) for name, code in sidecar.items() if name[0] == "0" and not name.endswith(".gains")]
    assert kinds.count(residual_codec.DIFFERENCE) == small


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_dtype_that_represents_the_base_can_be_undone(dtype: str, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-dora"  # bf16
    adapterkit.merge(base, [adapter], tmp_path / "merged", dtype=dtype)
    if dtype == "fp16":
        with pytest.raises(FitError, match="BF16 weights were converted to F16; `base` restores it"):
            adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=[adapter])
        adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", base=base)
    else:
        adapterkit.unmerge(tmp_path / "merged", tmp_path / "again", adapters=[adapter])
    assert same(base, tmp_path / "again")


@pytest.mark.parametrize(
    "how",
    [{"to": "nf4"}, {"to": "nf4", "nested": True}, {"to": "fp4", "blocksize": 128}, {"to": "int8"}],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_a_dequantized_base_is_restored_packed(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block; a merge without a receipt is the same."""
    adapterkit.quantize(FIXTURES / "bases" / "tiny-llama", tmp_path / "base", **how)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 640)
    for name in ("tiny-rslora", "tiny-dora"):
        adapterkit.merge(tmp_path / "base", [FIXTURES / name], tmp_path / name)
        assert (
            load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype
            == torch.bfloat16
        )
        adapterkit.unmerge(tmp_path / name, tmp_path / f"{name}-again", adapters=[FIXTURES / name])
        assert same(tmp_path / "base", tmp_path / f"{name}-again")
        adapterkit.merge(tmp_path / "base", [FIXTURES / name], tmp_path / "bare", receipt=False, overwrite=True)
        merged, bare = (tmp_path / out / "model.safetensors" for out in (name, "bare"))
        assert merged.read_bytes() == bare.read_bytes()


def test_an_fp8_base_is_restored_packed(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    """With a partial last block, a scale of zero, and a negative zero."""
    numbers = (torch.randn(20, 12) * 50).to(torch.float8_e4m3fn)
    numbers[0, 0], scale = -0.0, torch.rand(3, 2)
    scale[1, 1] = 0.0
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}, "dtype": "bfloat16"}
    base = make_base({"m.weight": numbers, "m.weight_scale_inv": scale}, config, shards=2)
    adapterkit.merge(base, [make_adapter(factors("m", 20, 12))], tmp_path / "merged")
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(base, tmp_path / "again")


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_threads_and_arithmetic_may_differ(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with small blocks and other chunks, undone with sums in reverse order."""
    base, names = FIXTURES / "bases" / "tiny-llama", ("tiny-dora", "tiny-patterns")
    for name in names:
        with monkeypatch.context() as patched:
            patched.setattr(pieces, "BLOCK_BYTES", 4096)
            patched.setattr(device, "CPU", device.ComputeDevice(torch.device("cpu"), 700))
            adapterkit.merge(base, [FIXTURES / name], tmp_path / name, threads=threads)
        monkeypatch.setattr(residual, "product", lambda left, right: left.flip(1) @ right.flip(0))
        adapterkit.unmerge(tmp_path / name, tmp_path / f"{name}-again", adapters=[FIXTURES / name], threads=4 - threads)
        assert same(base, tmp_path / f"{name}-again")


def test_an_adapter_without_a_config_is_undone_with_the_receipts_scaling(merged: Path, tmp_path: Path) -> None:
    file = shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    assert run("merge", tmp_path / "base", file, "-o", tmp_path / "other", "--alpha", "7", "--scale", "-0.3").code == 0
    assert run("unmerge", tmp_path / "other", "-o", tmp_path / "again").code == 0
    assert same(tmp_path / "base", tmp_path / "again")


def test_a_head_that_was_untied_is_tied_again(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(30, 8).bfloat16(), "model.norm.weight": torch.ones(8)}
    base = make_base(tensors, {"tie_word_embeddings": True})
    adapterkit.merge(base, [make_adapter(factors("lm_head", 30, 8))], tmp_path / "merged")
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    adapterkit.unmerge(tmp_path / "merged", tmp_path / "again")
    assert same(base, tmp_path / "again")


def test_a_single_file(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "m.safetensors"
    save_file({"a.q.weight": torch.randn(40, 24).half(), "b.q.weight": torch.randn(40, 24).half()}, base)
    for source, out in ((base, "once"), (tmp_path / "once.safetensors", "twice")):
        adapterkit.merge(source, [tmp_path / "adapter"], tmp_path / f"{out}.safetensors")
    adapterkit.unmerge(tmp_path / "twice.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "once.safetensors").read_bytes()
    assert same(tmp_path / "back.safetensors.receipt", tmp_path / "once.safetensors.receipt")
    adapterkit.unmerge(tmp_path / "twice.safetensors", tmp_path / "all.safetensors", every=True)
    assert (tmp_path / "all.safetensors").read_bytes() == base.read_bytes()
    assert not (tmp_path / "all.safetensors.receipt").exists()
    adapterkit.merge(base, [tmp_path / "adapter"], tmp_path / "once.safetensors", receipt=False, overwrite=True)
    assert not (tmp_path / "once.safetensors.receipt").exists()


@pytest.mark.base
def test_smollm2_in_separate_processes(smollm2: Path, tmp_path: Path) -> None:
    adapter, command = FIXTURES / "smollm2-wikisql", [sys.executable, "-m", "adapterkit"]
    subprocess.run([*command, "merge", smollm2, adapter, "-o", tmp_path / "merged"], check=True)
    subprocess.run(
        [*command, "unmerge", tmp_path / "merged", "-o", tmp_path / "again", "--adapter", adapter], check=True
    )
    assert hashes(tmp_path / "again") == hashes(smollm2) != hashes(tmp_path / "merged")
    recorded = sum(file.stat().st_size for file in (tmp_path / "merged" / "adapterkit_receipt").glob("*.residuals"))
    assert recorded < 0.015 * sum(file.stat().st_size for file in smollm2.glob("*.safetensors"))


# --- labels and names ------------------------------------------------------------------------------------------------


def test_labels_of_adapters_are_unique() -> None:
    """For any names in any order, also names that look like the numbers that distinguish equal ones."""
    names = ["a", "a #1", "a #2", "a #1 #1", "b"]
    for wanted in product(names, repeat=4):
        given = [WeightedAdapter(Adapter("peft", {}), 1.0, name) for name in wanted]
        labels = [one.label for one in inputs._unique_labels(given)]
        assert len(set(labels)) == len(labels)
        assert all(label.startswith(name) for label, name in zip(labels, wanted, strict=True))
        assert all(label == name for label, name in zip(labels, wanted, strict=True) if wanted.count(name) == 1)


def test_adapters_of_the_same_name_are_distinguished(merged: Path, make_adapter: Make, tmp_path: Path) -> None:
    """Two in folders `a`, one in `a #1`, of different sizes and weights: each is found and undone."""
    for folder, name in (("x", "a"), ("y", "a"), ("z", "a #1")):
        (tmp_path / folder).mkdir()
        make_adapter(factors("a.q", 40, 24) | factors("b.q", 40, 24), f"{folder}/{name}")
    given = [(tmp_path / "x" / "a", 1.0), (tmp_path / "y" / "a", -0.5), (tmp_path / "z" / "a #1", 2.0)]
    adapterkit.merge(tmp_path / "base", given, tmp_path / "all")
    told = json.loads((tmp_path / "all" / "adapterkit_receipt.json").read_text())
    weights = tmp_path / "z" / "a #1" / "adapter_model.safetensors"
    assert told["adapters"][2]["name"] == "a #1"
    assert told["adapters"][2]["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert [part["adapter"] for part in told["shards"][0]["tensors"][0]["parts"]] == [0, 1, 2]
    adapterkit.unmerge(tmp_path / "all", tmp_path / "again", adapters=[path for path, _ in reversed(given)])
    assert same(tmp_path / "base", tmp_path / "again")


NAMES = [
    "plain", "a b", "no\u00a0break", "ideographic\u3000space", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "soft\u00adhyphen", "\ufeffbom", "\u202ebidi\u2066",
    "new\nline", "tab\tescape\x1b[2J\x07", "quotes'\"$(x)`*", "-dash", "~", "a #1", ":0.5", "%s{}", "[bold]",
    os.fsdecode(b"\xff latin \xe9"), "\u2028\ue000\U0010ffff", "x" * 243, "\u3000" * 81, "back\\slash",
]  # fmt: skip


@pytest.mark.parametrize("place", ["base", "shard", "indexed", "adapter", "adapter file", "single file"])
def test_adapter_names_survive_or_are_refused_before_anything_is_written(
    place: str, merged: Path, tmp_path: Path
) -> None:
    """Adapters are found again by their names alone."""
    shutil.rmtree(merged)
    clean, refused = contents(tmp_path), []
    for name in NAMES:
        base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
        at, renamed = base / "model-00001-of-00002.safetensors", f"{name}.safetensors"
        if place == "base":
            base = base.rename(tmp_path / name)
        elif place == "indexed":
            index = base / "model.safetensors.index.json"
            index.write_text(index.read_text().replace(json.dumps(at.name), json.dumps(renamed)))
            at.rename(base / renamed)
        elif place == "shard":
            (base / "model.safetensors.index.json").unlink()
            (base / "model-00002-of-00002.safetensors").unlink()
            at.rename(base / renamed)
        elif place == "adapter":
            adapter = adapter.rename(tmp_path / name)
        elif place == "adapter file":
            (adapter / "adapter_config.json").rename(tmp_path / "adapter_config.json")
            adapter = (adapter / "adapter_model.safetensors").rename(tmp_path / renamed)
        else:
            base, out = at.rename(tmp_path / renamed), tmp_path / "out.safetensors"
        before = contents(tmp_path)
        try:
            adapterkit.merge(base, [adapter], out, allow_partial=True)
        except AdapterkitError:
            refused.append(name)
            assert contents(tmp_path) == before
        else:
            again = out.with_stem("again")
            adapterkit.unmerge(out, again)
            assert contents(again) == contents(base) and (base.is_dir() or again.read_bytes() == base.read_bytes())
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for path, data in clean.items():
            (tmp_path / path).mkdir() if data is None else (tmp_path / path).write_bytes(data)
    not_utf8 = [os.fsdecode(b"\xff latin \xe9")] if place == "indexed" else []  # no JSON has such a name
    assert refused == [*not_utf8, *(["back\\slash"] if place in ("shard", "indexed", "single file") else [])]


def packed_ones(shapes: dict[str, tuple[int, int]]) -> bytes:
    """A file of float32 tensors of ones."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * prod(shape)]}
        at += 4 * prod(shape)
    return packed(header, torch.ones(at // 4).numpy().tobytes())


@pytest.mark.parametrize("place", ["changed", "other", "adapter alone", "pickled"])
def test_tensor_names_survive_or_are_refused_before_anything_is_written(place: str, tmp_path: Path) -> None:
    """Every merge has a readable receipt; a refused name is shown on one line."""
    survived = []
    for number, name in enumerate((*NAMES, "\ud83d", "hangul\u3164filler", "variation\ufe0f", "x" * 1000)):
        folder = tmp_path / str(number)
        module, other = (name if place == "changed" else "a.q"), (name if place == "other" else "norm.weight")
        theirs = module if place == "changed" else f"{name}.q"
        (folder / "base").mkdir(parents=True), (folder / "adapter").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        tensors = {f"{module}.weight": (8, 6), other: (1, 6)}
        (folder / "base" / "model.safetensors").write_bytes(packed_ones(tensors))
        brought = {
            f"base_model.model.a.q.lora_{side}.weight": shape for side, shape in {"A": (2, 6), "B": (8, 2)}.items()
        }
        if place in ("changed", "adapter alone"):
            brought = {key.replace("a.q", theirs): shape for key, shape in brought.items()}
        if place == "pickled":
            pickled = {key.replace("a.q", theirs): torch.ones(shape) for key, shape in brought.items()}
            torch.save(pickled, folder / "adapter" / "adapter_model.bin")
        else:
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(packed_ones(brought))
        (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
        before = contents(folder)
        outcome = run("merge", folder / "base", folder / "adapter", "-o", folder / "out")
        if outcome.code:
            assert all(line.isprintable() for line in outcome.err.splitlines()) and outcome.code in (1, 3)
            assert contents(folder) == before
        else:
            survived.append(name)
            assert run("unmerge", folder / "out", "-o", folder / "again").code == 0
            assert same(folder / "again", folder / "base")
    assert not {"new\nline", "\ud83d", "\u202ebidi\u2066", "no\u00a0break"} & set(survived)
    assert ("hangul\u3164filler" in survived) is (place in ("changed", "other"))


@pytest.mark.parametrize(
    ("limit", "most", "said"),  # more than any header has, less than the receipt
    [
        ("MAX_HEADER_ITEMS", 60, r"the JSON has up to \d+ values, expected at most 60"),
        ("MAX_HEADER_BYTES", 1500, "is too large, expected at most 1,500 bytes"),
    ],
)
def test_a_receipt_that_could_not_be_read_is_refused_first(
    limit: str, most: int, said: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is read back before it is written: here it has more values or bytes than the reader accepts."""
    before, giving = contents(tmp_path), [(tmp_path / "adapter", 1.0)] * 3
    monkeypatch.setattr(jsonfile, limit, most)
    with pytest.raises(FormatError, match=rf"adapterkit_receipt.json: {said}"):
        adapterkit.merge(tmp_path / "base", giving, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("weight", [1e300, -1e305, 1.7976931348623157e308])
def test_any_finite_weight_can_be_read_back(merged: Path, weight: float) -> None:
    facts = json.loads((merged / "adapterkit_receipt.json").read_text())
    facts["adapters"][0]["weight"] = weight
    (merged / "adapterkit_receipt.json").write_text(json.dumps(facts))
    assert read_receipt(merged).adapters[0].weight == weight


@pytest.mark.parametrize("weight", ["Infinity", "NaN", "true", "1" + "0" * 400])
def test_invalid_weights_are_refused(merged: Path, weight: str) -> None:
    file = merged / "adapterkit_receipt.json"
    file.write_text(file.read_text().replace('"weight": 1.0', f'"weight": {weight}', 1))
    with pytest.raises(FormatError, match="weight: expected a finite number"):
        read_receipt(merged)


# --- sidecars --------------------------------------------------------------------------------------------------------


def test_a_sidecar_reserves_space_for_every_shape(tmp_path: Path) -> None:
    """Even with the largest number of dimensions it never reaches the data."""
    file, shapes = tmp_path / "s.residuals", {f"kept:{number}": (1,) * 64 for number in range(9)}
    writer = sidecar.SidecarWriter(
        file, b"header", [{name: shape} for name, shape in shapes.items()] + [{"0:0-9": (sidecar.MAX_OFFSET,)}]
    )
    for name, shape in shapes.items():
        writer.add([(name, "F64", shape)], name.encode() + b"!!")
    writer.add([("0:0-9", "U8", (4,))], b"code")
    writer.finish()
    writer.close()
    found = {name: bytes(info.read_bytes()) for name, info in read_header(file).tensors.items() if name != "header"}
    assert found == {name: name.encode() + b"!!" for name in shapes} | {"0:0-9": b"code"}


def test_a_sidecar_has_the_same_bytes_in_any_order_of_its_pieces(tmp_path: Path) -> None:
    pieces = [[("0:0-4", "U8", (3,)), ("0:0-4.gains", "F64", (1, 1))], [("0:4-8", "U8", (5,))], [("1:0-9", "U8", (0,))]]
    data = [b"one" + bytes(8), b"other", b""]
    expected = [{name: shape for name, _, shape in piece} for piece in pieces]
    written = set()
    for number, order in enumerate(permutations(range(3))):
        file = tmp_path / f"{number}.residuals"
        writer = sidecar.SidecarWriter(file, b"header", expected)
        for piece in order:
            writer.add(pieces[piece], data[piece])
        assert writer.finish() == file.stat().st_size
        writer.close()
        written.add(file.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("kind", ["plain", "dora", "nf4"])
def test_equal_merges_write_equal_bytes(
    kind: str, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever thread is first: here the first block is recorded after another one."""
    base = make_base({f"{name}.weight": torch.randn(128, 64).bfloat16() for name in "ab"})
    if kind == "nf4":
        adapterkit.quantize(base, tmp_path / "nf4", to="nf4")
        base = tmp_path / "nf4"
    tensors = factors("a", 128, 64) | factors("b", 128, 64)
    if kind == "dora":
        tensors |= {f"{name}.lora_magnitude_vector": torch.rand(128) + 0.5 for name in "ab"}
    adapter = make_adapter(tensors, use_dora=kind == "dora")
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 64 * 64 * 2)
    alone = contents(adapterkit.merge(base, [adapter], tmp_path / "alone", threads=1).out)
    add, other = sidecar.SidecarWriter.add, Event()

    def first_comes_second(self: Any, entries: Any, data: bytes) -> None:
        if entries[0][0] == "0:0-64":
            assert other.wait(60)
        add(self, entries, data)
        if entries[0][0].partition(":")[2] not in ("", "0-64"):
            other.set()

    monkeypatch.setattr(sidecar.SidecarWriter, "add", first_comes_second)
    assert contents(adapterkit.merge(base, [adapter], tmp_path / "many", threads=4).out) == alone
    assert other.is_set()


@pytest.mark.parametrize("size", [0, 9, 10**8, 10**15, 2**60 - 1])
@pytest.mark.parametrize("dims", [1, 2, 64])
def test_the_reserved_header_is_large_enough_for_any_offset(size: int, dims: int) -> None:
    shape = (size, *(1,) * (dims - 1))
    raw, _ = encode_header([(f"{number}:0-1", "F8_E4M3", shape) for number in range(7)], {})
    assert len(raw) <= sidecar.room_for({f"{number}:0-1": shape for number in range(7)})


def test_a_sidecar_of_too_many_entries_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(FormatError, match="13 entries are too many .* `receipt=False`"):
        sidecar.SidecarWriter(tmp_path / "s.residuals", b"", [{f"{number}:0-1": (1,)} for number in range(12)])
    assert not list(tmp_path.iterdir())


# --- the command that is printed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "it's", "-dash", "~", "$(touch x)", "new\nline", "\x1b[31m\\n\u202e", "a:0.5", "50%\x07\n",
                                  os.fsdecode(b"\xff'"), "\U0001f469\u200d\U0001f469", "n\u00e4me", "x" * 200])  # fmt: skip
@pytest.mark.parametrize("single", [False, True])
def test_the_printed_command_undoes_the_merge(
    name: str, single: bool, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any shell, from the current directory, with adapters found only by the printed command."""
    base = tmp_path / "base" / "model-00001-of-00002.safetensors" if single else tmp_path / "base"
    end, files = (
        ".safetensors" if single else "",
        [tmp_path / "hidden" / "here" / name, tmp_path / f"{name}.safetensors"],
    )
    files[0].parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "adapter", files[0])
    shutil.move(tmp_path / "adapter" / "adapter_model.safetensors", files[1])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    relative = [os.path.relpath(file) for file in files]
    (tmp_path / "adapter" / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    command = ["merge", base, f"{relative[0]}:0.5", f"{relative[1]}:1", "-o", f"deep/{name}{end}", "--allow-partial"]
    merged_once = run(*command)
    assert merged_once.code == 0, merged_once
    printed = merged_once.out.partition("undo      ")[2].rstrip("\n")
    script = f"adapterkit() {{ printf '%s\\0' \"$@\"; }}; {printed}"
    [words, same_words] = (
        subprocess.run([shell, "-c", script], stdout=subprocess.PIPE).stdout for shell in ("sh", "bash")
    )
    new = Path(f"NEW{end}")
    assert words == same_words and run(*map(os.fsdecode, words.split(b"\0")[:-1])).code == 0
    assert new.read_bytes() == base.read_bytes() if single else same(new, base)
    assert "x" not in os.listdir()


def test_paths_that_look_like_options_or_weights() -> None:
    parts = undo_command(Path("-out"), ["-a", "-a", "org/name:8"])
    assert parts == ["adapterkit unmerge", "./-out", "-o NEW", "--adapter ./-a", "--adapter org/name:8:1"]


def test_a_command_of_many_adapters_is_whole(merged: Path, tmp_path: Path) -> None:
    """It goes over several lines where one would be cut."""
    for number in range(40):
        shutil.copytree(tmp_path / "adapter", tmp_path / "many" / f"{number}{'x' * 150}")
    many = sorted((tmp_path / "many").iterdir())
    outcome = run("merge", tmp_path / "base", *many, "-o", tmp_path / "sum", "--scale", "0.01")
    [_, printed] = outcome.out.split("undo      ")
    assert shlex.split(printed.replace("adapterkit ", f"{sys.executable} -m adapterkit "))[-1] == str(many[-1])
    assert printed.count("--adapter") == 40 and "…" not in printed
    told = json.loads(run("merge", tmp_path / "base", many[0], "-o", tmp_path / "one", "--json").out)["undone_by"]
    script = f"adapterkit() {{ printf '%s\\0' \"$@\"; }}; {told.replace('NEW', str(tmp_path / 'NEW'))}"
    words = subprocess.run(["bash", "-c", script], check=True, stdout=subprocess.PIPE).stdout.split(b"\0")[:-1]
    assert run(*map(os.fsdecode, words)).code == 0
    assert same(tmp_path / "NEW", tmp_path / "base")


# --- every file by its hash ------------------------------------------------------------------------------------------


def with_everything(base: Path) -> Path:
    """A base with every kind of companion: in folders, replaced by a merge, and left out."""
    (base / "deep" / "er").mkdir(parents=True)
    (base / "deep" / "er" / "vocab.txt").write_text("a")
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("the base's card")
    return base


FILES = [
    "tokenizer.json", "deep/er/vocab.txt", "adapterkit_receipt/before/config.json",
    "adapterkit_receipt/before/README.md", "adapterkit_receipt/before/model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_files_beside_the_weights_are_checked(name: str, how: str, merged: Path, tmp_path: Path) -> None:
    base = with_everything(tmp_path / "base")
    adapterkit.merge(base, [tmp_path / "adapter"], tmp_path / "full")
    file = tmp_path / "full" / name
    file.write_text('{"model_type": "stranger"}') if how == "changed" else file.unlink()
    says = run("unmerge", tmp_path / "full", "-o", tmp_path / "out").message(3)
    assert name.removeprefix("adapterkit_receipt/before/") in says
    assert (", expected " if how == "changed" else "is missing") in says
    assert not (tmp_path / "out").exists()
    adapterkit.unmerge(tmp_path / "full", tmp_path / "out", base=base)
    assert same(tmp_path / "out", base)
    file = base / name.removeprefix("adapterkit_receipt/before/")
    file.write_text('{"model_type": "stranger"}') if how == "changed" else file.unlink()
    outcome = run("unmerge", tmp_path / "full", "-o", tmp_path / "other", "--base", base)
    assert outcome.code in (1, 3) and not (tmp_path / "other").exists()


def test_levels_below_are_checked_too(merged: Path, tmp_path: Path) -> None:
    """A changed receipt or sidecar of an earlier merge is found when the last merge is undone."""
    adapterkit.merge(merged, [tmp_path / "adapter"], tmp_path / "both")
    before = tmp_path / "both" / "adapterkit_receipt" / "before"
    for file in [file for file in before.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(whole + b" ")
        with pytest.raises(AdapterkitError):
            adapterkit.unmerge(tmp_path / "both", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        file.write_bytes(whole)
    assert adapterkit.unmerge(tmp_path / "both", tmp_path / "out", every=True).out == tmp_path / "out"
    assert same(tmp_path / "out", tmp_path / "base")


def test_files_that_are_not_restored_are_named(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"other weights")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "more")
    (tmp_path / "more" / "notes.txt").write_text("mine")
    (tmp_path / "more" / "model.gguf").write_text("mine")
    outcome = run("unmerge", tmp_path / "more", "-o", tmp_path / "out")
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "note: pytorch_model.bin: not restored: the merge left it out",
        "note: notes.txt: not copied: the receipt does not list it",
        "note: model.gguf: not copied: it belongs to the unmerged model",
    ]
    (tmp_path / "base" / "pytorch_model.bin").unlink()
    assert same(tmp_path / "out", tmp_path / "base")


def test_a_receipt_of_format_1_is_read_and_unchecked_files_are_named(merged: Path, tmp_path: Path) -> None:
    def former(facts: dict[str, Any]) -> None:
        facts["adapterkit_receipt"] = 1
        for name in ("copied", "replaced", "left_out"):
            del facts[name]

    rewritten(merged / "adapterkit_receipt.json", former)
    (merged / "tokenizer.json").write_text("{}")
    outcome = run("unmerge", merged, "-o", tmp_path / "out")
    assert outcome.code == 0 and "every weight file has the SHA-256" in outcome.out
    assert (
        "unchecked the receipt has no SHA-256 of tokenizer.json, config.json, model.safetensors.index.json\n"
        in outcome.out
    )
    told = json.loads(run("unmerge", merged, "-o", tmp_path / "other", "--base", tmp_path / "base", "--json").out)
    assert told["unchecked"] == ["config.json", "model.safetensors.index.json"]


# --- one after the other ---------------------------------------------------------------------------------------------


def test_merges_one_after_the_other_are_undone_from_the_last(merged: Path, make_adapter: Make, tmp_path: Path) -> None:
    make_adapter(factors("a.q", 40, 24, size=0.3), "second")
    adapterkit.merge(merged, [tmp_path / "second"], tmp_path / "both")
    adapterkit.unmerge(tmp_path / "both", tmp_path / "one")
    assert same(tmp_path / "one", merged)
    for every in (False, True):
        with pytest.raises(UsageError, match="the receipt defines the weights"):
            adapterkit.unmerge(tmp_path / "both", tmp_path / "none", adapters=[(tmp_path / "second", 2)], every=every)
    outcome = run("unmerge", tmp_path / "both", "-o", tmp_path / "none", "--all")
    assert outcome.code == 0 and same(tmp_path / "none", tmp_path / "base")
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []


def test_one_of_two_adapters_merged_together_is_refused(merged: Path, make_adapter: Make, tmp_path: Path) -> None:
    make_adapter(factors("a.q", 40, 24), "second")
    make_adapter(factors("a.q", 40, 24), "it's\x1b")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter", (tmp_path / "it's\x1b", 1 / 3)], tmp_path / "odd")
    says = run("unmerge", tmp_path / "odd", "-o", tmp_path / "out", "--adapter", tmp_path / "adapter").message(3)
    assert says.endswith("adapterkit merge OUT \"$(printf 'it\\047s\\033:0.3333333333333333')\"")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter", (tmp_path / "second", 0.5)], tmp_path / "both")
    outcome = run("unmerge", tmp_path / "both", "-o", tmp_path / "out", "--adapter", tmp_path / "adapter")
    says = outcome.message(3)
    assert "merged together with second; 1 of 2 tensors" in says and "merge OUT second:0.5" in says
    shutil.move(tmp_path / "second", tmp_path / "elsewhere")
    with pytest.raises(FitError, match="second: adapter not found .*; give it in `adapters`"):
        adapterkit.unmerge(tmp_path / "both", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    given = [tmp_path / "elsewhere", tmp_path / "adapter"]
    adapterkit.unmerge(tmp_path / "both", tmp_path / "out", adapters=given)
    assert same(tmp_path / "base", tmp_path / "out")


# --- what is not as it was -------------------------------------------------------------------------------------------


def test_a_merge_that_has_changed_is_refused_and_can_be_approximated(merged: Path, tmp_path: Path) -> None:
    file = merged / "model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 0x40
    file.write_bytes(raw)
    outcome = run("unmerge", merged, "-o", tmp_path / "out")
    assert "has changed since the merge" in outcome.message(3) and not (tmp_path / "out").exists()
    outcome = run("unmerge", merged, "-o", tmp_path / "out", "--approximate")
    assert outcome.code == 0 and "unit in the last place" in outcome.err
    assert "approximate" in (tmp_path / "out" / "README.md").read_text()
    before, after = (
        load_file(folder / file.name)["a.q.weight"].float() for folder in (tmp_path / "base", tmp_path / "out")
    )
    off = ((before - after).abs() > 2**-7 * before.abs().clamp(min=0.1)).sum()
    assert off <= 1


def test_a_changed_adapter_is_refused(merged: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, file)
    assert "adapter not found" in run("unmerge", merged, "-o", tmp_path / "out").message(3)
    outcome = run("unmerge", merged, "-o", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "not the merged adapter, by its SHA-256" in outcome.message(3)
    assert run("unmerge", merged, "-o", tmp_path / "out", "--adapter", tmp_path / "adapter", "--approximate").code == 0


def test_a_changed_receipt_never_passes_for_the_base(merged: Path, tmp_path: Path) -> None:
    """Whatever a stranger writes into a receipt, the output has the SHA-256 that it names, or there is none."""
    file = merged / "adapterkit_receipt.json"
    whole = file.read_text()
    for broken, says in (
        (lambda facts: facts["shards"][0]["tensors"][0]["parts"][0].update(scaling=1.4), "the restored SHA-256 is"),
        (lambda facts: facts["shards"][0]["tensors"][0]["parts"][0].update(rows=[0, 7]), "does not fit"),
        (lambda facts: facts["shards"][0]["tensors"][0]["parts"][0].update(module="no.such"), "which is not in"),
        (lambda facts: facts["shards"][0]["tensors"].pop(), "the restored SHA-256 is"),
        (lambda facts: facts["shards"][0].update(name="../model.safetensors"), "expected a plain file name"),
        (lambda facts: facts["shards"].pop(), "its receipt lists model-00001"),
        (lambda facts: facts.update(adapterkit_receipt=3), "upgrade adapterkit"),
    ):
        file.write_text(whole)
        rewritten(file, broken)
        outcome = run("unmerge", merged, "-o", tmp_path / "out")
        assert outcome.code in (1, 3) and says in outcome.message(outcome.code), says
        assert not (tmp_path / "out").exists()


def test_foreign_files_in_a_receipt_are_refused(merged: Path, tmp_path: Path) -> None:
    (merged / "adapterkit_receipt" / "before" / "model.safetensors").write_bytes(b"other weights")
    assert "not a file that a merge saves" in run("unmerge", merged, "-o", tmp_path / "out").message(1)
    assert not (tmp_path / "out").exists()


def test_broken_sidecars_are_named(merged: Path, tmp_path: Path) -> None:
    file = merged / "adapterkit_receipt" / "model-00001-of-00002.safetensors.residuals"
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            adapterkit.unmerge(merged, tmp_path / "out")
        except AdapterkitError:
            assert not (tmp_path / "out").exists()
        else:  # in what is not used, or means the same
            assert hashes(tmp_path / "out") == hashes(tmp_path / "base")
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"00:0-40": "0:0-40"}, "expected rows from 40 of 40 on"),
        ({"0:3-9": "0:0-40"}, "expected rows from 40 of 40 on"),
        ({"0:0-40": None, "0:0-39": "0:0-40"}, "restores only 39 of 40 rows"),
        ({"0:0-40": None, "0:0-41": "0:0-40"}, "expected rows from 0 of 40 on"),
        ({"0:0-40": None}, "restores only 0 of 40 rows"),
        ({"0:0-40": "header"}, "cannot restore 960 elements"),
        ({"header": None}, "no header of the base's shard"),
        ({"header": "0:0-40"}, "is corrupt"),
    ],
)
def test_sidecars_with_other_entries(changes: dict[str, str | None], says: str, merged: Path, tmp_path: Path) -> None:
    """None hangs, writes elsewhere, or fails otherwise."""
    file = merged / "adapterkit_receipt" / "model-00001-of-00002.safetensors.residuals"
    before = load_file(file)
    after = {name: before[source].clone() for name, source in changes.items() if source}
    save_file({name: t for name, t in before.items() if name not in changes} | after, file)
    assert says in run("unmerge", merged, "-o", tmp_path / "out").message(1)
    assert not (tmp_path / "out").exists()


def test_a_sidecar_with_an_empty_tensor(merged: Path, tmp_path: Path) -> None:
    file = merged / "adapterkit_receipt" / "model-00001-of-00002.safetensors.residuals"
    tensors = load_file(file)
    header = zlib.decompress(bytes(tensors["header"].tolist()))
    facts = json.loads(header[8:])
    end = max(entry["data_offsets"][1] for name, entry in facts.items() if name != "__metadata__")
    number = len(facts.keys() - {"__metadata__"})
    facts["empty"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    tensors["header"] = torch.tensor(list(zlib.compress(packed(facts))), dtype=torch.uint8)
    save_file(tensors | {f"kept:{number}": torch.empty(0, dtype=torch.uint8)}, file)
    size = end + len(packed(facts))
    rewritten(merged / "adapterkit_receipt.json", lambda told: told["shards"][0].update(size=size))
    assert "the restored SHA-256 is" in run("unmerge", merged, "-o", tmp_path / "out").message(3)


def test_dora_without_its_gains(tmp_path: Path) -> None:
    adapter, merged = FIXTURES / "tiny-dora", tmp_path / "merged"
    adapterkit.merge(FIXTURES / "bases" / "tiny-llama", [adapter], merged)
    file = merged / "adapterkit_receipt" / "model.safetensors.residuals"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(".gains")}, file)
    with pytest.raises(FormatError, match="no gains, which are needed to undo DoRA"):
        adapterkit.unmerge(merged, tmp_path / "out", adapters=[adapter])


def test_4_bits_in_rows_that_share_a_byte(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    plain, merged = make_base({"model.layers.0.q.weight": torch.randn(8, 9).bfloat16()}), tmp_path / "merged"
    adapterkit.quantize(plain, tmp_path / "nf4", to="nf4")
    adapterkit.merge(tmp_path / "nf4", [make_adapter(factors("model.layers.0.q", 8, 9))], merged)
    file = merged / "adapterkit_receipt" / "model.safetensors.residuals"
    tensors = load_file(file)
    del tensors["0:0-8"]
    for rows in ("0:0-3", "0:3-8"):
        tensors[rows] = torch.tensor(
            list(residual_codec.encode(residual.nothing(torch.empty(0).bfloat16()))), dtype=torch.uint8
        )
    save_file(tensors, file)
    with pytest.raises(FormatError, match="0:3-8: expected rows from 3 of 8 on"):
        adapterkit.unmerge(merged, tmp_path / "out")


def test_headers_that_are_padded_and_that_would_fill_memory(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "padded.safetensors"
    header = json.dumps({"a.q.weight": {"dtype": "BF16", "shape": [40, 24], "data_offsets": [0, 1920]}}).encode()
    base.write_bytes(packed(header.ljust(1 << 20), torch.randn(960).bfloat16().view(torch.uint8).numpy().tobytes()))
    adapterkit.merge(base, [tmp_path / "adapter"], tmp_path / "m.safetensors", allow_partial=True)
    adapterkit.unmerge(tmp_path / "m.safetensors", tmp_path / "again.safetensors")
    assert base.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    file = tmp_path / "m.safetensors.receipt" / "adapterkit_receipt" / "padded.safetensors.residuals"
    bomb = zlib.compress(packed(b'{"":[' + b"[]," * (1 << 24)))
    save_file(load_file(file) | {"header": torch.tensor(list(bomb), dtype=torch.uint8)}, file)
    with pytest.raises(FormatError, match="is corrupt"):
        adapterkit.unmerge(tmp_path / "m.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/b", "a/" + "b" * 300])
def test_adapters_by_names_that_no_file_has(name: str, merged: Path, tmp_path: Path) -> None:
    rewritten(merged / "adapterkit_receipt.json", lambda told: told["adapters"][0].update(name=name))
    with pytest.raises(AdapterkitError):
        adapterkit.unmerge(merged, tmp_path / "out")


def test_where_zstd_is_missing(merged: Path, tmp_path: Path) -> None:
    """A merge without a receipt works, and the error suggests it."""
    code = """
import sys
sys.modules["backports"] = sys.modules["compression"] = None
from adapterkit.cli.main import main
words = sys.argv
for more in ([], ["--no-receipt"]):
    sys.argv = words + more
    try:
        main()
    except SystemExit as end:
        print("ended", end.code)
"""
    words = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    before, _, after = ended.stdout.partition("ended 1\n")
    assert before == "" and after.endswith("ended 0\n")
    assert "pip install backports.zstd, or merge with --no-receipt" in ended.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


# --- without a receipt -----------------------------------------------------------------------------------------------


def test_without_a_receipt_the_base_restores(merged: Path, tmp_path: Path) -> None:
    base, adapter, bare = tmp_path / "base", tmp_path / "adapter", tmp_path / "bare"
    adapterkit.merge(base, [adapter], bare, receipt=False)
    assert not (bare / "adapterkit_receipt.json").exists()
    assert "no receipt" in run("unmerge", bare, "-o", tmp_path / "out").message(3)
    assert "no receipt lists the adapters" in run("unmerge", bare, "-o", tmp_path / "out", "--base", base).message(2)
    outcome = run("unmerge", bare, "-o", tmp_path / "out", "--base", base, "--adapter", f"{adapter}:0.5")
    assert ", scaled: " in outcome.message(3) and not (tmp_path / "out").exists()
    assert run("unmerge", bare, "-o", tmp_path / "out", "--base", base, "--adapter", adapter).code == 0
    assert same(base, tmp_path / "out")


def test_with_a_receipt_another_base_is_refused(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    file = tmp_path / "other" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "the restored SHA-256 is" in run(
        "unmerge", merged, "-o", tmp_path / "out", "--base", tmp_path / "other"
    ).message(3)
    assert run("unmerge", merged, "-o", tmp_path / "out", "--base", tmp_path / "base").code == 0
    assert same(tmp_path / "base", tmp_path / "out")


def test_options_that_contradict_each_other(merged: Path, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    for how in (
        {"base": base, "approximate": True}, {"base": base, "adapters": [adapter]}, {"adapters": [(adapter, 0.5)]},
        {"every": True, "approximate": True}, {"every": True, "base": base},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            adapterkit.unmerge(merged, out, **how)
    dora = FIXTURES / "tiny-dora"
    with pytest.raises(FitError, match="rescales"):
        adapterkit.unmerge(FIXTURES / "bases" / "tiny-llama", out, adapters=[dora], approximate=True)
    assert not out.exists()
