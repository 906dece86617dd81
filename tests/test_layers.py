"""The layers of the design, held by reading the imports: they go down only."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "adapterkit"

# A module may import what stands on a lower line, and its own package.
LEVELS = (
    ("words",),
    ("errors", "chance", "methods"),
    ("opening", "bounded", "tokenizer_program", "stamps", "yamlfile", "patterns", "interrupts", "renaming", "apart"),
    ("jsonfile", "writing", "hub_cache", "workspace", "outfile", "recipe"),
    ("tensorfile",),
    ("staging",),
    ("adapter", "renames"),
    ("lowrank", "dora", "rounding"),
    ("delta", "sketch"),
    ("residual", "summary", "elementwise"),
    ("fused", "factored", "coding"),
    ("checkpoint", "targets", "formats", "quant", "architectures"),
    ("tokenizing",),
    ("plan", "loading"),
    ("described",),
    ("changes", "layout"),
    ("ties",),
    ("planning", "device", "sidecar", "digest", "receipt"),
    ("wholes", "based", "undo", "limits"),
    ("blocks", "calibration", "card", "against", "inventory", "live", "combining", "resuming"),
    ("hub",),
    ("inputs",),
    (
        "finding",
        "measured",
        "desk",
        "budget",
        "newadapter",
        "comparing",
        "converting",
        "extracting",
        "verifying",
        "data",
    ),
    ("train", "removing"),
    ("outputs", "runs"),
    ("stream",),
    ("unmerging",),
    ("api",),
    ("adapters", "restoring"),
    ("plot",),
    ("tui",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = LEVEL["formats"]  # files and algebra do not know each other: they meet where merges are planned and run
ALGEBRA = (LEVEL["lowrank"], LEVEL["summary"])

CORE = {"torch", "numpy", "safetensors"}
ALLOWED = {
    "hub": {"huggingface_hub"},
    "finding": {"huggingface_hub"},
    "removing": {"huggingface_hub"},
    "cli": {"click", "rich"},
    "tui": {"textual", "rich"},
    "plot": {"matplotlib", "numpy"},
}
TORCH_AT_TOP = {  # themselves imported only where weights are read
    "against", "based", "blocks", "calibration", "combining", "comparing", "converting", "device", "extracting",
    "limits", "live", "quant.carry", "undo", "verifying", "wholes",
    *(f"train.{name}" for name in ("causal", "initial", "injection", "layers", "loop", "loss", "products")),
    *(f"runs.{name}" for name in ("memory", "models", "place", "preparing", "results", "run", "scoring")),
}  # fmt: skip
LAZY = {"torch", "rich", "textual", "matplotlib", "huggingface_hub"}  # at levels that must start fast


def part(module: str) -> str:
    """The row of the table that a dotted name inside the package belongs to."""
    return module.split(".")[0]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether it is imported when the file is."""
    tree = ast.parse(source)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.If) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = inside if node.module == "adapterkit" else [node.module]
        yield from ((name, id(node) not in lazy) for name in names)


def violations(name: str, source: str) -> list[str]:
    """What module `name` imports and may not."""
    found, own = [], part(name)
    for module, eager in imports(source):
        top, _, inner = module.partition(".")
        if top == "adapterkit" and inner:
            other = part(inner)
            level, theirs = LEVEL[own], LEVEL.get(other, LEVEL["errors"])
            crossed = level == FILES and theirs in ALGEBRA
            if other != own and (theirs >= level or crossed):
                found.append(f"{name} imports {inner}")
        elif top in CORE | LAZY | {"click"} and top not in CORE | ALLOWED.get(own, set()):
            found.append(f"{name} imports {top}")
        if (
            top in LAZY - ALLOWED.get(own if own == "tui" else "", set())
            and eager
            and (LEVEL[own] >= LEVEL["plan"] or own in ("formats", "quant", "tensorfile", "adapter"))
        ):
            found.append(f"{name} imports {top} at its top")
    return found


MODULES = {
    str(file.relative_to(PACKAGE).with_suffix("")).replace("/", "."): file for file in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    assert part(name) in LEVEL, f"{name} is new: give it its place in LEVELS"
    allowed = {f"{module} imports torch at its top" for module in TORCH_AT_TOP}
    assert set(violations(name, MODULES[name].read_text())) - allowed == set()


@pytest.mark.parametrize("name", [name for name in MODULES if LEVEL[part(name)] < LEVEL["plot"]])
def test_only_the_top_prints(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from adapterkit.adapter import Adapter"),
        ("targets", "import adapterkit.lowrank"),
        ("targets", "from adapterkit.checkpoint import Checkpoint"),
        ("delta", "from adapterkit import stream"),
        ("plan", "def f():\n    from adapterkit.cli import main"),
        ("stream", "import rich"),
        ("cli.inspect", "import torch"),
    ],
)
def test_the_check_sees_violations(name: str, source: str) -> None:
    assert violations(name, source)


def test_the_gpu_check_names_every_wheel_that_it_needs() -> None:
    """All that the package imports as it is imported, but for the app."""
    script = (PACKAGE.parent / "benchmarks" / "gpu_check.sh").read_text()
    [needed] = re.findall(r'needed = "(.*)"', script)
    imported = set()
    for file in (file for file in PACKAGE.rglob("*.py") if "tui" not in file.parts):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names - {"adapterkit", "backports"} - set(needed.split()) == set()
