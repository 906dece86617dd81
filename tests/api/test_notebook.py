"""Display in notebooks: adapters as mappings, results in one line and in several, and untrusted text escaped."""

from __future__ import annotations

import doctest
import inspect
import pickle
import pydoc
import re
import rlcompleter
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import CONFIG, MODULES, RANK, factors, write_adapter, write_base
from hostile import FOLDER, HOSTILE, steering, write_hostile_adapter, write_hostile_base

import adapterkit
from adapterkit import errors
from adapterkit.api.evaluate import Evaluated
from adapterkit.errors import ChangedError
from adapterkit.files.safetensors import TensorInfo
from adapterkit.hub.adapter_listing import describe
from adapterkit.hub.download import Download
from adapterkit.hub.names import HubId
from adapterkit.hub.pull import PullPlan
from adapterkit.hub.remote import Remote, RemoteFile
from adapterkit.hub.upload.prepare import PreparedFolder
from adapterkit.hub.upload.push import PushPlan
from adapterkit.reprs import Displayed
from adapterkit.train.data.tokenize import Encoded
from adapterkit.train.evaluate_options import EvaluateOptions
from adapterkit.train.runs.answer_scores import Prediction
from adapterkit.train.runs.evaluate import Likelihood, Scored, Started


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every read of a tensor fail."""

    def read(info: TensorInfo) -> None:
        raise AssertionError(f"{info.name} is read")

    monkeypatch.setattr(TensorInfo, "read_bytes", read)


# --- an adapter is a mapping -----------------------------------------------------------------------------------------


def test_an_adapter_maps_names_to_weights(tmp_path: Path) -> None:
    adapter = adapterkit.load(write_adapter(tmp_path / "one"))
    assert isinstance(adapter, Mapping) and len(adapter) == len(MODULES) and set(adapter) == set(MODULES)
    expected = factors()
    for name, weights in adapter.items():
        assert torch.equal(weights.A, expected[f"base_model.model.{name}.lora_A.weight"])
    assert adapter.get("q_proj") is None
    with pytest.raises(KeyError, match="q_proj"):
        adapter["q_proj"]
    again = adapterkit.load(tmp_path / "one")
    assert adapter == again == pickle.loads(pickle.dumps(adapter)) and adapter != replace(again, task="SEQ_CLS")


def test_properties_of_an_adapter_come_from_its_headers(tmp_path: Path, unread: None) -> None:
    adapter = adapterkit.load(write_adapter(tmp_path / "one"))
    assert MODULES[0] in adapter and "q_proj" not in adapter and 3 not in adapter and list(adapter.keys())
    assert (adapter.rank, adapter.alpha, adapter.targets) == (RANK, 6, ("o_proj", "q_proj"))
    assert adapter.num_parameters == sum(tensor.numel() for tensor in factors().values())
    pattern = CONFIG | {"alpha_pattern": {"q_proj": 3}}
    assert adapterkit.load(write_adapter(tmp_path / "two", config=pattern)).alpha is None
    wide = factors()
    first = f"base_model.model.{MODULES[0]}.lora_{{}}.weight"
    wide |= {first.format("A"): torch.ones(1, 32), first.format("B"): torch.ones(48, 1)}
    mixed = adapterkit.load(write_adapter(tmp_path / "three", wide, CONFIG | {"rank_pattern": {MODULES[0]: 1}}))
    assert mixed.rank is None and mixed.summary().ranks == (1, RANK)
    assert adapterkit.load(write_adapter(tmp_path / "four", config=None), scaling=2.0).alpha is None


def test_an_adapter_without_modules(tmp_path: Path) -> None:
    """A mapping without items is false, but still an adapter whose files are watched."""
    base = write_base(tmp_path / "base")
    name = "model.layers.0.norm.weight"
    whole = write_adapter(tmp_path / "whole", {f"base_model.model.{name}": torch.ones(32)},
                          CONFIG | {"modules_to_save": ["norm"]})  # fmt: skip
    adapter = adapterkit.load(whole)
    assert not adapter and adapter.rank is None and "no modules" in repr(adapter)
    adapterkit.merge(base, adapter, tmp_path / "merged")
    plan = adapterkit.plan_merge(base, adapter, tmp_path / "again")
    (whole / "adapter_model.safetensors").touch()
    write_adapter(tmp_path / "other", {f"base_model.model.{name}": torch.zeros(32)})
    (whole / "adapter_model.safetensors").write_bytes((tmp_path / "other/adapter_model.safetensors").read_bytes())
    with pytest.raises(ChangedError):
        list(adapterkit.run(plan))


# --- the package -----------------------------------------------------------------------------------------------------


def test_dir_and_completion_list_the_public_names() -> None:
    listed = dir(adapterkit)
    assert set(adapterkit.__all__) <= set(listed) and listed == sorted(listed)
    assert {"Adapter", "load", "merge", "plan_merge", "run", "unmerge"} <= set(listed)
    for name in adapterkit.__all__:
        assert rlcompleter.Completer({"adapterkit": adapterkit}).attr_matches(f"adapterkit.{name}"), name
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        adapterkit.mergee  # noqa: B018


def test_the_examples_of_the_package_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), write_adapter(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(adapterkit, optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST) == (0, 11)


@pytest.mark.parametrize("name", adapterkit.__all__)
def test_help_is_complete(name: str) -> None:
    """A sentence; for calls every argument, what it returns or yields, and what it raises."""
    if name.startswith("__"):
        return
    thing = getattr(adapterkit, name)
    text = inspect.getdoc(thing) or ""
    assert re.match(r"[A-Z`].*?[.:](\s|$)", text, re.DOTALL), text
    if not inspect.isfunction(thing):
        return
    signature = inspect.signature(thing)
    sections = dict(re.findall(r"\n\n(\w+):\n(.*?)(?=\n\n|$)", text, re.DOTALL))
    described = re.findall(r"^    (\w+): \S", sections["Args"], re.MULTILINE)
    assert described == list(signature.parameters), name
    returns_nothing = signature.return_annotation in (None, "None")
    assert returns_nothing is not bool(sections.keys() & {"Returns", "Yields"}), name
    for kinds in re.findall(r"^    ([\w, ]+): \S", sections["Raises"], re.MULTILINE):
        assert all(issubclass(getattr(errors, kind), errors.AdapterkitError) for kind in kinds.split(", ")), kinds
    assert "--" not in text and "Args" in pydoc.render_doc(thing)


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each displayable result, with hostile strings everywhere."""
    folder = tmp_path_factory.mktemp("shown") / FOLDER
    base, one, two = write_hostile_base(folder / "base"), write_hostile_adapter(folder / "one"), folder / "two"
    write_hostile_adapter(two, alpha=3)
    adapter = adapterkit.load(one)
    plan = adapterkit.plan_merge(base, [one], folder / "merged")
    *_, merged = adapterkit.run(plan)
    adapterkit.merge(folder / "merged", two, folder / "twice")
    combined = adapterkit.plan_combine([one, two], folder / "sum")
    *_, made = adapterkit.run(combined)
    [pair] = adapterkit.compare([one, two])
    name = next(iter(adapter))
    started = Started(Encoded((), ()), 1, 3, HOSTILE, HOSTILE, True)
    scored = Scored(Likelihood((1.0,), (2,), (1,)), (Prediction(HOSTILE, "a", "b", "c", False, 0.5, None),))
    file = RemoteFile(HOSTILE, 9, None)
    download = Download(Remote(HubId(HOSTILE), "0" * 40, (file,), True), (file,), folder, 9)
    found = [
        adapter, adapter.summary(), adapter.modules[name], adapter[name], adapter.modules[name].A, plan, plan.base,
        plan.files[0], plan.base.shards[0], merged, combined, made, pair, pair.modules[0],
        adapterkit.plan_unmerge(folder / "twice", folder / "back", every=True, adapters=[one, two]),
        *list(adapterkit.verify(folder / "merged", base, one))[-1:],
        adapterkit.inspect(one, against=base), adapterkit.inspect(base), describe(one), PullPlan((download,)),
        Evaluated(EvaluateOptions(HOSTILE, HOSTILE, HOSTILE), started, scored, 1.0),
        PushPlan(HOSTILE, PreparedFolder((), {HOSTILE: HOSTILE}, HOSTILE, HOSTILE), True, True, None, (), (HOSTILE,)),
    ]  # fmt: skip
    return {type(one).__name__: one for one in found}


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_displays_escape_untrusted_text(shown: dict[str, Any], unread: None) -> None:
    classes = {one.__name__ for one in Displayed.__subclasses__() if one.__module__.startswith("adapterkit.")}
    assert classes == set(shown), "what shows itself and is not tried here: add one to `shown`"
    for name, one in shown.items():
        line, page = repr(one), Tags(one._repr_html_())
        assert line.startswith(f"<{name}: ") and line.endswith(">") and "\n" not in line and len(line) < 1000, name
        assert page.tags == ["pre"] and page.text == str(one), name
        assert not steering(line) | steering(str(one)) | steering(one._repr_html_()), name
        assert not any(text.startswith("FORGED") for text in str(one).split("\n")), name


def test_the_display_of_an_adapter_is_short(tmp_path: Path, unread: None) -> None:
    config = CONFIG | {"base_model_name_or_path": "lab/base"}
    adapter = adapterkit.load(write_adapter(tmp_path / "one", config=config))
    assert repr(adapter) == "<Adapter: LoRA, rank 4, 4 modules, 1,280 parameters, for lab/base>"
    weights = adapter.modules[MODULES[0]]
    assert repr(weights) == "<LoraWeights: rank 4, scaling 1.5, alpha 6; A (4, 32) F32; B (48, 4) F32>"
    assert str(adapter) == str(adapter.summary())
    assert str(adapter).splitlines()[2:5] == ["rank        4", "alpha       6", "scaling     1.5"]
