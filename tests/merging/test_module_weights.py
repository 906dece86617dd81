"""Weights by module: patterns, and merges, unmerges, verifications and combinations with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import FIXTURES, factors
from handmade import adapterkit as run
from handmade import contents
from safetensors.torch import load_file, save_file
from test_merge import TINY, weights

import adapterkit
from adapterkit.adapter.module_patterns import matches
from adapterkit.errors import UsageError
from adapterkit.merging.receipts.receipt import read_receipt
from adapterkit.tui.actions import ACTIONS

Make = Callable[..., Path]
NAME = "model.layers.12.mlp.experts.3.gate_proj"

MATCHES = {
    "layers.0-12": True, "layers.12-12": True, "layers.12": True, "layers.0-11": False, "layers.13-999": False,
    "layers.1": False, "layers.1*": True, "layers.2*": False, "12": True, "0-12": True, "*.mlp": True, "mlp": True,
    "lp": False, "*lp": True, "mlp.*": True, "*": True, "model.*.gate_proj": True, "*.gate_proj": True,
    "gate_proj.*": False, "*.model": False, "model.mlp": False, "model.*.*.mlp": True, "model.*.*.*.mlp": False,
    "experts.0-3": True, "experts.4-9": False, "*.experts.3.*": True, "layers.12.mlp.experts.3.gate_proj": True,
    "MLP": False, "m?p": False, "m[l]p": False, "layers\\.12": True, "gate\\_proj": True, "\\*": False, "012": False,
    "000-012": True,
}  # fmt: skip


@pytest.mark.parametrize("pattern", MATCHES)
def test_a_pattern_matches_a_run_of_segments(pattern: str) -> None:
    assert matches(pattern, NAME) is MATCHES[pattern]


def test_special_characters_in_names_are_literal_or_escaped() -> None:
    assert matches("blocks[0]", "blocks[0].q") and not matches("blocks[0]", "blocks0.q")
    assert matches("a?", "a?") and not matches("a?", "ab")
    assert matches(r"a\*", "x.a*") and not matches(r"a\*", "x.ab")
    assert matches(r"0\-9", "x.0-9.y") and not matches("0-9", "x.0-9.y") and not matches(r"0\-9", "x.3")
    assert not matches("0-9", "x." + "9" * 5000)  # more digits than Python converts
    assert not matches("*a*a*a*a*a*a*a*a*b", "a" * 2000)  # in linear time


def test_no_pattern_is_empty() -> None:
    for pattern in ("", ".", "a..b", "a.", ".a"):
        with pytest.raises(UsageError, match="expected dotted segments"):
            matches(pattern, NAME)
    with pytest.raises(UsageError, match="range 9-0 is empty"):
        matches("layers.9-0", NAME)


# --- merges ----------------------------------------------------------------------------------------------------------


def expected_weight(tensor: str) -> float:
    """The weight of a tensor's module, by the patterns of `RULES` in words."""
    if re.search(r"\bmlp\b|\bembed_tokens\b|\bsquare\b", tensor):
        return -1.25
    return 0.3 if re.search(r"\.(1)\.", tensor) else 0.7


RULES = ("1", "mlp", "embed_tokens", "square")


@pytest.mark.parametrize("name", TINY)
def test_every_module_is_merged_with_the_weight_of_the_last_pattern(name: str, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases" / TINY[name], FIXTURES / name
    opened = adapterkit.load(adapter)
    names = [*opened.modules, *opened.replaced, *opened.tokens]
    used = [rule for rule in RULES if any(matches(rule, one) for one in names)]
    rules = {f"{name}:{rule}": 0.3 if rule == "1" else -1.25 for rule in used}
    adapterkit.merge(base, [(adapter, 0.7)], tmp_path / "out", weights=rules)
    before, after = weights(base), weights(tmp_path / "out")
    by_weight = {
        weight: oracle.merged(before, adapter, weight, conv1d="conv1d" in name) for weight in (0.3, 0.7, -1.25)
    }
    for tensor in by_weight[0.7]:
        expected = by_weight[expected_weight(tensor)][tensor]
        assert oracle.check(after[tensor], expected) <= after[tensor].numel() // 100, tensor
    assert len({expected_weight(tensor) for tensor in by_weight[0.7]}) >= 2

    [recorded] = read_receipt(tmp_path / "out").adapters
    assert recorded.weight == 0.7 and dict(recorded.module_weights) == {
        key.partition(":")[2]: weight for key, weight in rules.items()
    }
    adapterkit.unmerge(tmp_path / "out", tmp_path / "again", adapters=[adapter])
    assert contents(tmp_path / "again") == contents(base)
    found = adapterkit.verify(tmp_path / "out", base, [(adapter, 0.7)], weights=rules)
    assert {verdict.kind for verdict in found if verdict.modified} == {"exact"}
    assert not all(verdict.fits for verdict in adapterkit.verify(tmp_path / "out", base, [(adapter, 0.7)]))


@pytest.fixture
def two(make_base: Make, make_adapter: Make, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base with two layers, and adapters that share a module."""
    names = ["layers.0.q", "layers.0.mlp.up", "layers.1.q"]
    base = make_base({f"{name}.weight": torch.randn(24, 40).bfloat16() for name in names}, {"model_type": "llama"})
    one = make_adapter({k: t for name in names for k, t in factors(name, 24, 40).items()}, "one")
    other = make_adapter({k: t for name in names[:1] for k, t in factors(name, 24, 40, 5, 0.3).items()}, "other", r=5)
    return base, one, other


def rescaled(adapter: Path, out: Path, factors: dict[str, float]) -> Path:
    """A copy of an adapter with B of each module multiplied."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, factor in factors.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] *= factor
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def test_the_command_line_shows_the_weights_and_undoes_them(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = two
    given = ["--weight", "one:layers.0=9", "--weight", f"{other}:q=-2", "--weight", "one:*.mlp=0",
             "--weight", "one:layers.0=2", "--scale", "0.5"]  # fmt: skip
    planned = run("merge", base, f"{one}:4", other, "-o", tmp_path / "out", *given, "--dry-run")
    wrong = planned.message(2)  # layers.0 is given again at the end, where it takes all of *.mlp
    assert wrong.startswith("--weight one:*.mlp: later patterns match all of its modules, so it has no effect")
    given[5], given[7] = given[7], given[5]
    planned = run("merge", base, f"{one}:4", other, "-o", tmp_path / "out", *given, "--dry-run")
    assert planned.code == 0 and "note: one: weight 0 changes nothing in 1 module\n" in planned.err
    assert planned.out.splitlines()[1:6] == [
        "adapter   one × 2: all 3 modules match the base",
        "weight    one:layers.0 × 1: 1 module",
        "weight    one:*.mlp × 0: 1 module",
        "adapter   other × 0.5: 1 of 1 module matches the base",
        "weight    other:q × -1: 1 module",
    ]
    facts = json.loads(run("merge", base, f"{one}:4", other, "-o", tmp_path / "out", *given, "--dry-run", "--json").out)
    assert facts["adapters"][1]["module_weights"] == [{"pattern": "q", "weight": -1.0, "modules": 1}]
    assert run("merge", base, f"{one}:4", other, "-o", tmp_path / "out", *given).code == 0
    copies = [
        rescaled(one, tmp_path / "a", {"layers.0.q": 1, "layers.0.mlp.up": 0, "layers.1.q": 2}),
        rescaled(other, tmp_path / "b", {"layers.0.q": -1}),
    ]
    adapterkit.merge(base, copies, tmp_path / "expected")
    assert all(map(torch.equal, weights(tmp_path / "out").values(), weights(tmp_path / "expected").values()))
    assert "| one | 2, layers.0 × 1, \\*.mlp × 0 |" in (tmp_path / "out" / "README.md").read_text()
    assert (
        run("verify", tmp_path / "out", "--base", base, "--adapter", f"{one}:4", "--adapter", other, *given).code == 0
    )
    assert run("unmerge", tmp_path / "out", "-o", tmp_path / "again", "--adapter", one, "--adapter", other).code == 0
    assert contents(tmp_path / "again") == contents(base)
    subtracted = run("unmerge", tmp_path / "out", "-o", tmp_path / "near", "--approximate")
    assert subtracted.code == 0, subtracted
    for name, tensor in weights(base).items():
        assert (weights(tmp_path / "near")[name] - tensor).abs().max() < 0.1


def test_a_receipt_with_weights_is_not_contradicted(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = two
    adapterkit.merge(base, [one, other], tmp_path / "out", weights={"one:layers.0": 0.5, "other:q": 3.0})
    with pytest.raises(UsageError, match="the receipt defines the weights"):
        adapterkit.unmerge(tmp_path / "out", tmp_path / "again", adapters=[one, other], weights={"one:layers.0": 0.5})
    refused = run("unmerge", tmp_path / "out", "-o", tmp_path / "again", "--adapter", other).message(3)
    assert refused.endswith("then merge the rest again: adapterkit merge OUT one:1.0 --weight=one:layers.0=0.5")
    with pytest.raises(UsageError, match="omit the weight"):
        adapterkit.convert((one, 2.0), tmp_path / "again", to="rslora")


def test_wrong_weights_are_named_and_leave_nothing(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = two
    before = contents(tmp_path)
    for given, says in {
        "one:*.mpl=1": "--weight one:*.mpl: matches no module of the adapter; nearest: mlp, up, layers",
        "one:layers.7-9=1": "--weight one:layers.7-9: matches no module of the adapter; nearest: layers.1, layers.0, mlp.up",
        "one:lm_head=1": "--weight one:lm_head: matches no module of the adapter; nearest: ",
        "on:q=1": "--weight on:q: names none of the adapters (one, other); did you mean one?",
        "q=1": "--weight q: names none of the adapters (one, other); expected ADAPTER:MODULES, for example one:layers",
        "one:q": "--weight one:q: expected ADAPTER:MODULES=WEIGHT, as in adapter:layers.0-9=0.3",
        "one:q=high": "--weight one:q: 'high': expected a finite number",
        "one:q=nan": "--weight one:q: nan: expected a finite number",
        "one:q=1e308": "--weight one:q × scale: inf: expected a finite number",
        "one:=1": "modules '': expected dotted segments",
    }.items():
        for verb in (("merge", base), ("combine",)):
            if "scale" in says and verb[0] == "combine":
                continue
            more = ("--scale", "1e5") if "scale" in says else ()
            refused = run(*verb, one, other, "-o", tmp_path / "out", "--weight", given, *more).message(2)
            assert refused.startswith(says), refused
    with pytest.raises(UsageError, match="given 2 times; use one #1 or one #2"):
        adapterkit.merge(base, [one, one], tmp_path / "out", weights={f"{one}:q": 2.0})
    for wrong in ([("one:q", 1.0)], "one:q=1", {"one:q": True}, {("one", "q"): 1.0}):
        with pytest.raises(UsageError, match="weights"):
            adapterkit.merge(base, [one], tmp_path / "out", weights=wrong)
    assert contents(tmp_path) == before


def test_one_adapter_given_twice_is_told_apart(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, _ = two
    adapterkit.merge(base, iter([one, (one, -1.0)]), tmp_path / "out", weights={"one #2:layers.0": 0.0})
    expected = rescaled(one, tmp_path / "a", {"layers.1.q": 0})
    adapterkit.merge(base, [expected], tmp_path / "expected")
    assert all(map(torch.equal, weights(tmp_path / "out").values(), weights(tmp_path / "expected").values()))


def test_the_head_alone_of_a_tied_model(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    """The embedding's update stays, the head has its own weight, and both are written."""
    E = torch.randn(32, 16)
    base = make_base({"model.embed_tokens.weight": E}, {"model_type": "llama", "tie_word_embeddings": True})
    A, B, C, D = torch.randn(4, 32), torch.randn(16, 4), torch.randn(4, 16), torch.randn(32, 4)
    parts = {"model.embed_tokens.lora_embedding_A": A, "model.embed_tokens.lora_embedding_B": B}
    adapter = make_adapter(parts | {"lm_head.lora_A.weight": C, "lm_head.lora_B.weight": D}, lora_alpha=4)
    adapterkit.merge(base, [adapter], tmp_path / "out", weights={"adapter:lm_head": -0.5})
    found = weights(tmp_path / "out")
    assert torch.allclose(found["lm_head.weight"], E - 0.5 * D @ C, atol=1e-5)
    assert torch.allclose(found["model.embed_tokens.weight"], E + (B @ A).T, atol=1e-5)
    adapterkit.unmerge(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)
    only = make_adapter(parts, "only", lora_alpha=4)
    with pytest.raises(UsageError, match="only:lm_head: matches no module of the adapter"):
        adapterkit.merge(base, [only], tmp_path / "none", weights={"only:lm_head": 0.5})


def test_experts_of_a_stacked_tensor_share_a_weight(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    W, A, B = torch.randn(3, 6, 10), torch.randn(12, 10), torch.randn(6, 12)
    names = [f"layers.{layer}.mlp.experts" for layer in (0, 1)]
    parts = {f"{name}.lora_{key}.weight": part.clone() for name in names for key, part in (("A", A), ("B", B))}
    adapter = make_adapter(parts, target_parameters=[f"{name}.gate_up_proj" for name in names], lora_alpha=4)
    base = make_base({f"{name}.gate_up_proj": W.clone() for name in names})
    adapterkit.merge(base, [adapter], tmp_path / "out", weights={"adapter:layers.1.mlp.experts": 2.0})
    delta = torch.stack([B.reshape(6, 4, 3)[..., e] @ A.reshape(3, 4, 10)[e] for e in range(3)])
    for weight, tensor in zip((1.0, 2.0), weights(tmp_path / "out").values(), strict=True):
        assert torch.allclose(tensor, W + weight * delta, atol=1e-4)


# --- combinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"method": "linear"}, {"method": "ties", "rank": 6}, {"method": "svd", "rank": 3}])
def test_combining_is_that_of_rescaled_adapters(
    how: dict[str, Any], two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, one, other = two
    rules = {"one:layers.*": 2.0, "one:mlp": 0.5, "other:layers.0": -1.0}
    made = adapterkit.combine([(one, 7.0), other], tmp_path / "out", weights=rules, **how)
    factors = {"layers.0.q": 2.0, "layers.0.mlp.up": 0.5, "layers.1.q": 2.0}
    pair = [rescaled(one, tmp_path / "a", factors), rescaled(other, tmp_path / "b", {"layers.0.q": -1.0})]
    if how["method"] == "ties":  # its signs are elected by weighted updates, its mean is over the unweighted ones
        pair = [(pair[0], 1.0), (pair[1], 1.0)]
    expected = adapterkit.combine(pair, tmp_path / "expected", **how)
    for name in factors:
        got, wanted = (a[name].B @ a[name].A * a[name].scaling for a in (made.adapter, expected.adapter))
        assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max())), name
    record = json.loads((tmp_path / "out" / "adapterkit_adapter.json").read_text())
    assert record["from"][0]["module_weights"][1] == {"pattern": "mlp", "weight": 0.5, "modules": 1}
    planned = run("combine", f"{one}:7", other, "-o", tmp_path / "x", "--weight", "one:mlp=0.5", "--dry-run")
    assert planned.out.splitlines()[1] == "weight    one:mlp × 0.5: 1 module"


def test_whole_tensors_are_averaged_by_their_own_weights(make_adapter: Make, tmp_path: Path) -> None:
    values = [torch.full((3, 4), 1.0), torch.full((3, 4), 4.0)]
    pair = [
        make_adapter(factors("q", 4, 4) | {"score.weight": value}, name, modules_to_save=["score"])
        for name, value in zip("ab", values, strict=True)
    ]
    made = adapterkit.combine(pair, tmp_path / "out", weights={"a:score": 2.0}, saved="average")
    assert torch.equal(made.adapter.replaced["score.weight"].read(), torch.full((3, 4), 2.0))
    assert torch.allclose(made.adapter["q"].scaling * made.adapter["q"].B @ made.adapter["q"].A, sum(
        adapterkit.load(one)["q"].scaling * adapterkit.load(one)["q"].B @ adapterkit.load(one)["q"].A for one in pair
    ), atol=1e-6)  # fmt: skip


def test_the_forms_of_the_app_take_weights() -> None:
    for command in ("merge", "combine", "verify"):
        argv = ACTIONS[command].argv({"--weight": "'a:layers.0-9=0.3' a:*.mlp=1.2"})
        assert argv == [command, "--weight", "a:layers.0-9=0.3", "--weight", "a:*.mlp=1.2"]


@pytest.mark.parametrize("name", ["tiny-rslora", "tiny-patterns"])
def test_pefts_scaled_layers_compute_the_same_logits(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, ids = FIXTURES / "bases" / "tiny-llama", torch.arange(12)[None]
    rules = {f"{name}:layers.1": 0.25, f"{name}:*.q_proj": -1.5}
    adapterkit.merge(base, (FIXTURES / name, 0.5), tmp_path / "out", weights=rules, dtype="fp32")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), FIXTURES / name)
    for module, layer in model.named_modules():
        if hasattr(layer, "set_scale"):
            weight = -1.5 if module.endswith(".q_proj") else 0.25 if ".layers.1." in module else 0.5
            layer.set_scale("default", weight)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
