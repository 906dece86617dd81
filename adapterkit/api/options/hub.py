"""Options of pull and push."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from adapterkit.api.options.progress import ProgressOptions
from adapterkit.options import Options, argument, option, output

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyNames, AnyPath

REPOSITORY = "Repository"
CARD = "Model card"


@dataclass(frozen=True)
class PullOptions(Options):
    """Models and adapters downloaded"""

    ids: AnyNames = argument("Hub ids: org/name, org/name@revision or org/name:folder", metavar="ID...", label="Hub id")
    out: AnyPath | None = output(None, "Copy it from the Hub cache to this new directory", label="copy to")


@dataclass(frozen=True)
class PullCall(ProgressOptions, PullOptions):
    """Models and adapters downloaded, with a bar"""


@dataclass(frozen=True)
class PushOptions(Options):
    """An adapter or a model uploaded"""

    path: AnyPath = argument("Directory of the adapter or model", label="folder")
    repo: str = argument("Repository on the Hub: ORG/NAME, or NAME for one of your own", label="repository")
    _: KW_ONLY
    base_id: str | None = option(
        None, "Hub id of the base, if the adapter names a local path", metavar="ORG/NAME", group=CARD,
        label="base on the Hub",
    )  # fmt: skip
    license: str | None = option(None, "License for the card, such as apache-2.0", group=CARD)
    message: str | None = option(None, "Commit message", group=REPOSITORY)
    private: bool = option(False, "Make the repository private, if it is new", group=REPOSITORY)
    pr: bool = option(
        False, "Open a pull request instead of changing the main branch", group=REPOSITORY, label="as a pull request"
    )


@dataclass(frozen=True)
class PushCall(ProgressOptions, PushOptions):
    """An adapter or a model uploaded, with a bar"""
