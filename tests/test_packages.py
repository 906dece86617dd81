"""Packages that are missing: what does without them works, and what needs one says what to install."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from handmade import CONFIG, adapterkit, write_adapter, write_base

from adapterkit.adapter.patterns import compile_pattern
from adapterkit.errors import AdapterkitError, MissingPackageError
from adapterkit.packages import needed

ROOT = Path(__file__).parents[1]


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have a package and all of its modules be missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_base(folder / "base"), write_adapter(folder / "adapter")
    write_adapter(folder / "pattern", config=CONFIG | {"rank_pattern": {"layers.[01].*": 4}})
    (folder / "data.jsonl").write_text(json.dumps({"text": "w1 w2"}) + "\n")
    (folder / "recipe.yaml").write_text("rank: 4")
    return folder


COMMANDS = {
    "bitsandbytes": ([], "", ""),
    "huggingface_hub": (["pull", "org/name"], "needs huggingface_hub", "pip install huggingface-hub"),
    "matplotlib": (["inspect", "adapter", "--plot", "plot.png"], "drawing needs matplotlib", "pip install matplotlib"),
    "psutil": ([], "", ""),
    "pydantic": (["train", "base", "data.jsonl", "--memory"], "needs pydantic", "pip install 'adapterkit[train]'"),
    "re2": (["inspect", "pattern"], "an adapter whose config has a pattern needs re2", "pip install google-re2"),
    "textual": (["tui"], "the app needs textual", "pip install textual"),
    "textual_plot": (["tui"], "the app needs textual_plot", "pip install textual-plot"),
    "transformers": (["eval", "base", "data.jsonl"], "running a model needs transformers", "pip install 'adapterkit[train]'"),
    "yaml": (["train", "--recipe", "recipe.yaml"], "recipe.yaml: YAML needs yaml", "pip install pyyaml"),
}  # fmt: skip


@pytest.mark.parametrize("package", COMMANDS)
def test_a_missing_package(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    hide(monkeypatch, package)
    compile_pattern.cache_clear()
    monkeypatch.chdir(inputs)
    assert adapterkit("merge", "base", "adapter", "-o", tmp_path / "out").code == 0
    assert adapterkit("unmerge", tmp_path / "out", "-o", tmp_path / "again", "--adapter", "adapter").code == 0
    assert adapterkit("inspect", "adapter", "--against", "base").code == 0
    command, message, hint = COMMANDS[package]
    if command:
        ended = adapterkit(*command)
        assert ended.code == 1 and message in ended.err and hint in ended.err, ended
        assert len(ended.err.splitlines()) == 2


def test_an_error_of_ours_and_an_import_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        ImportError, match="it needs no_such_package; pip install no_such_package, or do without"
    ) as raised:
        needed("no_such_package.module", "it", "do without")
    assert isinstance(raised.value, AdapterkitError) and isinstance(raised.value, MissingPackageError)
    (tmp_path / "broken_package.py").write_text("raise ImportError('libcudart.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(
        MissingPackageError, match=r"it needs broken_package, which is installed but .* libcudart.so.11"
    ):
        needed("broken_package", "it")


def test_what_is_installed_by_default() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert {"bitsandbytes", "textual", "textual-plot", "matplotlib", "pyyaml", "huggingface-hub"} <= names
    [marked] = [line for line in project["dependencies"] if line.startswith("bitsandbytes")]
    assert marked.endswith("sys_platform != 'darwin'")


@pytest.mark.slow
def test_a_wheel_is_installed_and_shows_its_help(tmp_path: Path) -> None:
    """Without what it depends on: click is enough to show help. `make wheel` does this."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("adapterkit-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, *pip[1:], "install", "--no-deps", wheel], check=True)
    subprocess.run([python, *pip[1:], "install", "click"], check=True)
    files = subprocess.run([python, *pip[1:], "show", "-f", "adapterkit"], check=True, capture_output=True, text=True)
    assert "adapterkit/py.typed" in files.stdout and "tests/" not in files.stdout
    from adapterkit.cli.main import COMMANDS as commands

    script = tmp_path / "venv" / "bin" / "adapterkit"
    for command in ((), *((name,) for name in commands)):
        shown = subprocess.run([script, *command, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert shown.returncode == 0 and "Usage: adapterkit" in shown.stdout, shown
