"""Import optional packages on first use, with an error that says what to install.

A merge only needs torch, numpy and click.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from adapterkit.errors import MissingPackageError

# The distribution that provides a module, if its name differs; packages for training come with an extra.
INSTALLED_BY = {
    "backports": "backports.zstd", "compression": "backports.zstd", "huggingface_hub": "huggingface-hub",
    "re2": "google-re2", "textual_plot": "textual-plot", "yaml": "pyyaml",
    **dict.fromkeys(("accelerate", "psutil", "pydantic", "tokenizers", "transformers"), "'adapterkit[train]'"),
}  # fmt: skip


def needed(module: str, what: str, instead: str = "") -> Any:
    """Import `module`; raises MissingPackageError, which says that `what` needs it and what to do `instead`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(error, module, what, instead) from error


def missing(error: ImportError, module: str, what: str = "this command", instead: str = "") -> MissingPackageError:
    """Return the error to raise if `module` can't be imported."""
    package = module.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return MissingPackageError(f"{what} needs {package}, which is installed but cannot be imported: {error}")
    command = f"pip install {INSTALLED_BY.get(package, package)}"
    return MissingPackageError(f"{what} needs {package}", hint=f"{command}{instead and f', or {instead}'}")
