"""Missing packages: commands that don't need one work without it, and others say what to install."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from handmade import CONFIG, adapterkit, write_adapter, write_base

from adapterkit import __version__ as version
from adapterkit.adapter.safe_regex import compile_pattern
from adapterkit.cli.main import COMMANDS as ALL_COMMANDS
from adapterkit.errors import AdapterkitError, MissingPackageError
from adapterkit.packages import needed

ROOT = Path(__file__).parents[1]


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package and all of its modules unavailable."""
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


def test_the_default_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert {"bitsandbytes", "textual", "textual-plot", "matplotlib", "pyyaml", "huggingface-hub"} <= names
    [marked] = [line for line in project["dependencies"] if line.startswith("bitsandbytes")]
    assert marked.endswith("sys_platform != 'darwin'")


@pytest.mark.slow
def test_a_wheel_is_installed_and_shows_its_help(tmp_path: Path) -> None:
    """It contains the package only, whose help needs only click. `make wheel` runs this."""
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("adapterkit-*.whl")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (file for file in (ROOT / "adapterkit").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert names == {str(file.relative_to(ROOT)) for file in files} and "adapterkit/py.typed" in names
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv" / "bin"
    subprocess.run([bin_ / "python", *pip, "install", "--no-deps", wheel, "click"], check=True)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in ((), *((name,) for name in ALL_COMMANDS)):
        run = [bin_ / "adapterkit", *command, "--help"]
        shown = subprocess.run(run, cwd=tmp_path, env=plain, capture_output=True, text=True)
        assert shown.returncode == 0 and "Usage: adapterkit" in shown.stdout, shown
    code = "import adapterkit; print(adapterkit.__file__, adapterkit.__version__)"
    said = subprocess.run([bin_ / "python", "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True).stdout
    assert said.startswith(str(tmp_path)) and said.split()[-1] == version
