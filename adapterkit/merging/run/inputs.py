"""The input files of a run, which must not change between planning and its end."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from adapterkit.errors import ChangedError
from adapterkit.files.stamps import check_unchanged, restamp_linked, stamps_of
from adapterkit.merging.companions import companions_of
from adapterkit.merging.plan.types import FilePlan, MergePlan


class Inputs:
    """The inputs of a plan with the base's companions, or only those of one `file`."""

    def __init__(self, plan: MergePlan, file: FilePlan | None = None, linked: Collection[Path] = ()) -> None:
        """Raise ChangedError if an input has changed since the plan was made, except by hard links to `linked`."""
        self._plan = plan if file is None else None
        if file is None:
            self.stamps = {**stamps_of(companions_of(plan)), **plan.stamps}
        else:
            others = {shard.file for shard in plan.base.shards} - {file.source}
            self.stamps = {path: stamp for path, stamp in plan.stamps.items() if path not in others}
        self.link(linked)
        self.check()

    def link(self, files: Collection[Path]) -> None:
        """Accept the status change of files that got a hard link. Raises ChangedError for any other change."""
        self.stamps = restamp_linked(self.stamps, files)

    def check(self) -> None:
        """Raise ChangedError if a file has changed, or a companion was added."""
        for file in companions_of(self._plan) if self._plan is not None else ():
            if file not in self.stamps:
                raise ChangedError(
                    f"{file}: appeared after the run began. Try again when no other program writes there."
                )
        check_unchanged(self.stamps)
