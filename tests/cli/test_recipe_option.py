"""Recipes of merge and combine: the values of a YAML file, and errors that name its lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES
from handmade import adapterkit as run
from handmade import contents

import adapterkit

BASE, ONE, OTHER = FIXTURES / "bases" / "tiny-llama", FIXTURES / "tiny-rslora", FIXTURES / "tiny-patterns"

RECIPE = f"""\
# a comment
base: {BASE}
adapters:
  {ONE}: 7e-1
  {OTHER}: 0.3
weights:
  tiny-patterns:layers.0: 0.1
  "tiny-patterns:*.mlp": 1.2
out: OUT
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe."""

    def write(text: str) -> Path:
        (tmp_path / "merge.yaml").write_text(text.replace("OUT", str(tmp_path / "out")))
        return tmp_path / "merge.yaml"

    return write


def test_a_recipe_merges_like_the_options(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe(f"{RECIPE}scale: 2\nallow-partial: true\ndtype: bfloat16\n")
    assert run("merge", "--recipe", file).code == 0
    weights = {"tiny-patterns:layers.0": 0.1, "tiny-patterns:*.mlp": 1.2}
    adapterkit.merge(BASE, [(ONE, 0.7), (OTHER, 0.3)], tmp_path / "same", weights=weights, scale=2.0, dtype="bf16")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    assert run("merge", "--recipe", file).message(7).startswith(str(tmp_path / "out"))

    given = ["-o", tmp_path / "new", "--weight", "tiny-rslora:q_proj=0", "--scale", "1"]  # replaces all weights
    assert run("merge", "--recipe", file, BASE, ONE, *given).code == 0
    adapterkit.merge(BASE, ONE, tmp_path / "same2", weights={"tiny-rslora:q_proj": 0.0}, dtype="bf16")
    assert contents(tmp_path / "new") == contents(tmp_path / "same2")


@pytest.mark.parametrize(
    "adapters", [f"[{ONE}:0.7, {OTHER}]", f"\n- {ONE}: 0.7\n- {OTHER}", f"\n  {ONE}: 0.7\n  {OTHER}: 1"]
)
def test_a_recipe_combines_like_the_options(adapters: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    more = "method: ties\noptions: {density: 2e-1}\nrank: 4\nweights: {'tiny-rslora:layers.0': -1}\n"
    file = recipe(f"adapters: {adapters}\n{more}")
    assert run("combine", "--recipe", file, "-o", tmp_path / "out").code == 0
    adapterkit.combine(
        [(ONE, 0.7), OTHER], tmp_path / "same", method="ties", options={"density": 0.2}, rank=4,
        weights={"tiny-rslora:layers.0": -1.0},
    )  # fmt: skip
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "same")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


WRONG = {
    "wieghts: {}": (":1: unknown key 'wieghts'; did you mean weights?", 2),
    "weight: {}": (":1: unknown key 'weight'; did you mean weights?", 2),
    "map: a=b": (":1: unknown key 'map'; did you mean rename?", 2),
    "threads: 2": (":1: unknown key 'threads'", 2),
    "\nmodels: []": (":2: unknown key 'models'; this is a key of mergekit; adapterkit takes", 2),
    ".nan: 1": (":1: unknown key 'nan'", 2),
    "base: 3": (":1: base: found '3', expected text", 2),
    "# x\n\nscale: high": (":3: scale: found 'high', expected a number", 2),
    "allow_partial: 1": (":1: allow_partial: found '1', expected true or false", 2),
    "scale: true": (":1: scale: found 'True', expected a number", 2),
    "allow-partial: true\nallow_partial: true": (":2: allow_partial and allow_partial are the same key", 2),
    "dtype: bf17": (":1: dtype 'bf17': expected one of", 2),
    "adapters:\n  a: 1\n  b: x": (":3: adapters: b: found 'x', expected a number", 2),
    "adapters:\n- a\n- [b, c]": (":3: adapters: found \"['b', 'c']\", expected an adapter", 2),
    "adapters: 3": (":1: adapters: found '3', expected an adapter", 2),
    "weights:\n- a:q": (":1: weights: found \"['a:q']\", expected names and values", 2),
    "weights:\n  a:q: 1\n  a:k: high": (":3: weights: a:k: found 'high', expected a number", 2),
    "weights:\n  a:q: 1\n  a:q: 2": (":3: duplicate key 'a:q'", 1),
    "base: [": (":1: is not valid YAML", 1),
    "": (": expected keys and values", 1),
    "just text": (": expected keys and values", 1),
}


@pytest.mark.parametrize("text", WRONG)
def test_an_error_names_the_line(text: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    says, code = WRONG[text]
    file = recipe(text)
    before = contents(tmp_path)
    assert run("merge", "--recipe", file, BASE, ONE, "-o", tmp_path / "out").message(code).startswith(f"{file}{says}")
    assert contents(tmp_path) == before


def test_a_single_argument_is_the_adapter_for_the_base_of_the_recipe(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With and without adapters in the recipe."""
    adapterkit.merge(BASE, ONE, tmp_path / "same", scale=0.5)
    for number, adapters in enumerate(("", f"adapters: {OTHER}\n")):
        file = recipe(f"base: {BASE}\nscale: 0.5\n{adapters}")
        assert run("merge", "--recipe", file, ONE, "-o", tmp_path / f"out{number}").code == 0
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / "same")


def test_what_neither_has_is_missing(recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert "no adapter given" in run("merge", "--recipe", recipe("dtype: fp32")).err
    file = recipe(f"adapters: {ONE}")
    assert "missing option '-o'" in run("combine", "--recipe", file).err
    assert "missing argument 'ADAPTER[:WEIGHT]...'" in run("combine", "-o", tmp_path / "out").err
    assert "No such file" in run("merge", "--recipe", tmp_path / "none.yaml").message(1)
