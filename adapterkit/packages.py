"""Packages that are imported when they are first used, and what to install where one is missing.

Nothing but torch, numpy and click is needed for a merge; whoever lacks another package is told so by its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from adapterkit.errors import MissingPackageError

# What pip installs a module by, where that is not its own name; what trains and runs models is installed together.
INSTALLED_BY = {
    "backports": "backports.zstd", "compression": "backports.zstd", "huggingface_hub": "huggingface-hub",
    "re2": "google-re2", "textual_plot": "textual-plot", "yaml": "pyyaml",
    **dict.fromkeys(("accelerate", "psutil", "pydantic", "tokenizers", "transformers"), "'adapterkit[train]'"),
}  # fmt: skip


def needed(module: str, what: str, instead: str = "") -> Any:
    """Import `module`; raises MissingPackageError, which says that `what` needs it, and what can be done `instead`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(error, module, what, instead) from error


def missing(error: ImportError, module: str, what: str = "this command", instead: str = "") -> MissingPackageError:
    """The error to raise where `module` cannot be imported."""
    package = module.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return MissingPackageError(f"{what} needs {package}, which is installed but cannot be imported: {error}")
    command = f"pip install {INSTALLED_BY.get(package, package)}"
    return MissingPackageError(f"{what} needs {package}", hint=f"{command}{instead and f', or {instead}'}")
