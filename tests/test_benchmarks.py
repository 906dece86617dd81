"""The benchmarks run from anywhere, by path and as modules, and their imports exist."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("words", [[str(ROOT / "benchmarks" / "merge.py")], ["-m", "benchmarks.merge"]], ids=len)
def test_a_benchmark_starts_from_another_folder(words: list[str], tmp_path: Path) -> None:
    """As with an editable install, where the root is on the path."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout


def test_names_that_benchmarks_import_exist() -> None:
    """They are run by hand only, so that a missing name would be noticed late."""
    used = {
        (script.name, node.module, alias.name)
        for script in SCRIPTS
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adapterkit")
        for alias in node.names
    }
    assert len(used) > 20
    assert [(script, module, name) for script, module, name in sorted(used) if not _is_there(module, name)] == []


def _is_there(module: str, name: str) -> bool:
    return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
