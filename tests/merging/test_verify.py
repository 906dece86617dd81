"""Verifying merges: correct ones by any tool pass, wrong ones are classified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run_adapterkit
from safetensors.torch import load_file, save_file
from test_merge import TINY

import adapterkit
from adapterkit.errors import FitError, UsageError
from adapterkit.merging.verdict import Verdict

MakeBase, MakeAdapter = Callable[..., Path], Callable[..., Path]
NAMES = [f"layers.{i}.{part}" for i in range(3) for part in ("q", "v")]


def verdicts(merged: Path, base: Path, *adapters: Any, **how: Any) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in adapterkit.verify(merged, base, list(adapters), **how)}


def kinds(found: dict[str, Verdict], modified: bool = True) -> set[str]:
    return {verdict.kind for verdict in found.values() if verdict.modified is modified}


@pytest.fixture
def base(make_base: MakeBase) -> Path:
    tensors = {f"{name}.weight": torch.randn(48, 64).mul_(0.05).bfloat16() for name in NAMES}
    return make_base(tensors | {"norm.weight": torch.ones(64).bfloat16()}, shards=2)


@pytest.fixture
def adapter(make_adapter: MakeAdapter) -> Path:
    tensors = {k: t for name in NAMES for k, t in factors(name, 48, 64, rank=9, size=0.03).items()}
    return make_adapter(tensors, r=9, lora_alpha=36)


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    return out


# --- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_our_own_merges_are_exact(name: str, tmp_path: Path) -> None:
    base = FIXTURES / "bases" / TINY[name]
    adapterkit.merge(base, [(FIXTURES / name, 0.7)], tmp_path / "out")
    found = verdicts(tmp_path / "out", base, (FIXTURES / name, 0.7))
    assert kinds(found) == {"exact"} and kinds(found, modified=False) <= {"exact"}
    assert sum(verdict.modified for verdict in found.values()) >= 2


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes_and_several_adapters_pass(
    base: Path, adapter: Path, make_adapter: MakeAdapter, tmp_path: Path, dtype: str
) -> None:
    other = make_adapter({k: t for name in NAMES[:3] for k, t in factors(name, 48, 64).items()}, "other")
    adapterkit.merge(base, [(adapter, 0.5), other], tmp_path / "out", dtype=dtype)
    found = verdicts(tmp_path / "out", base, (adapter, 0.5), other)
    assert kinds(found) <= {"exact", "rounded"} and kinds(found, modified=False) == {"exact"}
    assert all(verdict.fits for verdict in verdicts(tmp_path / "out", base, (adapter, 0.5), other, sample=0.1).values())


def test_a_merge_into_a_dequantized_four_bit_base_passes(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.quantize(base, tmp_path / "nf4", to="nf4", nested=True)
    adapterkit.merge(tmp_path / "nf4", [adapter], tmp_path / "out")
    assert kinds(verdicts(tmp_path / "out", tmp_path / "nf4", adapter)) <= {"exact", "rounded"}
    assert not all(verdict.fits for verdict in verdicts(tmp_path / "out", base, adapter).values())


@pytest.mark.parametrize("name", ["tiny-patterns", "tiny-rslora", "tiny-dora"])
def test_merges_by_peft_pass_within_rounding(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = FIXTURES / "bases" / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, FIXTURES / name).merge_and_unload().save_pretrained(tmp_path / "out")
    found = verdicts(tmp_path / "out", base, FIXTURES / name)
    assert kinds(found) <= {"exact", "rounded"} and kinds(found, modified=False) == {"exact"}


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "said"),
    [(2.0, "applied twice"), (-1.0, "subtracted"), (3.0, "α/√r instead of α/r"), (0.25, "without its scaling"),
     (4.0, "scaling applied twice"), (1.37, "× 1.37")],
)  # fmt: skip
def test_a_wrong_scale_is_measured_and_named(
    base: Path, adapter: Path, tmp_path: Path, weight: float, said: str
) -> None:
    adapterkit.merge(base, [(adapter, weight)], tmp_path / "out")
    found = verdicts(tmp_path / "out", base, adapter)
    assert kinds(found) == {"scaled"} and kinds(found, modified=False) == {"exact"}
    for verdict in found.values():
        if verdict.modified:
            assert verdict.scales[0][1] == pytest.approx(weight, rel=0.02)
            if weight != 1.37:
                assert said in verdict.explanation


@pytest.mark.parametrize(("every", "kind"), [(3, "scaled"), (1, "different")])
def test_only_the_error_of_two_roundings_is_attributed_to_rounding(
    base: Path, adapter: Path, tmp_path: Path, every: int, kind: str
) -> None:
    """The adapter applied twice, with every weight, or every third, off by one unit in the last place."""
    adapterkit.merge(base, [(adapter, 2.0)], tmp_path / "whole")

    def shake(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors.keys() - {"norm.weight"}:
            bits = tensors[name].view(torch.int16).view(-1)
            bits[::every] += (torch.randint(0, 2, bits[::every].shape) * 2 - 1).short()

    found = verdicts(changed(tmp_path / "whole", tmp_path / "out", shake), base, adapter)
    assert kinds(found) == {kind}


def test_the_adapter_with_the_wrong_scale_is_named(
    base: Path, adapter: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    other = make_adapter({k: t for name in NAMES for k, t in factors(name, 48, 64, size=0.05).items()}, "other")
    adapterkit.merge(base, [(adapter, 1.0), (other, 2.0)], tmp_path / "out")
    for verdict in verdicts(tmp_path / "out", base, adapter, other).values():
        if verdict.modified:
            assert verdict.kind == "scaled"
            assert dict(verdict.scales) == pytest.approx({"adapter": 1.0, "other": 2.0}, rel=0.03)


def test_an_omitted_layer_is_missing(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    before = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    out = changed(
        tmp_path / "whole", tmp_path / "out",
        lambda tensors: tensors.update({k: before[k] for k in tensors if k.startswith("layers.1.q")}),
    )  # fmt: skip
    found = verdicts(out, base, adapter)
    assert [name for name, verdict in found.items() if verdict.kind == "missing"] == ["layers.1.q.weight"]
    assert sum(not verdict.fits for verdict in found.values()) == 1


@pytest.mark.parametrize("name", ["layers.2.v.weight", "norm.weight"])
def test_one_flipped_bit_is_found(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "whole")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name].view(-1).view(torch.int16)[17] ^= 1 << 9

    found = verdicts(changed(tmp_path / "whole", tmp_path / "out", flip), base, adapter)
    [broken] = [verdict for verdict in found.values() if not verdict.fits]
    assert (
        broken.name == name
        and broken.mismatched == 1
        and broken.first_mismatch.startswith("[0, 17]" if name[0] == "l" else "[17, 0]")
    )
    assert broken.kind == ("damaged" if name[0] == "l" else "different")


def test_another_base_differs_everywhere(base: Path, adapter: Path, make_base: MakeBase, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "out")
    base.rename(tmp_path / "right")
    tensors = {f"{name}.weight": torch.randn(48, 64).mul_(0.05).bfloat16() for name in NAMES}
    wrong = make_base(tensors | {"norm.weight": torch.ones(64).bfloat16()})
    found = verdicts(tmp_path / "out", wrong, adapter)
    assert kinds(found) == {"different"}


def test_an_unrelated_change_is_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "whole")

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        if "norm.weight" in tensors:
            tensors["norm.weight"] *= 1.5

    found = verdicts(changed(tmp_path / "whole", tmp_path / "out", scale), base, adapter)
    assert kinds(found, modified=False) == {"different"} and kinds(found) <= {"exact", "rounded"}


def test_a_requantized_merge_is_named_with_its_retention(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As PEFT merges into 4 bits."""
    adapterkit.quantize(base, tmp_path / "nf4", to="nf4", nested=True)
    small = [(adapter, 0.1)]
    adapterkit.merge(tmp_path / "nf4", small, tmp_path / "out", quantize="same", accept_loss=True)
    found = verdicts(tmp_path / "out", tmp_path / "nf4", *small)
    assert kinds(found) <= {"quantized", "missing"} and any("NF4" in v.explanation for v in found.values())
    scales = [scale for verdict in found.values() for _, scale in verdict.scales]
    assert max(scales) < 0.9


@pytest.mark.parametrize("broken", [False, True])
def test_a_stored_tied_head_must_equal_the_embedding(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, broken: bool
) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(30, 64), "model.layers.0.q.weight": torch.randn(48, 64)}
    base = make_base(tensors, {"tie_word_embeddings": True})
    adapter = make_adapter(factors("model.layers.0.q", 48, 64))
    adapterkit.merge(base, [adapter], tmp_path / "whole")

    def write_out(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (2 if broken else 1)

    found = verdicts(changed(tmp_path / "whole", tmp_path / "out", write_out), base, adapter)
    assert found["lm_head.weight"].fits is not broken and sum(verdict.fits for verdict in found.values()) == 3 - broken


E, H = "model.embed_tokens", "lm_head"
CHANGES: dict[str, dict[str, torch.Tensor]] = {
    "nothing": {},
    "the embedding's factors": {f"{E}.lora_embedding_A": torch.ones(4, 30), f"{E}.lora_embedding_B": torch.ones(64, 4)},
    "the embedding": {f"{E}.weight": torch.ones(30, 64)},
    "the head": {f"{H}.weight": torch.ones(30, 64)},
    "both": {f"{E}.weight": torch.ones(30, 64), f"{H}.weight": -torch.ones(30, 64)},
    "both alike": {f"{E}.weight": torch.ones(30, 64), f"{H}.weight": torch.ones(30, 64)},
    "tokens": {f"{E}.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_tied_head_of_a_model_is_compared(
    make_base: MakeBase, make_adapter: MakeAdapter, tmp_path: Path, stored: bool, change: str
) -> None:
    """A checkpoint without a stored head has the embedding, if its own config ties them."""
    tensors = {f"{E}.weight": torch.randn(30, 64), "model.layers.0.q.weight": torch.randn(48, 64)}
    base = make_base(
        tensors | ({f"{H}.weight": tensors[f"{E}.weight"].clone()} if stored else {}), {"tie_word_embeddings": True}
    )
    config: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [3, 7]}} if change == "tokens" else {}
    config["modules_to_save"] = [module for module in (E, H) if f"{module}.weight" in CHANGES[change]]
    adapter = make_adapter(factors("model.layers.0.q", 48, 64) | CHANGES[change], **config)
    merged = adapterkit.merge(base, [adapter], tmp_path / "merged").out
    follows = change in ("nothing", "tokens", "both alike")

    def fits(name: str, change: Callable[[dict[str, torch.Tensor]], None], tied: bool) -> bool:
        copy = changed(merged, tmp_path / name, change)
        (copy / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        return all(verdict.fits for verdict in verdicts(copy, base, adapter).values())

    assert all(verdict.fits for verdict in verdicts(merged, base, adapter).values())
    assert fits("left out", lambda t: t.pop(f"{H}.weight", None), tied=True) is follows
    assert fits("written out", lambda t: t.update({f"{H}.weight": t[f"{E}.weight"].clone()}), tied=True) is follows
    with pytest.raises(FitError, match="lm_head.weight: missing from"):
        fits("lost", lambda t: t.pop(f"{H}.weight", None), tied=False)


def test_checkpoints_that_cannot_be_compared_are_refused(
    base: Path, adapter: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    base = base.rename(tmp_path / "right")
    tensors = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    short = make_base({k: v for k, v in tensors.items() if k != "norm.weight"})
    with pytest.raises(FitError, match="norm.weight: missing from"):
        verdicts(short, base, adapter)
    short.rename(tmp_path / "short")
    with pytest.raises(FitError, match="extra.weight: unexpected in"):
        verdicts(make_base(tensors | {"extra.weight": torch.zeros(3)}), base, adapter)
    for sample in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="sample"):
            verdicts(base, base, adapter, sample=sample)


def test_the_command_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [(adapter, 2.0)], tmp_path / "out")
    done = run_adapterkit("verify", tmp_path / "out", "--base", base, "--adapter", f"{adapter}:2")
    assert done.code == 0 and done.out.rstrip().endswith("\nOK") and "exact" in done.out
    done = run_adapterkit("verify", tmp_path / "out", "--base", base, "--adapter", adapter)
    assert done.code == 3 and "applied twice" in done.out and done.out.rstrip().endswith("MISMATCH")
    done = run_adapterkit("verify", tmp_path / "out", "--base", base, "--adapter", adapter, "--json", "--sample", "0.5")
    facts = json.loads(done.out)
    assert done.code == 3 and facts["fits"] is False and len(facts["tensors"]) == 7
