"""Recipes from YAML: the result, and the errors."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from handmade import adapterkit

from adapterkit.errors import FormatError, UsageError
from adapterkit.options import parameters
from adapterkit.train.initial import INITS
from adapterkit.train.recipe import Recipe, as_yaml, checked, read_recipe

yaml = pytest.importorskip("yaml")
pytest.importorskip("pydantic")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def read(file: Path, text: str, **overrides: Any) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return read_recipe(file, overrides)


def test_a_typical_file(file: Path) -> None:
    recipe = read(
        file,
        """
        base: HuggingFaceTB/SmolLM2-135M  # a comment
        data: train.jsonl
        method: dora
        lr: 1e-4
        weight-decay: 1E-2
        epochs: 3
        batch_size: 4
        rank_pattern: {q_proj: 16}
        alpha_pattern: {"layers.1.q_proj": 8}
        packing: yes
        max_steps: null
        sample: ["Once upon", "Größe:"]
        """,
    )
    assert (recipe.lr, recipe.weight_decay, recipe.epochs, recipe.batch_size) == (1e-4, 1e-2, 3.0, 4)
    assert isinstance(recipe.lr, float) and isinstance(recipe.epochs, float)
    assert recipe.rank_pattern == {"q_proj": 16} and recipe.alpha_pattern == {"layers.1.q_proj": 8.0}
    assert recipe.packing is True and recipe.max_steps is None and recipe.sample == ("Once upon", "Größe:")
    assert recipe.method == "dora" and recipe.rank == 8 and recipe.alpha is None


def test_the_command_line_overrides_the_file(file: Path) -> None:
    recipe = read(file, "rank: 4\nbatch-size: 2\nlr: 3e-4\n", rank=16, batch_size=5)
    assert (recipe.rank, recipe.batch_size, recipe.lr) == (16, 5, 3e-4)


def test_a_round_trip(file: Path) -> None:
    recipe = Recipe(
        base="b", data="d.jsonl", rank=3, alpha=7.5, targets=r".*\.layers\.[02]\..*", rank_pattern={"q": 2}, alpha_pattern={"k": 0.5},
        dropout=0.1, lr=2e-5, lora_plus=16.0, epochs=0.5, packing=True, sample=("a: b", "ü\n{}"), layers="0-5,10", seed=7,
        eval_share=0.1, patience=2, warmup=10.0, schedule="linear", clip=0.0,
    )  # fmt: skip
    text = as_yaml(recipe)
    assert read(file, text) == recipe and read(file, as_yaml(Recipe())) == Recipe()
    assert list(yaml.safe_load(text)) == [one.name for one in fields(Recipe)]
    assert checked(asdict(recipe), "here") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8", r"recipe\.yaml: unknown key 'rnak'; did you mean 'rank'\?"),
        ("learning_rate: 1", r"unknown key 'learning_rate'"),
        ("max-lenght: 9", r"unknown key 'max_lenght'; did you mean 'max_length'\?"),
        ("1: 2", r"unknown key '1'"),
        ("rank: eight", r"recipe\.yaml: rank is 'eight': Input should be a valid integer"),
        ("rank: 8.5", r"rank is 8\.5"),
        ("rank: null", r"rank is None"),
        ("lr: fast", r"lr is 'fast': Input should be a valid number"),
        ("packing: perhaps", r"packing is 'perhaps'"),
        ("targets: [q_proj, v_proj]", r"targets is \['q_proj', 'v_proj'\]: Input should be a valid string"),
        ("rank_pattern: {q_proj: x}", r"rank_pattern\.q_proj is 'x'"),
        ("rank_pattern: 4", r"rank_pattern is 4"),
        ("sample: [[1]]", r"sample\.0 is \[1\]"),
    ],
)
def test_invalid_values(file: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(file, text)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghijklm")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(text, "(is not valid YAML|expected keys and values)") for text in (
            "- rank", "rank", "", "3", "a: [1", "a: b: c", "\t- x", "!!python/object/apply:os.getcwd []", "rank: \0",
            "a: 1\n---\nb: 2", "? [1]\n: 2", "date: 2001-02-31", "a: !!bool x", "a: !!int ''", "a: !!timestamp x",
        )],
        ("rank: 8\n" + "[" * 50_000, ":2: is not valid YAML"), ("a: " + "[" * 2000 + "]" * 2000, "is not valid YAML"),
        (LAUGHS, ":1: is used by an alias"),
        ("rank_pattern: &x {q: 4}\nalpha_pattern: *x", ":1: is used by an alias"),
        ("rank_pattern: &x {q: *x}", ":1: is used by an alias"),
        ("rank: 4\n\nlr: 1e-4\nrank: 8", ":4: duplicate key 'rank'"),
        ('{"rank": 4,\n "rank": 8}', ":2: duplicate key 'rank'"),
        ("rank_pattern:\n  q_proj: 4\n  q_proj: 8", ":3: duplicate key 'q_proj'"),
        ('{"rank_pattern": {"q": 4, "q": 8}}', ":1: duplicate key 'q'"),
        ("rank: " + "9" * 5000, ":1: has a number of 5,000 characters"), ("seed: 0x" + "f" * 5000, "has a number of 5,002 "),
        ("rank: " + "1:" * 3000 + "1", "has a number of 6,001 characters"),
        ("targets: " + "x" * 100_000, "has 100,009 characters of YAML, expected at most 100,000"),
        ("targets: " + "x" * 400_000, "is too large, expected at most 400,000 bytes"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_files_that_are_not_a_recipe(file: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=rf"recipe\.yaml(:\d+)?:? ?{message}"):
        read(file, text)


def test_a_key_in_both_spellings(file: Path) -> None:
    with pytest.raises(UsageError, match="max_length and max-length are the same key"):
        read(file, "max_length: 4\nmax-length: 5")


def test_a_file_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    file.write_bytes(b"rank: \xff")
    os.mkfifo(tmp_path / "fifo")
    for path in (file, tmp_path / "nowhere.yaml", tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(FormatError, match="is not valid YAML: 'utf-8'|cannot be read: "):
            read_recipe(path, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ia3"}, r"`method` ia3: expected one of lora, rslora, dora, full"),
        ({"quantize": "int8"}, r"`quantize` int8: expected one of none, nf4, fp4"),
        ({"init": "svd"}, r"`init` svd: expected one of kaiming, gaussian, pissa, olora, loftq"),
        ({"schedule": "step"}, r"`schedule` step: expected one of cosine, linear, constant"),
        ({"dtype": "fp8"}, r"`dtype` fp8: expected one of auto, bf16, fp16, fp32"),
        *[
            ({name: value}, f"`{name}` {value}: expected 1 or more")
            for name in ("rank", "batch_size", "grad_accum", "max_length", "max_steps", "eval_every", "save_every", "patience")
            for value in (0, -3)
        ],
        *[
            ({name: value}, f"`{name}` {value}: expected more than 0")
            for name in ("lr", "lora_plus", "epochs", "alpha")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ],
        *[
            ({name: value}, f"`{name}` {value}: expected at least 0 and less than 1")
            for name in ("dropout", "eval_share")
            for value in (1.0, -0.5, float("nan"))
        ],
        *[
            ({name: value}, f"`{name}` {value}: expected 0 or more")
            for name in ("warmup", "weight_decay", "clip")
            for value in (-1.0, float("nan"), float("inf"))
        ],
        ({"rank": 10**20}, "`rank` 100000000000000000000: expected 2,147,483,647 or less"),
        ({"seed": 2**64}, "`seed` 18446744073709551616: expected 2,147,483,647 or less"),
        ({"epochs": 1e308}, r"`epochs` 1e\+308: expected 2,147,483,647 or less"),
        ({"rank_pattern": {"q": 2**31}}, "q 2147483648: expected 2,147,483,647 or less"),
        ({"seed": -1}, "`seed` -1: expected 0 or more"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: q 0: expected 1 or more"),
        ({"alpha_pattern": {"q": 0.0}}, "alpha_pattern: q 0.0: expected more than 0"),
        ({"alpha_pattern": {"q": float("nan")}}, "alpha_pattern: q nan: expected more than 0"),
    ],
)  # fmt: skip
def test_invalid_numbers_and_choices(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[
            ({"method": "full", name: value}, f"`{name}` applies to factors, but `method='full'` trains the base itself")
            for name, value in {
                "alpha": 4.0, "layers": "0-3", "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 2.0}, "init_from": "a",
                "rank": 4, "targets": "all-linear", "init": "pissa", "dropout": 0.1, "lora_plus": 2.0,
            }.items()
        ],
        ({"method": "full", "quantize": "nf4"}, "trains the base itself, and 4-bit weights cannot be trained"),
        *[
            ({"init_from": "a", **more}, "`init_from` takes rank, targets, method and scaling from the adapter; omit those options")
            for more in ({"rank": 4}, {"alpha": 4.0}, {"targets": "x"}, {"method": "dora"}, {"init": "pissa"}, {"layers": "0"}, {"rank_pattern": {"q": 2}})
        ],
        ({"init": "loftq"}, "`init='loftq'` compensates for quantization: it needs `quantize` nf4 or fp4"),
        ({"init": "pissa", "quantize": "nf4"}, "`init='pissa'` subtracts the factors from the base, and `quantize` would round the rest again"),
        ({"init": "olora", "quantize": "fp4"}, "`init='olora'` subtracts the factors from the base"),
        ({"eval_data": "e", "eval_share": 0.1}, "`eval_data` and `eval_share` both select validation data"),
        ({"patience": 2}, "`patience` needs validation data: `eval_data` or `eval_share`"),
    ],
)  # fmt: skip
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "full", "lr": 1e-5}, {"init": "loftq", "quantize": "nf4"}, {"init": "loftq", "quantize": "fp4"},
        {"init_from": "a", "quantize": "nf4", "lr": 1e-5, "dropout": 0.1, "lora_plus": 4.0}, {"patience": 1, "eval_data": "e"},
        {"patience": 1, "eval_share": 0.2}, {"clip": 0.0, "warmup": 0.0, "seed": 0},
    ],
)  # fmt: skip
def test_valid_combinations(given: dict[str, Any]) -> None:
    recipe = Recipe(**given)
    assert all(getattr(recipe, name) == value for name, value in given.items())


def test_a_step_is_its_batches() -> None:
    assert Recipe(batch_size=3, grad_accum=5).rows_per_step == 15


def test_every_option_has_a_help_line_with_valid_choices() -> None:
    choices = {one.name: one.choices for one in parameters(Recipe)}
    abouts = [one.about.help for one in parameters(Recipe)]
    assert all(about[:1].isupper() and not about.endswith(".") for about in abouts)
    assert choices["init"] == INITS


def test_contradicting_options_are_one_plain_error() -> None:
    words = ["train", "base", "data.jsonl", "-o", "out", "--eval-data", "data.jsonl", "--eval-share", "0.5"]
    expected = "--eval-data and --eval-share both select validation data; give one of them"
    assert adapterkit(*words).message(2) == expected
