"""Merges against float64: every element, every kind of adapter, every layout."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
from collections.abc import Callable
from itertools import permutations
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import oracle
import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.algebra.updates import Retention
from adapterkit.errors import FitError, NoSpaceError, UsageError
from adapterkit.merging.plan import planner
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run.run import TensorMerged

TINY = {
    "tiny-dora": "tiny-llama",
    "tiny-rslora": "tiny-llama",
    "tiny-patterns": "tiny-llama",
    "tiny-embed-save": "tiny-llama",
    "tiny-conv1d": "tiny-gpt2",
    "tiny-conv": "tiny-conv",
    "tiny-conv-dora": "tiny-conv",
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def misrounded(base: Path, adapter: Path, out: Path, **how: object) -> tuple[int, int]:
    """Compare `out` with the oracle: (elements that are not correctly rounded, elements compared)."""
    before, after = weights(base), weights(out)
    expected = oracle.merged(before, adapter, **how)
    untouched = [name for name in before if name not in expected]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    wrong = sum(oracle.check(after[name], value) for name, value in expected.items())
    return wrong, sum(after[name].numel() for name in expected)


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_adapter_is_correctly_rounded(name: str, tmp_path: Path) -> None:
    base, out = FIXTURES / "bases" / TINY[name], tmp_path / "out"
    adapterkit.merge(base, [FIXTURES / name], out)
    wrong, _ = misrounded(base, FIXTURES / name, out, conv1d=name == "tiny-conv1d")
    assert wrong == 0


@pytest.mark.base
def test_a_real_merge_is_correctly_rounded_and_better_than_peft(smollm2: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, out = FIXTURES / "smollm2-wikisql", tmp_path / "out"
    adapterkit.merge(smollm2, [adapter], out, receipt=False)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()

    before, after = weights(smollm2), weights(out)
    expected = oracle.merged(before, adapter)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - expected.keys())
    wrong = theirs = total = 0
    for name, value in expected.items():
        wrong, total = wrong + oracle.check(after[name], value), total + after[name].numel()
        theirs += int((peft[name] != oracle.rounded(value.exact, torch.bfloat16)).sum())
    assert wrong <= 1e-6 * total
    assert wrong <= theirs


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_output_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    base, adapter, out = FIXTURES / "bases" / "tiny-gpt2", FIXTURES / "tiny-conv1d", tmp_path / "out"
    adapterkit.merge(base, [adapter], out, dtype=dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    before, after = weights(base), weights(out)
    expected = oracle.merged(before, adapter, conv1d=True)
    for name, tensor in after.items():
        assert tensor.dtype == kind
        exact = expected[name].exact if name in expected else before[name].double()
        assert torch.equal(tensor, oracle.rounded(exact, kind))
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(kind).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_float32_sums_on_a_midpoint_go_to_the_right_side(
    dtype: torch.dtype, ulps: float, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    # W + Δ is a hair above and below the middle between 1 and the next value; float32 loses the hair.
    hair = 2.0**-30
    base = make_base({"m.weight": torch.ones(2, 2, dtype=dtype)})
    A, B = torch.tensor([[ulps, ulps], [hair, -hair]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    adapter = make_adapter({"m.lora_A.weight": A, "m.lora_B.weight": B}, r=2, lora_alpha=2)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    up, down = 1 + 2 * ulps, 1.0
    assert weights(tmp_path / "out")["m.weight"].tolist() == [[up, down], [down, up]]


def test_adapters_add_up_in_any_order_before_one_rounding(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.randn(24, 40).bfloat16()})
    a = make_adapter(factors("m", 24, 40), "a")
    b = make_adapter(factors("m", 24, 40, rank=2), "b", r=2, lora_alpha=3)
    W, exact = weights(base)["m.weight"], weights(base)["m.weight"].double()
    for folder, weight in ((a, 0.7), (b, -0.3)):
        exact = exact + oracle.merged({"m.weight": W}, folder, weight)["m.weight"].exact - W.double()
    for order in ([(a, 0.7), (b, -0.3)], [(b, -0.3), (a, 0.7)]):
        adapterkit.merge(base, order, tmp_path / "out", overwrite=True)
        assert torch.equal(weights(tmp_path / "out")["m.weight"], oracle.rounded(exact, torch.bfloat16))


def test_weighted_dora_adds_its_effective_delta(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.randn(24, 40).bfloat16()})
    magnitude = {"m.lora_magnitude_vector": torch.rand(24) * 8}
    dora = make_adapter(factors("m", 24, 40) | magnitude, "dora", use_dora=True)
    plain = make_adapter(factors("m", 24, 40), "plain")
    adapterkit.merge(base, [(dora, 0.5), plain], tmp_path / "out", scale=0.8)
    W = weights(base)["m.weight"]
    parts = [oracle.merged({"m.weight": W}, dora, 0.4), oracle.merged({"m.weight": W}, plain, 0.8)]
    exact = W.double() + sum(part["m.weight"].exact - W.double() for part in parts)
    assert torch.equal(weights(tmp_path / "out")["m.weight"], oracle.rounded(exact, torch.bfloat16))


@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
def test_dora_and_plain_adapters_add_up_in_any_order(
    by_column: bool, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Each as if it were alone: DoRA renormalizes the base, not the result of other adapters."""
    W = (torch.randn(40, 24) if by_column else torch.randn(24, 40)).bfloat16()
    base = make_base({"m.weight": W}, {"model_type": "gpt2"} if by_column else {})
    given = []
    for name, weight in (("one", 1.0), ("other", -0.6), ("plain", 0.8)):
        magnitude = {"m.lora_magnitude_vector": torch.rand(24) * 8} if name != "plain" else {}
        tensors = factors("m", 24, 40, size=0.6) | magnitude
        given.append((make_adapter(tensors, name, use_dora=name != "plain"), weight))
    alone = {path: oracle.merged({"m.weight": W}, path, weight, by_column)["m.weight"].exact for path, weight in given}
    for order in permutations(given):
        for some in (order, order[:2]):
            exact = W.double() + sum(alone[path] - W.double() for path, _ in some)
            adapterkit.merge(base, list(some), tmp_path / "out", overwrite=True)
            assert torch.equal(weights(tmp_path / "out")["m.weight"], oracle.rounded(exact, torch.bfloat16))


def test_threads_blocks_and_reports_do_not_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.merging.blocks import device
    from adapterkit.merging.run import pieces

    base, adapter = FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-patterns"
    adapterkit.merge(base, [adapter], tmp_path / "one", threads=1)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 640)
    monkeypatch.setattr(device, "CPU", device.ComputeDevice(torch.device("cpu"), 96))
    adapterkit.merge(base, [adapter], tmp_path / "many", threads=5, report=True)
    one, many = (tmp_path / name / "model.safetensors" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


@pytest.mark.parametrize("elements", [1, 96, 1 << 17])
def test_dora_by_column_takes_the_norms_of_all_rows(
    elements: int, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every row contributes much to them, wherever the weight is cut to measure them."""
    from adapterkit.merging.blocks import device

    monkeypatch.setattr(device, "CPU", device.ComputeDevice(torch.device("cpu"), elements))
    parts = factors("h.0.attn.c_attn", 24, 8) | {"h.0.attn.c_attn.lora_magnitude_vector": torch.rand(24) + 0.5}
    base = make_base({"h.0.attn.c_attn.weight": torch.randn(8, 24).bfloat16()}, {"model_type": "gpt2"})
    adapter = make_adapter(parts, use_dora=True)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert misrounded(base, adapter, tmp_path / "out", conv1d=True) == (0, 8 * 24)


def test_dora_by_column_survives_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.merging.blocks import device
    from adapterkit.merging.run import pieces

    monkeypatch.setattr(pieces, "BLOCK_BYTES", 640)
    monkeypatch.setattr(device, "CPU", device.ComputeDevice(torch.device("cpu"), 96))
    base, adapter = FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-dora"
    adapterkit.merge(base, [adapter], tmp_path / "out", threads=3)
    assert misrounded(base, adapter, tmp_path / "out")[0] == 0


def test_shards_names_dtypes_and_unchanged_bytes_are_preserved(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = {f"layers.{i}.q.weight": torch.randn(8, 12).bfloat16() for i in range(4)}
    tensors |= {f"layers.{i}.norm.weight": torch.randn(12) for i in range(4)} | {"steps": torch.arange(3)}
    base = make_base(tensors, shards=3)
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("do as you like")
    (base / "pytorch_model.bin").write_bytes(b"the unmerged model")
    adapter = make_adapter(factors("layers.1.q", 8, 12))
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    result = adapterkit.merge(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    written = {file.name for file in out.iterdir()}
    added = {"README.md", "adapterkit_merge.json", "adapterkit_receipt.json", "adapterkit_receipt"}
    assert written == {*before, *added} - {"pytorch_model.bin"}
    for file in out.glob("*.safetensors"):
        same = load_file(file).keys() - {"layers.1.q.weight"}
        with safe_open(file, "pt") as ours, safe_open(base / file.name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata() and list(ours.keys()) == list(theirs.keys())
            assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in same)
    assert (out / "model.safetensors.index.json").read_text() != ""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == json.loads(before["model.safetensors.index.json"])
    assert result.tensors == 1 and (out / "LICENSE").read_text() == "do as you like"
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digest in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "adapterkit_merge.json").read_text()


def test_a_single_file_becomes_a_single_file(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> None:
    base = make_base({"m.weight": torch.randn(8, 12).half()}) / "model.safetensors"
    result = adapterkit.merge(base, [make_adapter(factors("m", 8, 12))])
    assert result.out == base.with_name("model-merged.safetensors")
    assert load_file(result.out)["m.weight"].dtype == torch.float16
    receipt = f"{result.out.name}.receipt"
    assert {file.name for file in base.parent.iterdir()} == {"config.json", base.name, result.out.name, receipt}


def test_unchanged_files_can_be_linked(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base({f"layers.{i}.q.weight": torch.randn(8, 12).bfloat16() for i in range(2)}, shards=2)
    adapter = make_adapter(factors("layers.1.q", 8, 12))
    untouched, changed = sorted(file.name for file in base.glob("*.safetensors"))
    plain = adapterkit.merge(base, [adapter], tmp_path / "plain")
    linked = adapterkit.merge(base, [adapter], tmp_path / "linked", link=True)
    assert linked.hashes == plain.hashes
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device link")))
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    copied = adapterkit.merge(base, [adapter], tmp_path / "copied", link=True)
    assert copied.notes == (f"{untouched}: copied, cannot be linked: Invalid cross-device link",)
    for out in ("plain", "linked", "copied"):
        for name in (untouched, changed):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        assert not (tmp_path / out / changed).samefile(base / changed)
    assert not (tmp_path / "plain" / untouched).samefile(base / untouched)
    os.truncate(tmp_path / "copied" / untouched, 0)
    assert (base / untouched).stat().st_size > 0


def test_linked_files_need_no_space(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four shards are unchanged, and the disk has space for little more than the fourth."""
    base = make_base({f"layers.{i}.q.weight": torch.randn(64, 48).bfloat16() for i in range(4)}, shards=4)
    adapter, stats, size = make_adapter(factors("layers.1.q", 64, 48)), os.statvfs(tmp_path), 64 * 48 * 2
    free = os.statvfs_result([1, 1, *stats[2:4], 3 * size // 2, *stats[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert adapterkit.merge(base, [adapter], tmp_path / "linked", link=True).notes == ()
    with pytest.raises(NoSpaceError, match="0.00 GB free"):
        adapterkit.merge(base, [adapter], tmp_path / "copied")
    monkeypatch.setattr(
        Path, "stat", lambda path, real=Path.stat, **how: elsewhere(real(path, **how), path == tmp_path)
    )
    with pytest.raises(NoSpaceError, match="0.00 GB free"):
        adapterkit.merge(base, [adapter], tmp_path / "afar", link=True)


def elsewhere(stats: os.stat_result, moved: bool) -> os.stat_result:
    """The result of `stat`, with another device number if the file has `moved`."""
    return os.stat_result([*stats[:2], stats.st_dev + moved, *stats[3:]])


def test_hundreds_of_shards_with_few_descriptors(make_adapter: Callable[..., Path]) -> None:
    """In memory, where files are fast: merge every second shard, and undo, in a process limited to 256 descriptors."""
    shm = "/dev/shm"
    names, count = {}, 600
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        base = Path(folder) / "base"
        base.mkdir()
        for i in range(count):
            name, shard = f"layers.{i}.q.weight", f"model-{i + 1:05}-of-{count:05}.safetensors"
            save_file({name: torch.randn(6, 4).bfloat16()}, base / shard)
            names[name] = shard
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        adapter = make_adapter(
            {key: value for i in range(0, count, 2) for key, value in factors(f"layers.{i}.q", 6, 4).items()}
        )
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            merged = adapterkit.merge(base, [adapter], base.with_name("merged"), threads=16)
            adapterkit.unmerge(merged.out, base.with_name("again"), adapters=[adapter], threads=16)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert merged.tensors == count // 2
        for shard in names.values():
            assert (base.with_name("again") / shard).read_bytes() == (base / shard).read_bytes()


@pytest.mark.parametrize("shards", [1, 8])
def test_planning_inspects_each_tensor_once(
    shards: int, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once per shard, planning time would grow with the square of a model's size."""
    base = make_base({f"layers.{i}.q.weight": torch.randn(6, 4) for i in range(8)}, shards=shards)
    looked, copied = [], planner._copied_packed
    monkeypatch.setattr(planner, "_copied_packed", lambda *args: looked.append(args) or copied(*args))
    adapterkit.plan_merge(base, [make_adapter(factors("layers.0.q", 6, 4))], tmp_path / "out")
    assert len(looked) == 8


def test_the_stamps_of_many_adapters_are_gathered_once_a_shard(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per adapter and shard, merge time would grow with the cube of their number."""
    base = make_base({f"layers.{i}.q.weight": torch.randn(6, 4) for i in range(2)}, shards=2)
    adapters = [make_adapter(factors("layers.0.q", 6, 4), f"adapter{i}") for i in range(20)]
    gather, gathered = MergePlan.stamps.fget, []  # type: ignore[attr-defined]
    monkeypatch.setattr(MergePlan, "stamps", property(lambda plan: gathered.append(plan) or gather(plan)))
    adapterkit.merge(base, adapters, tmp_path / "out")
    assert 0 < len(gathered) <= 5


def test_events_name_every_tensor_and_end_with_the_result(tmp_path: Path) -> None:
    plan = adapterkit.plan_merge(FIXTURES / "bases" / "tiny-llama", [FIXTURES / "tiny-rslora"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    *events, last = adapterkit.run(plan)
    assert isinstance(last, Merged) and last.out == tmp_path / "out"
    assert [event.done for event in events if isinstance(event, TensorMerged)] == list(range(1, plan.edits + 1))
    landed = {name for places in plan.ledger.values() for at in places.values() for name in at}
    assert landed == {event.name for event in events if isinstance(event, TensorMerged)}


def test_an_abandoned_run_leaves_nothing(tmp_path: Path) -> None:
    plan = adapterkit.plan_merge(FIXTURES / "bases" / "tiny-llama", [FIXTURES / "tiny-rslora"], tmp_path / "out")
    events = adapterkit.run(plan)
    next(events)
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_a_plan_pickles(tmp_path: Path) -> None:
    import pickle

    plan = adapterkit.plan_merge(FIXTURES / "bases" / "tiny-conv", [FIXTURES / "tiny-conv-dora"], tmp_path / "out")
    *_, result = adapterkit.run(pickle.loads(pickle.dumps(plan)))
    assert result.tensors == plan.edits


def test_retention_matches_numpy(tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-patterns"
    result = adapterkit.merge(base, [adapter], tmp_path / "out", report=True)
    before, after = weights(base), weights(tmp_path / "out")
    for name, expected in oracle.merged(before, adapter).items():
        delta, applied = expected.exact - before[name].double(), after[name].double() - before[name].double()
        measured = result.retention[name]
        assert measured.retained == pytest.approx(float((applied * delta).sum() / delta.square().sum()), rel=1e-5)
        assert measured.error == pytest.approx(float((applied - delta).norm() / delta.norm()), rel=1e-4)
    assert sum(result.retention.values(), Retention()).retained == pytest.approx(1, abs=1e-3)


def test_an_update_lost_to_bf16_rounding_is_measured(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.ones(64, 64).bfloat16()})
    adapter = make_adapter(factors("m", 64, 64, size=1e-3))
    assert adapterkit.merge(base, [adapter], tmp_path / "out").retention["m.weight"].retained == 0


def test_fp16_overflow_is_refused(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base({"m.weight": torch.full((4, 4), 65000.0).half()})
    adapter = make_adapter(
        {"m.lora_A.weight": torch.ones(1, 4), "m.lora_B.weight": torch.full((4, 1), 900.0)}, r=1, lora_alpha=1
    )
    with pytest.raises(FitError, match="exceeds 65504, the maximum of float16; use `dtype='bf16'`"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inf_and_nan_in_the_base_are_preserved(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    W = torch.randn(8, 8).half()
    W[0, 0], W[1, 1], W[2, 2] = torch.inf, -torch.inf, torch.nan
    base = make_base({"m.weight": W})
    adapterkit.merge(base, [make_adapter(factors("m", 8, 8))], tmp_path / "out")
    out = weights(tmp_path / "out")["m.weight"]
    assert out[0, 0] == torch.inf and out[1, 1] == -torch.inf and out[2, 2].isnan() and out.isfinite().sum() == 61


def test_unsupported_quantized_bases_are_named_and_refused(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    base = make_base({"m.weight": torch.zeros(48, 1, dtype=torch.uint8)}, config)
    with pytest.raises(FitError, match="quantized|base weight is"):
        adapterkit.plan_merge(base, [make_adapter(factors("m", 8, 12))], tmp_path / "out")


def test_no_adapter_is_a_usage_error(make_base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter given"):
        adapterkit.plan_merge(make_base({"m.weight": torch.ones(2, 2)}), [], tmp_path / "out")


def test_the_report_has_a_line_for_each_layer_and_a_total(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    modules = ["lm_head", "layers.10.q", "layers.2.q", "layers.2.k"]
    base = make_base({f"{module}.weight": torch.randn(8, 12).bfloat16() for module in modules})
    adapter = make_adapter({name: x for module in modules for name, x in factors(module, 8, 12).items()})
    result = run_adapterkit("merge", base, adapter, "-o", tmp_path / "out", "--report")
    assert result.code == 0
    head, *lines, _, _, _, _ = result.out.splitlines()
    assert head.startswith("share of the update retained")
    assert [line.split(maxsplit=2)[2] for line in lines] == ["layer 2", "layer 10", "lm_head.weight", "total"]
    assert all(0.9 < float(line.split()[0]) < 1.1 for line in lines)


@pytest.mark.parametrize(("stored", "output"), [("float32", "bf16"), ("float64", None), ("bfloat16", "bf16")])
def test_retention_does_not_depend_on_how_the_base_is_stored(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, stored: str, output: str | None
) -> None:
    W = torch.randn(24, 40).bfloat16().to(getattr(torch, stored))
    base, adapter = make_base({"m.weight": W}), make_adapter(factors("m", 24, 40, size=0.05))
    result = adapterkit.merge(base, [adapter], tmp_path / "out", dtype=output, report=True)
    exact = oracle.merged({"m.weight": W}, adapter)["m.weight"].exact
    delta, applied = exact - W.double(), weights(tmp_path / "out")["m.weight"].double() - W.double()
    measured = result.retention["m.weight"]
    assert measured.delta == pytest.approx(float(delta.square().sum()), rel=1e-4)
    assert measured.retained == pytest.approx(float((applied * delta).sum() / delta.square().sum()), rel=1e-4)


# --- updates that change nothing -------------------------------------------------------------------------------------


def idle(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], way: str
) -> tuple[Path, list[Any], dict[str, Any]]:
    """A base, and adapters that change nothing in it."""
    weight = torch.randn(24, 40).bfloat16()
    base = make_base({"q.weight": weight, "k.weight": torch.randn(24, 40).bfloat16()})
    tensors, config, weighted, options = factors("q", 24, 40), {}, 1.0, {}
    if way in ("B", "magnitude"):
        tensors["q.lora_B.weight"].zero_()
    if way == "magnitude":
        tensors["q.lora_magnitude_vector"] = weight.double().norm(dim=1).float()
        config = {"use_dora": True}
    if way == "saved":
        tensors, config = {"q.weight": weight.clone()}, {"modules_to_save": ["q"]}
    if way == "alpha":
        config = {"lora_alpha": 0}
    if way == "weight":
        weighted = 0.0
    if way == "rounding":
        tensors = factors("q", 24, 40, size=1e-4)
    if way == "quantizing":
        tensors["q.lora_B.weight"].zero_()
        options = {"quantize": "nf4"}
    return base, [(make_adapter(tensors, way, **config), weighted)], options


@pytest.mark.parametrize("way", ["B", "magnitude", "saved", "alpha", "weight", "rounding", "quantizing"])
def test_a_merge_that_changes_nothing_warns(
    way: str, make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapters, options = idle(make_base, make_adapter, way)
    plan = adapterkit.plan_merge(base, adapters, tmp_path / "out", **options)
    assert any("change" in note for note in plan.notes) is (way in ("alpha", "weight"))
    *_, result = adapterkit.run(plan)
    assert isinstance(result, adapterkit.Merged)
    first = result.warnings[0]
    assert first.startswith("1 of 1 merged tensors equal the base's (first: q.weight): the update is zero")
    assert ("too small for the output dtype" in first) is (way in ("rounding", "magnitude"))
    if way != "saved":
        retained = result.retention["q.weight"].retained
        assert retained == 0 if way in ("rounding", "magnitude") else isnan(retained)
    assert first in json.loads((tmp_path / "out" / "adapterkit_merge.json").read_text())["notes"]


def test_a_merge_that_leaves_tensors_unchanged_warns(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, [(idle_one, _)], _ = idle(make_base, make_adapter, "B")
    other = make_adapter(factors("k", 24, 40), "other")
    assert adapterkit.merge(base, other, tmp_path / "fine").warnings == ()
    [warning] = adapterkit.merge(base, [idle_one, other], tmp_path / "out").warnings
    assert warning.startswith("1 of 2 merged tensors equal the base's (first: q.weight)")
