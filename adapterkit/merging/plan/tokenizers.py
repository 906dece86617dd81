"""The tokenizer of an output: the base's, or that in an adapter's folder, with new tokens or a chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from json import JSONDecoder
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.errors import UsageError
from adapterkit.files.jsonfile import MAX_CONFIG_BYTES, parse_object, read_json
from adapterkit.files.opening import CHUNK_BYTES, files_below, open_inside

if TYPE_CHECKING:
    from adapterkit.merging.plan.types import MergePlan

ADAPTER, BASE = TOKENIZERS = ("adapter", "base")
# The files of tokenizers in transformers: those that hold a vocabulary, and their settings.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "source.spm", "bpe.codes", "vocab.bpe", "dict.txt", "tokenizer.tiktoken",
)  # fmt: skip
SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "target.spm",
    "vocab-src.json", "vocab-tgt.json", "normalizer.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder
ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
SMALL = 1 << 20  # bytes; JSON files up to this size are compared by content


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer files in the folder of an adapter, and those of the base that are not in the output."""

    label: str
    folder: Path
    files: tuple[str, ...]
    replaced: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in self.files)

    def differing(self, base: Checkpoint) -> list[str]:
        """List the files that the base lacks or has with another content."""
        return [name for name in self.files if not _same_file(self.folder, base.path, name)]

    def equals(self, other: Tokenizer) -> bool:
        same = (_same_file(self.folder, other.folder, name) for name in self.files)
        return set(self.files) == set(other.files) and all(same)


def is_tokenizer_file(name: str) -> bool:
    """Return whether `name`, a path in a model's folder, is a file of its tokenizer."""
    return name in (*VOCABULARIES, *SETTINGS) or PurePath(name).parts[0] == TEMPLATES


def with_tokenizer(plan: MergePlan, wanted: str | None) -> MergePlan:
    """Choose the tokenizer of a plan's output: by default the adapter's, if its folder brings one that differs.

    Raises UsageError if adapters bring different ones or the `wanted` one does not exist, UnsafeFileError for links.
    """
    base = plan.base
    if wanted == BASE or not (base.is_directory or wanted):
        return plan
    found = [one for one in map(_tokenizer_of, plan.adapters) if one.files] if base.is_directory else []
    if wanted == ADAPTER and not found:
        where = "no adapter's folder has tokenizer files" if base.is_directory else "the output is a single file"
        raise UsageError(f"`tokenizer={ADAPTER}`: {where}", hint=f"omit `tokenizer`: the {BASE}'s is kept")
    different = [one for one in found if one.differing(base)]
    other = next((one for one in different[1:] if not one.equals(different[0])), None)
    if other is not None and wanted is None:
        raise UsageError(
            f"{different[0].label} and {other.label} bring different tokenizers",
            hint=f"`tokenizer={ADAPTER}` takes that of {found[0].label}, `tokenizer={BASE}` that of {base.name}",
        )
    chosen = found[:1] if wanted else different[:1]
    return _with_files(plan, chosen[0]) if chosen and chosen[0].differing(base) else plan


def check_tokens(plan: MergePlan) -> MergePlan:
    """Add a note if the output's tokenizer was given tokens that its embedding has no rows for."""
    folder = plan.tokenizer.folder if plan.tokenizer else plan.base.path
    if plan.vocabulary is None or not (plan.tokenizer or plan.resized):
        return plan
    tokens = max(_added_tokens(folder), default=-1) + 1
    if tokens <= plan.vocabulary:
        return plan
    label = plan.tokenizer.label if plan.tokenizer else plan.base.name
    note = (
        f"the tokenizer of {label} has {tokens} tokens, but the embedding has {plan.vocabulary} rows: the model cannot "
    )
    return replace(plan, notes=(*plan.notes, note + f"read tokens from {plan.vocabulary} on"))


def _added_tokens(folder: Path) -> Iterator[int]:
    """Yield the ids of tokens that were added to a tokenizer, which are its highest."""
    if (folder / "tokenizer.json").is_file():  # tens of megabytes, which begin with the added tokens
        with open_inside(folder, "tokenizer.json") as stream:
            text = stream.read(MAX_CONFIG_BYTES).decode(errors="replace")
        if found := ADDED.search(text):
            with suppress(ValueError, RecursionError):  # not JSON, which is for transformers to say
                added, _ = JSONDecoder().raw_decode(text, found.end())
                yield from (token["id"] for token in added if isinstance(token, dict) and type(token.get("id")) is int)
    if (folder / "added_tokens.json").is_file():
        yield from (number for number in read_json(folder / "added_tokens.json").values() if type(number) is int)
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        yield from (int(key) for key in (decoder if isinstance(decoder, dict) else ()) if key.isdecimal())


def _with_files(plan: MergePlan, chosen: Tokenizer) -> MergePlan:
    """Replace the base's tokenizer files: all of them by another vocabulary, else those of the same names."""
    whole = any(name in VOCABULARIES for name in chosen.files)
    of_base = [str(file) for file in plan.base.other_files()[0] if is_tokenizer_file(str(file))]
    replaced = tuple(name for name in of_base if whole or name in chosen.files)
    names = chosen.differing(plan.base)
    differ = "differs" if len(names) == 1 else "differ"
    note = f"the tokenizer is that of {chosen.label}, whose {', '.join(names)} {differ} from the base's"
    return replace(plan, tokenizer=replace(chosen, replaced=replaced), notes=(*plan.notes, note))


def _tokenizer_of(given: WeightedAdapter) -> Tokenizer:
    """Return the tokenizer files in an adapter's folder; beside a lone weights file, none are known to belong to it."""
    folder = given.folder
    if folder is None:
        return Tokenizer(given.label, Path(), ())
    names = [name for name in (*VOCABULARIES, *SETTINGS) if (folder / name).is_file()]
    if (folder / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{file}" for file, _ in files_below(folder / TEMPLATES)]
    for name in names:
        open_inside(folder, name).close()
    return Tokenizer(given.label, folder, tuple(names))


def _same_file(one: Path, other: Path, name: str) -> bool:
    """Return whether two folders have the same file, by its bytes, or by the content of a small JSON object."""
    if not (other / name).is_file():
        return False
    with open_inside(one, name) as left, open_inside(other, name) as right:
        pieces = left.read(SMALL), right.read(SMALL)
        if pieces[0] != pieces[1]:
            small = all(len(piece) < SMALL for piece in pieces)
            return (
                small and name.endswith(".json") and _parsed(one / name, pieces[0]) == _parsed(other / name, pieces[1])
            )
        while (piece := left.read(CHUNK_BYTES)) == (mirror := right.read(CHUNK_BYTES)) and piece:
            pass
        return piece == mirror


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
    return parse_object(file, raw, SMALL)
