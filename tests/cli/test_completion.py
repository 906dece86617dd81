"""Shell completion: by click as the scripts call it, and once by bash itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from handmade import adapterkit
from huggingface_hub import constants

import adapterkit as package
from adapterkit.cli import main as cli
from adapterkit.cli.complete import MODEL
from adapterkit.combining.methods import METHODS

ROOT = Path(package.__file__).parents[1]
HEAVY = {"torch", "numpy", "safetensors", "rich", "textual", "matplotlib", "huggingface_hub"}


def completed(*words: str) -> list[str]:
    """Return the completions of the last of `words`; `file` if the shell completes a path."""
    *args, incomplete = words
    found = BashComplete(cli.group, {}, "adapterkit", "_").get_completions(args, incomplete)
    return [one.value if one.type == "plain" else one.type for one in found]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("models--org--lora", "models--org--base--2", "datasets--org--text"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    return tmp_path


def test_commands_and_options() -> None:
    assert completed("mer") == ["merge"]
    assert completed("") == list(cli.COMMANDS)
    assert completed("merge", "--ov") == ["--overwrite"]
    assert completed("merge", "--pro") == completed("--pro") == ["--progress"]


def test_choices_and_methods() -> None:
    assert completed("merge", "--dtype", "f") == ["fp16", "fp32"]
    assert completed("combine", "--method", "") == list(METHODS)
    assert completed("list", "--progress", "j") == ["json"]
    assert completed("completion", "z") == ["zsh"]


@pytest.mark.parametrize(
    "words",
    [["merge"], ["merge", "base"], ["inspect"], ["pull"], ["verify", "m", "--adapter"], ["verify", "m", "--base"], ["eval"],
     ["train"], ["extract", "base"], ["compare"], ["convert", "a", "--initial"], ["quantize"]],
)  # fmt: skip
def test_models_are_paths_or_names_in_the_cache(cache: Path, words: list[str]) -> None:
    assert completed(*words, "or") == ["org/base--2", "org/lora"]
    (cache / "order").mkdir()
    assert completed(*words, "or") == ["file"]
    assert completed(*words, "hub/mod") == ["file"]
    assert completed(*words, "nothing") == ["file"]


@pytest.mark.parametrize("words", [["merge", "-o"], ["train", "base"], ["train", "--recipe"], ["push"], ["list"]])
def test_paths(cache: Path, words: list[str]) -> None:
    assert completed(*words, "or")[0] in ("file", "dir")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_completes(name: str) -> None:
    """Except a repository that need not exist yet."""
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None
    for param in command.params:
        if isinstance(param, click.Argument) and param.name != "repo":
            assert param.type is MODEL or isinstance(param.type, click.Path | click.Choice), param.name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    result = adapterkit("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert f"_ADAPTERKIT_COMPLETE={shell}_complete" in result.out
    assert "did you mean" in adapterkit("completion", f"{shell}x").message(2)


def test_bash_completes_with_the_script_and_imports_nothing_heavy(tmp_path: Path) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash here")
    program = tmp_path / "adapterkit"
    says = f"import sys; [sys.modules.__setitem__(name, None) for name in {sorted(HEAVY)}]"
    program.write_text(f"#!{sys.executable}\n{says}\nfrom adapterkit.__main__ import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(adapterkit("completion", "bash").out)
    asks = "compopt() { :; }; complete() { :; }; . ./script; COMP_WORDS=(adapterkit merge or); COMP_CWORD=2; "
    asks += "_adapterkit_completion ./adapterkit; echo ${COMPREPLY[@]}"
    (tmp_path / "hub" / "models--org--lora").mkdir(parents=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([bash, "-c", asks], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("org/lora\n", "")
