"""The sources of adapters: folders, the Hub cache, the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from textual.binding import Binding, BindingType
from textual.message import Message

from adapterkit.tui.widgets.plain import Tree

Kind = Literal["folder", "cache", "hub"]


@dataclass(frozen=True)
class Source:
    """A place that has adapters; `folder` is the path of a local folder."""

    kind: Kind
    folder: Path | None = None

    @property
    def label(self) -> str:
        """The name shown."""
        if self.folder is not None:
            return self.folder.name or self.folder.absolute().name
        return "Hub cache" if self.kind == "cache" else "Hub"


class Sources(Tree[Source]):
    """The tree of sources by kind."""

    DEFAULT_CSS = """
    Sources { width: 20; border: round $foreground 30%; padding: 0; }
    Sources:focus { border: round $accent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
    ]

    @dataclass
    class Picked(Message):
        """A source was picked."""

        source: Source

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__("sources", id="sources")
        self.folders = folders
        self.show_root = False
        self.guide_depth = 2

    def on_mount(self) -> None:
        self.border_title = "sources"
        local = self.root.add("local folders", expand=True)
        for folder in self.folders:
            local.add_leaf(Source("folder", folder).label, Source("folder", folder))
        for kind in ("cache", "hub"):
            self.root.add_leaf(Source(kind).label, Source(kind))
        self.root.expand()

    def on_tree_node_selected(self, event: Tree.NodeSelected[Source]) -> None:
        """Report the picked source."""
        event.stop()
        if event.node.data is not None:
            self.post_message(self.Picked(event.node.data))
