"""What a Python call takes for a base and for adapters: every form of it everywhere, and one clear error for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors
from handmade import adapterkit as run_adapterkit
from safetensors.torch import load_file

import adapterkit
from adapterkit.api.inputs import weighted
from adapterkit.errors import UsageError
from adapterkit.train.evaluate_options import EvaluateOptions
from adapterkit.train.recipe import Recipe


@pytest.fixture
def pair(make_base: Callable[..., Path], make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    base = make_base({"q.weight": torch.randn(24, 40)}, {"model_type": "llama"})
    return base, make_adapter(factors("q", 24, 40), "a")


FORMS: dict[str, tuple[Callable[[Path], Any], float]] = {
    "a string": (str, 1.0),
    "a path": (lambda path: path, 1.0),
    "an adapter": (adapterkit.load, 1.0),
    "a pair": (lambda path: (path, 0.5), 0.5),
    "a pair with an adapter": (lambda path: (adapterkit.load(path), 0.5), 0.5),
    "a list": (lambda path: [path], 1.0),
    "a list of pairs": (lambda path: [(str(path), 0.5)], 0.5),
    "a list of lists, as JSON has it": (lambda path: [[str(path), 0.5]], 0.5),
    "a generator": (lambda path: (one for one in [path]), 1.0),
    "a mapping": (lambda path: {path: 0.5}, 0.5),
    "a NumPy weight": (lambda path: (path, np.float32(0.5)), 0.5),
    "a whole weight": (lambda path: {str(path): 2}, 2.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_merges_with_its_weight(form: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    make, weight = FORMS[form]
    adapterkit.merge(base, make(adapter), tmp_path / "out")
    adapterkit.merge(base, [(adapter, weight)], tmp_path / "expected")
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert torch.equal(merged["q.weight"], expected["q.weight"])


def test_two_paths_in_a_tuple_are_two_adapters() -> None:
    assert weighted(("a", "b")) == [("a", 1.0), ("b", 1.0)]
    assert weighted(("a", 0.5)) == [("a", 0.5)]
    assert weighted([("a", 0.5), "b"]) == [("a", 0.5), ("b", 1.0)]
    assert weighted({"a": 1, "b": -0.5}) == [("a", 1.0), ("b", -0.5)]


CALLS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "merge": lambda base, out, what: adapterkit.merge(base, what, out),
    "plan_merge": lambda base, out, what: adapterkit.plan_merge(base, what, out),
    "verify": lambda base, out, what: list(adapterkit.verify(base, base, what)),
    "unmerge": lambda base, out, what: adapterkit.unmerge(base, out, adapters=what, approximate=True),
    "combine": lambda base, out, what: adapterkit.combine(what, out),
    "compare": lambda base, out, what: adapterkit.compare(what),
    "resize": lambda base, out, what: adapterkit.resize(what, out, rank=2),
    "convert": lambda base, out, what: adapterkit.convert(what, out, to="rslora"),
}
WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, "adapters: found None; expected a path"),
    "a number": (3, "adapters: found 3; expected a path"),
    "bytes": (b"a", "expected a path"),
    "a set": ({"a"}, "expected a path"),
    "an empty name": ("", "adapters: found ''"),
    "a number in a list": (["a", 0.5], "adapters: found 0.5"),
    "a weight that is text": ([("a", "0.5")], "weight of a: '0.5': expected a finite number"),
    "a weight that is true": (("a", True), "weight of a: True: expected a finite number"),
    "a weight that is no number": ({"a": float("nan")}, "weight of a: nan: expected a finite number"),
    "no weight": (("a", None), "weight of a: None: expected a finite number"),
    "three parts": ([("a", 0.5, 1)], "adapters: found \\('a', 0.5, 1\\)"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_takes_one_and_refuses_what_is_none(call: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    before = sorted(tmp_path.rglob("*"))
    for wrong, message in WRONG.values():
        with pytest.raises(UsageError, match=message):
            CALLS[call](base, tmp_path / "out", wrong)
    assert sorted(tmp_path.rglob("*")) == before
    if call == "compare":
        with pytest.raises(UsageError, match="at least two"):
            CALLS[call](base, tmp_path / "out", adapter)
        assert adapterkit.compare((adapter, adapter))[0].total.cosine == pytest.approx(1)
        return
    CALLS[call](base, tmp_path / "out", str(adapter))


def test_a_strength_that_no_adapter_takes_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An opened adapter has its own; the merge of a checkpoint alone has none."""
    base, adapter = pair[0], adapterkit.load(pair[1])
    for given in ({"alpha": 8.0}, {"scaling": 2.0}):
        for call in (
            lambda: adapterkit.merge(base, adapter, tmp_path / "out", **given),  # noqa: B023
            lambda: adapterkit.inspect(adapter, **given),  # noqa: B023
            lambda: adapterkit.merge(base, [], tmp_path / "out", dtype="fp32", **given),  # noqa: B023
        ):
            with pytest.raises(UsageError, match="for adapters without a config, but no file of one is given"):
                call()
    assert not (tmp_path / "out").exists()


def test_what_takes_one_adapter_refuses_two(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for call in ("resize", "convert"):
        with pytest.raises(UsageError, match="2 adapters: expected one"):
            CALLS[call](pair[0], tmp_path / "out", [pair[1], pair[1]])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": 3}, "device '3': expected auto, cpu, cuda or cuda:N"),
        ({"device": None}, "device 'None'"),
        ({"threads": 0}, "threads 0: expected a whole number from 1"),
        ({"threads": "2"}, "threads '2'"),
        ({"threads": True}, "threads True"),
        ({"scale": "2"}, "scale '2': expected a finite number"),
        ({"scale": float("inf")}, "scale inf"),
        ({"scale": 1e308, "adapters": 1e308}, "weight × scale is inf"),
        ({"alpha": "8"}, "alpha '8': expected a number"),
        ({"dtype": torch.float64}, "dtype torch.float64: expected one of bf16, fp16, fp32"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of bf16"),
        ({"dtype": "bflaot16"}, "dtype 'bflaot16': expected one of bf16, fp16, fp32; did you mean bfloat16\\?"),
        ({"dtype": 16}, "dtype 16: expected one of bf16"),
        ({"seed": "1", "quantize": "nf4"}, "seed '1'"),
        ({"rename": 3}, "rename 3: expected \\(old, new\\)"),
        ({"rename": ("a", "b", "c")}, "`rename=a=b=c`"),
        ({"base": ""}, "base ''"),
    ],
)
def test_options_that_make_no_sense(
    option: dict[str, Any], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, weight = option.pop("base", pair[0]), option.pop("adapters", 1.0)
    with pytest.raises(UsageError, match=message):
        adapterkit.merge(base, (pair[1], weight), tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_options_in_other_types(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merged = adapterkit.merge(base, adapter, tmp_path / "cpu", device=torch.device("cpu"), rename="x=y", scale=1)
    assert merged.place == "the CPU"
    adapterkit.combine((adapter, adapter), tmp_path / "dense", method="ties", options={"density": 1})
    for density in (True, "1", 0, 2, None):
        with pytest.raises(UsageError, match="density"):
            adapterkit.combine((adapter, adapter), tmp_path / "x", method="ties", options={"density": density})  # type: ignore[dict-item]
    for limit in ({"rank": "2"}, {"rank": True}, {"rank": 2.0}, {"energy": "0.9"}, {"error": True}):
        with pytest.raises(UsageError, match="expected a (whole )?number"):
            adapterkit.resize(adapter, tmp_path / "x", **limit)  # type: ignore[arg-type]


DTYPES = {
    torch.bfloat16: (torch.bfloat16, "bf16", "bfloat16", "BF16", "torch.bfloat16"),
    torch.float16: (torch.half, "fp16", "f16", "float16", "half", "F16", "torch.float16", np.dtype("float16")),
    torch.float32: (torch.float, "fp32", "f32", "float32", "F32", "torch.float32", "float"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_has_many_names(dtype: torch.dtype, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for at, name in enumerate(DTYPES[dtype]):
        plan = adapterkit.plan_merge(*pair, tmp_path / str(at), dtype=name)  # type: ignore[arg-type]
        assert plan.config["dtype" if "dtype" in plan.config else "torch_dtype"] == str(dtype).removeprefix("torch.")
        asked: Any = name
        assert Recipe(dtype=asked).dtype == EvaluateOptions("base", "data", dtype=asked).dtype == DTYPES[dtype][1]
        shown = run_adapterkit("merge", *pair, "-o", tmp_path / str(at), "--dtype", str(name), "--dry-run")
        assert shown.code == 0 and f"dtype {plan.facts()['dtype']}" in shown.out
    adapterkit.merge(*pair, tmp_path / "out", dtype=dtype)
    assert load_file(tmp_path / "out" / "model.safetensors")["q.weight"].dtype is dtype
    hint = "did you mean bfloat16?"
    assert run_adapterkit("merge", *pair, "--dtype", "bflaot16").message(2).endswith(hint)


def test_swapped_arguments_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    with pytest.raises(UsageError, match="a: is an adapter, expected a model; .*base is a model: swap the two"):
        adapterkit.merge(adapter, base, tmp_path / "out")
    with pytest.raises(UsageError, match="adapter_model.safetensors: is an adapter, expected a model"):
        adapterkit.merge(adapter / "adapter_model.safetensors", base, tmp_path / "out")
    with pytest.raises(UsageError, match="base: is a model, expected an adapter"):
        adapterkit.merge(base, base, tmp_path / "out")
    with pytest.raises(UsageError, match="base: is a model, expected an adapter"):
        adapterkit.combine([base, adapter], tmp_path / "out")
    with pytest.raises(UsageError, match="the merged model comes first; its adapters are named by `adapters`"):
        adapterkit.unmerge(adapter, tmp_path / "out", adapters=base)
    for call in (
        lambda: adapterkit.quantize(adapter, tmp_path / "out", to="nf4"),
        lambda: adapterkit.extract(adapter, base, tmp_path / "out", rank=1),
        lambda: list(adapterkit.verify(adapter, base, adapter)),
    ):  # where there is no other order
        with pytest.raises(UsageError, match="a: is an adapter, expected a model$"):
            call()


def test_a_live_model_takes_an_opened_adapter(pair: tuple[Path, Path]) -> None:
    model = torch.nn.Module()
    model.q = torch.nn.Linear(40, 24)
    for wrong in ((model, str(pair[1])), (adapterkit.load(pair[1]), model)):
        with pytest.raises(UsageError, match="apply: expected a torch.nn.Module and an Adapter"):
            adapterkit.apply(*wrong)  # type: ignore[arg-type]
    for weight in ("0.5", True, float("nan"), None):
        with pytest.raises(UsageError, match="weight"):
            adapterkit.apply(model, adapterkit.load(pair[1]), weight)  # type: ignore[arg-type]
