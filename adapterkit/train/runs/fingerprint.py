"""The inputs that determine the bits of a run; a checkpoint belongs to a run with the same origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import CONFIG, Checkpoint
from adapterkit.errors import FitError
from adapterkit.files.opening import sha256_of
from adapterkit.train.data.tokenize import Encoded
from adapterkit.train.recipe import Recipe, checked

FREE_TO_CHANGE = ("device", "save_every", "compile", "sample")  # when a run is resumed


@dataclass(frozen=True, slots=True)
class Origin:
    """A recipe, and the SHA-256 of its tokenized data, of the base's files and of the initial adapter's."""

    recipe: dict[str, Any]
    data: str
    held_back: str | None
    base: dict[str, str]
    first: dict[str, str]

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    @classmethod
    def of(
        cls, recipe: Recipe, data: Encoded, held_back: Encoded | None, base: Checkpoint, first: Adapter | None
    ) -> Origin:
        """The origin of a run; reads all of the base."""
        files = [base.path / CONFIG, *(shard.file for shard in base.shards)]
        return cls(
            asdict(recipe), digest(data), digest(held_back) if held_back else None, _hashes(files),
            _hashes(first.files) if first is not None else {},
        )  # fmt: skip

    def check_same(self, then: Origin) -> None:
        """Raise FitError where `then` is the origin of another run."""
        now, began = checked(self.recipe, "now"), checked(then.recipe, "then")
        for name in self.recipe.keys() - FREE_TO_CHANGE:
            value, before = getattr(now, name), getattr(began, name)
            if json.dumps(value) != json.dumps(before):  # the order of patterns matters too
                raise FitError(f"`resume=True`: {name} is {value!r}, the run began with {before!r}")
        for input, mine, theirs in (
            (now.data, self.data, then.data), (now.eval_data or now.data, self.held_back, then.held_back),
            (now.base, self.base, then.base), (now.init_from, self.first, then.first),
        ):  # fmt: skip
            if mine != theirs:
                raise FitError(f"`resume=True`: {input} has changed since the run began")


def digest(data: Encoded) -> str:
    """A SHA-256 of all tokens and of the mask of those that count."""
    total = hashlib.sha256()
    for example in data.examples:
        total.update(len(example.ids).to_bytes(8, "little"))
        total.update(example.ids.tobytes())
        total.update(example.counted.tobytes())
    return total.hexdigest()


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in files}
