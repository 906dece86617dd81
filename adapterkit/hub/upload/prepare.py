"""Prepare a folder for upload: select its files, complete its card, remove local paths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.formats import load
from adapterkit.adapter.formats import table as formats
from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, is_base, open_checkpoint
from adapterkit.errors import AdapterkitError, FitError, FormatError, UnsafeFileError, UsageError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import read_whole
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo, read_header
from adapterkit.files.staging import ADAPTER_RECORD, MERGE_RECORD, RECEIPT_FOLDER, TRAINING_RECORD
from adapterkit.files.stamps import Stamp, stamps_of
from adapterkit.hub.names import public_name
from adapterkit.hub.upload import card
from adapterkit.hub.upload.redaction import LOCAL_PATH, check_public, strip_folders
from adapterkit.hub.upload.selection import select_files, skip_by_content
from adapterkit.text import argument, command, counted

if TYPE_CHECKING:
    from adapterkit.adapter.summary import Summary
    from adapterkit.adapter.weights import Adapter

README = "README.md"
RECIPE = "adapterkit_recipe.yaml"
TRAINING_FILES = (TRAINING_RECORD, RECIPE)  # adapterkit's own, with relative paths in them
OWN_FILES = (MERGE_RECORD, ADAPTER_RECORD, *TRAINING_FILES)
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
ALWAYS_TEXT = (README, CONFIG, *OWN_FILES)  # as are adapters' configs
TEXT_BYTES = 1 << 20  # larger files count as data
MAX_TEXT_BYTES = 50 << 20


@dataclass(frozen=True)
class UploadFile:
    """A file to upload, from the disk or with other `content`; `change` describes the difference."""

    name: str
    source: Path | None
    content: bytes | None = None
    change: str = ""
    stamp: Stamp | None = None  # of the source when it was checked

    @property
    def size(self) -> int:
        """Bytes."""
        if self.content is not None:
            return len(self.content)
        assert self.source is not None
        return self.source.stat().st_size


@dataclass(frozen=True)
class PreparedFolder:
    """The files of a folder to upload, and those to skip with the reason."""

    files: tuple[UploadFile, ...]
    skipped: dict[str, str]
    base: str | None
    description: str  # one line, such as "lora: LoRA, rank 8, 1,024 parameters, for org/base"


def prepare(path: Path, repo: str, base_id: str | None = None, license: str | None = None) -> PreparedFolder:
    """Prepare `path`, the folder of an adapter or a model, for upload to `repo`.

    Raises FormatError and FitError if it does not load or is not finite, UsageError if its base is not a Hub id, and
    UnsafeFileError for local paths, secrets, archives that cannot be scanned, and links out of the folder.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: expected the folder of an adapter or a model")
    if base_id is not None and public_name(base_id) is None:
        raise UsageError(f"`base_id={base_id}`: expected ORG/NAME on the Hub")
    found, skipped = select_files(path)
    stamps = {name: _stamp(file) for name, file in found.items()}
    adapter = None if is_base(path) else load(path)
    named = _named_base(path, adapter)
    base = base_id or public_name(named)
    if base is None and adapter is not None:
        problem = f"base {named!r} is not a Hub id" if named else "no base model given"
        raise UsageError(f"{path}: {problem}", hint="set `base_id=ORG/NAME`")
    if adapter is None:
        facts, description = _model_facts(path, repo, base, license)
    else:
        facts, description = _adapter_facts(path, adapter, repo, base, license)
    skipped |= skip_by_content(found)
    files = (*_public_files(found, base, named), _card(path, facts, named))
    stamped = tuple(replace(file, stamp=stamps[file.name]) if file.name in stamps else file for file in files)
    return PreparedFolder(stamped, skipped, base, description)


def check_unchanged(files: Iterable[UploadFile]) -> None:
    """Raise AdapterkitError if a file has changed since it was checked."""
    for file in files:
        if file.source is not None and file.stamp is not None and _stamp(file.source) != file.stamp:
            raise AdapterkitError(f"{file.source}: changed during the upload; nothing committed, push again")


def _stamp(file: Path) -> Stamp:
    try:
        return stamps_of([file])[file]
    except OSError as error:
        raise AdapterkitError(f"{file}: disappeared during the upload ({error.strerror}); nothing committed") from error


# --- metadata --------------------------------------------------------------------------------------------------------


def _named_base(path: Path, adapter: Adapter | None) -> str | None:
    """The base as given by the adapter, the record of a merge, the card, or the config."""
    if adapter is not None:
        return adapter.base_model
    record = read_json(path / MERGE_RECORD) if (path / MERGE_RECORD).is_file() else {}
    of_merge = record.get("base", {}).get("name") if isinstance(record.get("base"), dict) else None
    config = read_json(path / CONFIG).get("_name_or_path")
    names = (of_merge, card.base_in_card(_text(path / README)), config)
    return next((name for name in names if isinstance(name, str) and name), None)


def _adapter_facts(
    path: Path, adapter: Adapter, repo: str, base: str | None, license: str | None
) -> tuple[card.CardFacts, str]:
    fatal = sorted((problem for problem in adapter.problems if problem.fatal), key=lambda problem: problem.intact)
    if fatal and not fatal[0].intact:
        raise FitError(f"{path}: {fatal[0]}; the adapter is not usable", hint=fatal[0].remedy)
    if any(isinstance(tensor.source, TensorInfo) is False for tensor in adapter.tensors()):
        raise UnsafeFileError(
            f"{path}: pickled weights are not uploaded; convert them to safetensors: `{_resave_command(path)}`"
        )
    _check_finite(path, {t.source.name: t.source for t in adapter.tensors() if isinstance(t.source, TensorInfo)})
    summary = adapter.summary()
    kind = "dora" if "DoRA" in summary.kind else "lora"
    tags = ("adapterkit", "lora", *(("dora",) if kind == "dora" else ()))
    causal = adapter.task in (None, "CAUSAL_LM")
    rows = {
        "base": base or "", "kind": summary.kind, "rank": _span(summary.ranks), "alpha": _span(summary.alphas),
        "targets": ", ".join(summary.targets), "parameters": f"{summary.parameters:,}", **_provenance(path),
    }  # fmt: skip
    pipeline = "text-generation" if causal else None
    format = formats.get_format(adapter.format)
    facts = card.CardFacts(
        repo, "adapter", base, tags, pipeline, license, format.LIBRARY, format.example(repo),
        {name: text for name, text in rows.items() if text},
        f"{fatal[0].what}. {fatal[0].remedy}" if fatal else "",
    )  # fmt: skip
    return facts, f"{path.name}: {_summary_line(summary)}, for {base}"


def _model_facts(path: Path, repo: str, base: str | None, license: str | None) -> tuple[card.CardFacts, str]:
    checkpoint = open_checkpoint(path)
    _check_finite(path, checkpoint.tensors)
    rows = {"base": base or "", "tensors": str(len(checkpoint.tensors)), **_provenance(path)}
    tags, relation = _relation(path)
    facts = card.CardFacts(
        repo, relation, base, tags, "text-generation", license, "transformers", (),
        {name: text for name, text in rows.items() if text},
    )  # fmt: skip
    size = sum(shard.size for shard in checkpoint.shards)
    return facts, f"{path.name}: a model of {counted(len(checkpoint.tensors), 'tensor')}, {size / 1e6:,.1f} MB"


def _relation(path: Path) -> tuple[tuple[str, ...], card.Relation]:
    """Tags, and a model's relation to its base: merged or quantized by adapterkit, or trained."""
    if not (path / MERGE_RECORD).is_file():
        return ("adapterkit",) if (path / TRAINING_RECORD).is_file() else (), "finetune"
    if read_json(path / MERGE_RECORD).get("adapters"):
        return ("adapterkit", "merge"), "merge"
    return ("adapterkit",), "quantized"


def _provenance(path: Path) -> dict[str, str]:
    """Provenance from adapterkit's own records, as rows of the card's table."""
    if (path / TRAINING_RECORD).is_file():
        record = read_json(path / TRAINING_RECORD)
        loss = record.get("loss")
        return {"trained": f"{record.get('steps')} steps" + (f", loss {loss:.4g}" if isinstance(loss, float) else "")}
    if (path / ADAPTER_RECORD).is_file():
        return {"made": str(read_json(path / ADAPTER_RECORD).get("made", "by adapterkit"))}
    return {}


def _check_finite(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise FitError for NaN or infinity."""
    for name, info in tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            continue
        if not bool(info.read().isfinite().all()):
            raise FitError(f"{path}: {name} contains NaN or Inf")


# --- content ---------------------------------------------------------------------------------------------------------


def _public_files(found: Mapping[str, Path], base: str | None, named: str | None) -> Iterator[UploadFile]:
    """Yield the files except the card, with the base's Hub id for its path, and no paths in adapterkit's own files."""
    for name, file in found.items():
        if name == README:
            continue
        text = _text(file) if _is_text(name) else None
        if text is None:
            if name.endswith(".safetensors"):
                _check_metadata(file)
            yield UploadFile(name, file)
            continue
        plain, change = text, ""
        if name in OWN_FILES:
            plain, change = strip_folders(text, relative=name in TRAINING_FILES), "folders removed from paths"
        elif name.endswith(".json") and not name.startswith(f"{RECEIPT_FOLDER}/"):  # unmerge needs receipts unchanged
            plain, change = _set_base(file, plain, base, named)
        check_public(file, plain)
        yield UploadFile(name, file) if plain == text else UploadFile(name, file, plain.encode(), change)


def _check_metadata(file: Path) -> None:
    """Raise UnsafeFileError for a local path, such as the data set's, which some trainers store."""
    if match := LOCAL_PATH.search("\n".join(read_header(file).metadata.values())):
        raise UnsafeFileError(
            f"{file}: metadata contains a local path, {match[0]}; remove it, for an adapter with "
            f"`{_resave_command(file.parent)}`"
        )


def _resave_command(adapter: Path) -> str:
    return command(["adapterkit", "combine", argument(adapter), "-o", "NEW", "--method", "linear"])


def _card(path: Path, facts: card.CardFacts, named: str | None) -> UploadFile:
    text = _text(path / README)
    local = [named] if named and public_name(named) is None else []
    record = read_json(path / TRAINING_RECORD) if (path / TRAINING_RECORD).is_file() else {}
    if text and (given := record.get("command")) and isinstance(given, str):
        text = text.replace(given, strip_folders(given, relative=True))
    done, added = card.complete_card(text, facts, local)
    check_public(path / README, done)
    if text is None:
        return UploadFile(README, None, done.encode(), "new")
    return UploadFile(README, path / README, done.encode(), f"with {', '.join(added)}" if added else "")


def _set_base(file: Path, text: str, base: str | None, named: str | None) -> tuple[str, str]:
    """Replace a local path, or another name of the base, in a config by the base's Hub id; returns text and change."""
    try:
        config = read_json(file)
    except FormatError:  # not a config: those have been read already
        return text, ""
    format = formats.format_of_config(file.name, config)
    own = format.BASE_KEY if format else None
    keys = dict.fromkeys([*BASE_KEYS, *([own] if own else [])])
    wrong = [
        key
        for key in keys
        if isinstance(value := config.get(key), str)
        and value
        and value != base
        and (public_name(value) is None or (key in (own, BASE_KEYS[0]) and value == named))
    ]
    if own and not config.get(own):
        wrong.append(own)
    if not wrong or base is None:
        return text, ""
    changed = json.dumps(config | dict.fromkeys(wrong, base), indent=2, ensure_ascii=False) + "\n"
    return changed, f"{', '.join(wrong)}: {base}"


def _is_text(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith((".json", ".yaml", ".yml", ".md")) and not (
        base in VOCABULARIES or base.endswith(INDEX_SUFFIX)
    )


def _text(file: Path) -> str | None:
    """The text of a file; None if it is missing or counts as data."""
    if not file.is_file():
        return None
    always = file.name in (*ALWAYS_TEXT, *formats.config_names())
    if file.stat().st_size > (MAX_TEXT_BYTES if always else TEXT_BYTES):
        if always:
            raise FormatError(f"{file}: {file.stat().st_size:,} bytes, expected at most {MAX_TEXT_BYTES:,}")
        return None
    try:
        return read_whole(file, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error


def _span(values: tuple[Any, ...]) -> str:
    return "" if not values else f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _summary_line(summary: Summary) -> str:
    return f"{summary.kind}, rank {_span(summary.ranks)}, {counted(summary.parameters, 'parameter')}"
