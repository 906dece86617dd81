"""Options of inspect and list."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from adapterkit.api.options.progress import ProgressOptions
from adapterkit.errors import UsageError
from adapterkit.options import argument, option

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyAdapter, AnyModel, AnyPaths

STRENGTH = "Adapters without a config"
HUB = "Hub"
ROWS_OF_HUB = 30


@dataclass(frozen=True)
class InspectOptions(ProgressOptions):
    """An adapter or a base inspected"""

    adapter: AnyAdapter = argument("Adapter or base model", metavar="ADAPTER|BASE")
    _: KW_ONLY
    against: AnyModel | None = option(
        None, "Check that the adapter fits BASE, and compare ‖ΔW‖ with ‖W‖", metavar="BASE"
    )
    header_only: bool = option(False, "Read headers only, no weights")
    full: bool = option(False, "Download what is on the Hub, instead of reading only its headers", group=HUB)
    alpha: float | None = option(None, "Alpha (scaling = alpha / rank)", group=STRENGTH)
    scaling: float | None = option(None, "Scaling itself", group=STRENGTH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.header_only and self.full:
            raise UsageError("`full` downloads what `header_only` does not read", hint="give one of them")


def _sorts() -> Collection[str]:
    from adapterkit.hub.adapter_listing import SORTS

    return (*SORTS, "trending")


@dataclass(frozen=True)
class ListOptions(ProgressOptions):
    """Adapters listed"""

    folders: AnyPaths = argument("Folders to search [default: the current folder]", (), metavar="[DIR]...")
    _: KW_ONLY
    base: str | None = option(None, "Only adapters for this base: its Hub id, or the last part of its path")
    search: str = option("", "Only adapters with all these words in their names or targets", metavar="WORDS")
    sort: str | None = option(None, "Sort order [default: name; on the Hub, trending]", _sorts)
    hub: bool = option(False, "List adapters on the Hub too", group=HUB)
    limit: int = option(ROWS_OF_HUB, "Maximum number of adapters on the Hub", least=1, group=HUB, metavar="N")
    details: bool = option(
        False,
        "Read the headers of adapters on the Hub too: ranks, targets, sizes. Some requests each, which the Hub counts "
        "as downloads",
        group=HUB,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from adapterkit.hub.adapter_listing import HUB_SORTS

        of_hub = {"`sort='trending'`": self.sort == "trending", "`limit`": self.limit != ROWS_OF_HUB,
                  "`details`": self.details}  # fmt: skip
        for name, given in of_hub.items():
            if given and not self.hub:
                raise UsageError(f"{name} needs `hub`", hint="say `hub=True`")
        if self.hub and self.sort is not None and self.sort not in HUB_SORTS:
            raise UsageError(f"the Hub does not sort by {self.sort}: expected one of {', '.join(HUB_SORTS)}")
