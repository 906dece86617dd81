"""The layers of the design, checked by the imports: modules import only from lower layers."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent

# Packages import only from those to their left; those in the same braces don't import each other.
ORDER = """
text < {errors reprs} < {packages options} < files < adapter < algebra < base < inspection < hub < kernels
< {merging combining train} < api < tui < cli < __main__
"""
INNER = {
    "base": "{architectures checkpoint names_of_multimodal_models names_of_text_models quant rename_option target} < checkpoint_names < {expert_modules parameters} < vocabulary < {models targets tied_embeddings} < {adapter_fit row_reader} < fingerprint",
    "hub": "{client events names} < {remote upload} < download < {locate pull} < adapter_listing < local_removal",
    "merging": "{plan run_options} < {blocks calibration receipts} < {companions live verdict} < {run verify} < unmerge",
    "combining": "{method orientation plan} < {elementwise whole_tensors} < methods < checks < batches < combine < {compare convert extract factor_saved write} < initial_factors",
    "train": "{products recipe} < {data evaluate_options initial loss} < {causal_lm layers} < {injection loop} < runs",
    "cli": "{data_notes option_names options signals} < output < {complete failures next_commands progress} < {command recipe run_plan views} < {main commands}",
}

# Only these packages may import these libraries, and only the modules in EAGER import them at the top.
LIBRARIES = {
    "click": {"cli"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"cli"},
    "rich": {"cli", "tui"},
    "textual": {"tui"},
    "tqdm": {"api"},
    "transformers": {"base", "train"},
}
EAGER = {
    "click": r"cli\.(main|command|complete|failures|option_names|options|recipe|commands\..*)",
    "rich": r"tui\..*",
    "textual": r"tui\..*",
    # Imported at the top only by modules that compute with weights.
    "torch": r"""(?x) algebra\..* | kernels\..* | base\.quant\.compensated | inspection\.match
        | combining\.(batches | compare | elementwise)
        | merging\.(blocks\..* | calibration | live\..* | verdict | verify)
        | train\.(causal_lm | initial | injection | layers | loop | loss | products)
        | train\.runs\.(distributed | evaluate | export | load_model | memory | prepare_model | run)""",
}


def ranks(order: str) -> dict[str, int]:
    """Return the position of every name in an order."""
    return {name: rank for rank, names in enumerate(order.split("<")) for name in names.strip(" {}\n").split()}


RANKS = ranks(ORDER)
INNER_RANKS = {package: ranks(order) for package, order in INNER.items()}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield every imported module, and whether it is imported with the file."""
    tree = ast.parse(source)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.If) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) not in lazy) for name in names)


def violations(name: str, source: str) -> list[str]:
    """Return the forbidden imports of module `name`."""
    found, (own, _, inner) = [], name.partition(".")
    for module, eager in imports(source):
        top, *path = module.split(".")
        if top == "adapterkit" and path and path[0] in RANKS:
            order = INNER_RANKS.get(own, {})
            here, there = order.get(inner.split(".")[0]), order.get(path[1]) if len(path) > 1 else None
            within = path[0] == own
            inside = within and here is not None and there is not None
            if (not within and RANKS[path[0]] >= RANKS[own]) or (
                inside and inner.split(".")[0] != path[1] and there >= here
            ):
                found.append(f"{name} imports {'.'.join(path)}")
        elif top in LIBRARIES and own not in LIBRARIES[top]:
            found.append(f"{name} imports {top}")
        elif eager and top in EAGER.keys() | LIBRARIES.keys() and not re.fullmatch(EAGER.get(top, ""), name):
            found.append(f"{name} imports {top} at its top")
    return found


MODULES = {
    str(file.relative_to(PACKAGE).with_suffix("")).replace("/", "."): file for file in sorted(PACKAGE.rglob("*.py"))
}
MODULES.pop("__init__")


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_from_lower_layers_only(name: str) -> None:
    own, _, inner = name.partition(".")
    assert own in RANKS, f"{own} is new: give it its place in ORDER"
    if own in INNER and inner != "__init__":
        assert inner.split(".")[0] in INNER_RANKS[own], f"{name} is new: give it its place in INNER"
    assert violations(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(("tui.", "cli."))])
def test_only_the_top_prints(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from adapterkit.adapter import Adapter"),
        ("adapter.weights", "import adapterkit.algebra.lowrank"),
        ("algebra.lowrank", "from adapterkit import base"),
        ("base.targets", "from adapterkit.base.adapter_fit import place_adapter"),
        ("base.targets", "from adapterkit.base import adapter_fit"),
        ("merging.run.budget", "from adapterkit.combining import combine"),
        ("merging.plan.types", "def f():\n    from adapterkit.cli import main"),
        ("merging.plan.types", "from adapterkit.merging.run.budget import check_loss"),
        ("merging.run.run", "import rich"),
        ("cli.commands.inspect", "import torch"),
        ("hub.remote", "import huggingface_hub"),
    ],
)
def test_the_check_sees_violations(name: str, source: str) -> None:
    assert violations(name, source)


def test_no_package_is_named_like_a_public_function() -> None:
    """`import adapterkit.merge` would replace the function."""
    assert not set(adapterkit.__all__) & {name.partition(".")[0] for name in MODULES}


def test_the_gpu_check_names_every_wheel_that_it_needs() -> None:
    """All packages imported with the package, except for the app."""
    script = (PACKAGE.parent / "benchmarks" / "gpu_check.sh").read_text()
    [needed] = re.findall(r'needed = "(.*)"', script)
    imported = set()
    for file in (file for file in PACKAGE.rglob("*.py") if "tui" not in file.parts):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names - {"adapterkit", "backports"} - set(needed.split()) == set()
