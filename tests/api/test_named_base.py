"""A merge without a base goes into the one that the adapters name, in Python, on the command line and in the app."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import CONFIG, adapterkit, contents, write_adapter, write_base
from hubserver import Hub

import adapterkit as kit
from adapterkit.errors import MissingFileError, UsageError
from adapterkit.tui.actions import ACTIONS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter that names `base`."""

    def write(base: object, name: str = "adapter", **config: object) -> Path:
        named = CONFIG | {"base_model_name_or_path": None if base is None else str(base)} | config
        return write_adapter(tmp_path / name, config=named)

    return write


def same(left: Path, right: Path) -> bool:
    """Whether two outputs have the same weights."""
    names = sorted(file.name for file in left.glob("*.safetensors"))
    return bool(names) and all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_python_the_command_and_the_form_take_the_base_from_the_config(
    base: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = make(base), tmp_path / "by hand"
    kit.merge(base, (adapter, 0.5), out)
    kit.merge(adapters=(adapter, 0.5), out=tmp_path / "a")
    kit.merge(None, [(adapter, 0.25), (kit.load(adapter), 0.25)], tmp_path / "two")
    result = adapterkit("merge", f"{adapter}:0.5", "-o", tmp_path / "b")
    assert (result.code, result.err.splitlines()[0]) == (0, f"note: base: {base}, named by {adapter}")
    argv = ACTIONS["merge"].argv({"base": "", "adapters": f"{adapter}:0.5", "-o": str(tmp_path / "c")})
    assert ACTIONS["merge"].missing({"adapters": "", "-o": "out"}) == ["adapters"]
    assert adapterkit(*argv).code == 0
    assert all(same(out, tmp_path / name) for name in ("a", "b", "c", "two"))
    kit.merge(str(adapter), out=tmp_path / "whole")
    assert not same(out, tmp_path / "whole")


def test_the_default_output_is_in_the_current_folder(
    base: Path, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked to write beside a base that a stranger's config names."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    assert adapterkit("merge", make(base), "--dry-run").code == 0
    assert kit.plan_merge(str(make(base, "again"))).out == Path("base-merged")
    assert not contents(here)


def test_a_base_on_the_hub_at_the_revision_in_the_config(
    hub: Hub, base: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    hub.add("org/base", {name: data for name, data in contents(base).items() if data is not None})
    adapter = make("org/base", revision="main")
    result = adapterkit("merge", adapter, "-o", tmp_path / "out")
    assert (result.code, result.err.splitlines()[0]) == (0, f"note: base: org/base@main, named by {adapter}")
    hub.add("org/adapter", {name: data for name, data in contents(adapter).items() if data is not None})
    assert adapterkit("merge", "org/adapter", "-o", tmp_path / "again").code == 0  # from the cache
    kit.merge(base, adapter, tmp_path / "by hand")
    assert same(tmp_path / "out", tmp_path / "by hand") and same(tmp_path / "again", tmp_path / "by hand")


def test_adapters_that_name_no_base_or_several(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nameless: names no base model; give the base before the adapters"):
        kit.plan_merge(make(None, "nameless"))
    with pytest.raises(MissingFileError, match="lost: names the base .*gone, which does not exist here; give the base"):
        kit.plan_merge(make(tmp_path / "gone", "lost"))
    with pytest.raises(MissingFileError, match="names the base gpt2, which does not exist here"):
        kit.plan_merge(make("gpt2", "legacy"))
    with pytest.raises(UsageError, match=r"the adapters name different bases: .*base \(.*one\), org/x \(.*two\)"):
        kit.plan_merge(None, [make(base, "one"), make("org/x", "two")])
    with pytest.raises(UsageError, match="no adapter given"):
        kit.plan_merge(None, [])
    with pytest.raises(UsageError, match="base: is a model, expected an adapter; give an adapter after it"):
        kit.plan_merge(base)


@pytest.mark.parametrize("pickled", [False, True])
def test_swapped_arguments_are_recognized(base: Path, make: Callable[..., Path], tmp_path: Path, pickled: bool) -> None:
    adapter = make(None)
    if pickled:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    message = adapterkit("merge", adapter, base, "-o", tmp_path / "out").message(2)
    assert message == f"{adapter}: is an adapter, expected a model; {base} is a model: swap the two"
    message = adapterkit("merge", adapter, make(None, "other"), "-o", tmp_path / "out").message(2)
    assert message.endswith("is an adapter, expected a model; give the base first, then the adapters")
    message = adapterkit("inspect", base, "--against", adapter).message(2)
    assert message.endswith(f"is a base model, and --against is about adapters; {adapter} is an adapter: swap the two")
    if not pickled:
        assert f"{adapter}: is an adapter" in adapterkit("inspect", adapter, "--against", adapter).message(2)


def test_a_quantized_base_hints_at_its_original(base: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    assert adapterkit("quantize", base, "--to", "nf4", "-o", tmp_path / "nf4").code == 0
    adapter = make(tmp_path / "nf4")
    hint = "note: --original BASE16 merges into the 16-bit model that the base was made from"
    assert hint in adapterkit("merge", adapter, "--dry-run").err
    assert hint not in adapterkit("merge", adapter, "--original", base, "--dry-run").err
    loftq = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": "loftq"}
    (adapter / "adapter_config.json").write_text(json.dumps(loftq))
    result = adapterkit("merge", adapter, "--dry-run")
    assert result.code == 0 and hint not in result.err
