"""The recorded results of the matrix, and the page made from them."""

import json
from importlib.metadata import version

import pytest

from . import page
from .models import registry
from .recipes import RECIPES

RECORDED = json.loads(page.RESULTS.read_text(encoding="utf-8"))


def test_the_results_have_every_architecture_and_recipe() -> None:
    """Of the release of transformers with which they were made; `make matrix` records those of another."""
    if version("transformers") != RECORDED["versions"]["transformers"]:
        pytest.skip(f"the results are of transformers {RECORDED['versions']['transformers']}: run `make matrix`")
    assert list(dict.fromkeys((line["task"], line["type"]) for line in RECORDED["models"])) == list(registry())
    first = {(line["task"], line["type"]): line["verdicts"] for line in reversed(RECORDED["models"])}
    for (task, name), verdicts in first.items():
        assert list(verdicts) == [of for of, recipe in RECIPES.items() if task in recipe.tasks], name


def test_no_result_is_wrong() -> None:
    """What cannot be merged is refused."""
    allowed = ("ok", "none", "refused", "peft")
    verdicts = [
        (line["type"], recipe, verdict) for line in RECORDED["models"] for recipe, verdict in line["verdicts"].items()
    ]
    assert [one for one in verdicts if one[2].split(":")[0] not in allowed] == [] and len(verdicts) > 4000


def test_the_page_shows_the_results() -> None:
    assert page.page(RECORDED["models"], RECORDED["versions"]) == page.PAGE.read_text(encoding="utf-8")
