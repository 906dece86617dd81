"""What a folder sends to the Hub: its files but for what trained it, its card completed, and no local path in any."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapterkit.adapter.formats import load
from adapterkit.adapter.formats import table as formats
from adapterkit.base.checkpoint import CONFIG, INDEX_SUFFIX, is_base, open_checkpoint
from adapterkit.errors import AdapterkitError, FitError, FormatError, UnsafeFileError, UsageError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.opening import read_whole
from adapterkit.files.safetensors import FLOAT_DTYPES, TensorInfo, read_header
from adapterkit.files.staging import ADAPTER_RECORD, MERGE_RECORD, RECEIPT_FOLDER, TRAINING_RECORD
from adapterkit.files.stamps import Stamp, stamps_of
from adapterkit.hub.names import is_inner, public_name
from adapterkit.hub.upload import card
from adapterkit.hub.upload.content_scan import why_not
from adapterkit.hub.upload.redaction import LOCAL, check_no_token, check_public, shortened
from adapterkit.text import argument, command, counted

if TYPE_CHECKING:
    from adapterkit.adapter.summary import Summary
from adapterkit.adapter.weights import Adapter

README = "README.md"
RECIPE = "adapterkit_recipe.yaml"
OF_RUN = (TRAINING_RECORD, RECIPE)  # what adapterkit wrote of how it was trained, with the paths as they were given
OURS = (MERGE_RECORD, ADAPTER_RECORD, *OF_RUN)
OF_TRAINING = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|scaler|trainer_state|training_args|events\.out\.tfevents)\b.*"
)
FOLDERS_OF_TRAINING = re.compile(r"checkpoint(s|[-_]\d+)|wandb|mlruns")
NAMES_A_BASE = ("base_model_name_or_path", "_name_or_path", "name_or_path")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
CHECKED = (README, CONFIG, *OURS)  # of any size, as adapters' configs are
TEXT_BYTES = 1 << 20  # larger files are data, whatever else they are called
MAX_TEXT_BYTES = 50 << 20


@dataclass(frozen=True)
class Upload:
    """A file as it is sent: from the disk, or with `content` that differs from what lies there, and how."""

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
class Parcel:
    """What a folder sends, what it leaves out and why, and what it is."""

    uploads: tuple[Upload, ...]
    left_out: dict[str, str]
    base: str | None
    what: str  # in a line


def pack(path: Path, repo: str, base_id: str | None = None, license: str | None = None) -> Parcel:
    """Choose, check and complete what `path`, the folder of an adapter or a model, sends to `repo`.

    Raises FormatError and FitError for what does not load or is not finite, UsageError where its base is no Hub id,
    UnsafeFileError for local paths, secrets, archives that cannot be looked into, and links out of the folder.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: expected the folder of an adapter or of a model")
    if base_id is not None and public_name(base_id) is None:
        raise UsageError(f"`base_id={base_id}`: expected ORG/NAME, as the Hub has it")
    found, left_out = _chosen(path)
    stamps = {name: _stamp(file) for name, file in found.items()}
    adapter = None if is_base(path) else load(path)
    named = _named_base(path, adapter)
    base = base_id or public_name(named)
    if base is None and adapter is not None:
        said = f"its base is {named!r}, which is no Hub id" if named else "it names no base"
        raise UsageError(f"{path}: {said}", hint="give it with `base_id=ORG/NAME`")
    if adapter is None:
        facts, what = _of_model(path, repo, base, license)
    else:
        facts, what = _of_adapter(path, adapter, repo, base, license)
    left_out |= _looked_into(found)
    uploads = (*_made_public(found, base, named), _card(path, facts, named))
    stamped = tuple(replace(one, stamp=stamps[one.name]) if one.name in stamps else one for one in uploads)
    parcel = Parcel(stamped, left_out, base, what)
    check_unchanged(parcel.uploads)
    return parcel


def check_unchanged(uploads: Iterable[Upload]) -> None:
    """Raise AdapterkitError where a file is no longer what was checked."""
    for one in uploads:
        if one.source is not None and one.stamp is not None and _stamp(one.source) != one.stamp:
            raise AdapterkitError(f"{one.source}: changed while it was being sent; nothing was, push it again")


def _stamp(file: Path) -> Stamp:
    try:
        return stamps_of([file])[file]
    except OSError as error:
        raise AdapterkitError(f"{file}: is gone ({error.strerror}); nothing was sent") from error


# --- what it is ------------------------------------------------------------------------------------------------------


def _named_base(path: Path, adapter: Adapter | None) -> str | None:
    """The base that the adapter, the record of a merge, the card or the config names."""
    if adapter is not None:
        return adapter.base_model
    record = read_json(path / MERGE_RECORD) if (path / MERGE_RECORD).is_file() else {}
    of_merge = record.get("base", {}).get("name") if isinstance(record.get("base"), dict) else None
    config = read_json(path / CONFIG).get("_name_or_path")
    names = (of_merge, card.base_of(_text(path / README)), config)
    return next((name for name in names if isinstance(name, str) and name), None)


def _of_adapter(
    path: Path, adapter: Adapter, repo: str, base: str | None, license: str | None
) -> tuple[card.Facts, str]:
    if fatal := next((problem for problem in adapter.problems if problem.fatal), None):
        raise FitError(f"{path}: {fatal}; it could not be used")
    if any(isinstance(tensor.source, TensorInfo) is False for tensor in adapter.tensors()):
        raise UnsafeFileError(
            f"{path}: its weights are pickled, and pickles are not sent. Make them safetensors: `{_saved_again(path)}`"
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
    facts = card.Facts(
        repo, "adapter", base, tags, pipeline, license, format.LIBRARY, format.example(repo),
        {name: text for name, text in rows.items() if text},
    )  # fmt: skip
    return facts, f"{path.name}: {_line(summary)}, for {base}"


def _of_model(path: Path, repo: str, base: str | None, license: str | None) -> tuple[card.Facts, str]:
    checkpoint = open_checkpoint(path)
    _check_finite(path, checkpoint.tensors)
    rows = {"base": base or "", "tensors": str(len(checkpoint.tensors)), **_provenance(path)}
    tags, relation = _made(path)
    facts = card.Facts(
        repo, relation, base, tags, "text-generation", license, "transformers", (),
        {name: text for name, text in rows.items() if text},
    )  # fmt: skip
    size = sum(shard.size for shard in checkpoint.shards)
    return facts, f"{path.name}: a model of {counted(len(checkpoint.tensors), 'tensor')}, {size / 1e6:,.1f} MB"


def _made(path: Path) -> tuple[tuple[str, ...], card.Relation]:
    """Tags, and what a model is of its base: merged or quantized by adapterkit, or trained."""
    if not (path / MERGE_RECORD).is_file():
        return ("adapterkit",) if (path / TRAINING_RECORD).is_file() else (), "finetune"
    if read_json(path / MERGE_RECORD).get("adapters"):
        return ("adapterkit", "merge"), "merge"
    return ("adapterkit",), "quantized"


def _provenance(path: Path) -> dict[str, str]:
    """How it was made, as far as adapterkit noted it."""
    if (path / TRAINING_RECORD).is_file():
        record = read_json(path / TRAINING_RECORD)
        loss = record.get("loss")
        return {"trained": f"{record.get('steps')} steps" + (f", loss {loss:.4g}" if isinstance(loss, float) else "")}
    if (path / ADAPTER_RECORD).is_file():
        return {"made": str(read_json(path / ADAPTER_RECORD).get("made", "by adapterkit"))}
    return {}


def _check_finite(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise FitError where a number is NaN or infinite."""
    for name, info in tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            continue
        if not bool(info.read().isfinite().all()):
            raise FitError(f"{path}: {name} holds NaN or Inf, which nobody can use")


# --- which files -----------------------------------------------------------------------------------------------------


def _chosen(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to send, by their names on the Hub, and those left out with the reason."""
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for at, folders, names in os.walk(path, onerror=_unread):
        inner = Path(at).relative_to(path)
        unwanted = {folder: why for folder in folders if (why := _unwanted_folder(Path(at) / folder))}
        left_out |= {f"{inner / folder}/": why for folder, why in sorted(unwanted.items())}
        folders[:] = sorted(set(folders) - set(unwanted))
        for name in sorted(names):
            if why := _unwanted(name):
                left_out[str(inner / name)] = why
            else:
                _check_file(Path(at) / name, path)
                found[str(inner / name)] = Path(at) / name
    return found, left_out


def _unread(error: OSError) -> NoReturn:
    raise FormatError(f"{error.filename}: cannot be read: {error.strerror}")


def _unwanted_folder(folder: Path) -> str | None:
    if folder.name.startswith("."):
        return "hidden"
    if FOLDERS_OF_TRAINING.fullmatch(folder.name):
        return "of training"
    return "a link to a folder" if folder.is_symlink() else None


def _unwanted(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    return "state of training" if OF_TRAINING.fullmatch(name) else None


def _looked_into(found: dict[str, Path]) -> dict[str, str]:
    """Take from `found` what is not sent for what it holds, and return why. Raises UnsafeFileError for secrets."""
    for name in found:
        check_no_token(found[name], name)
    left_out = {name: why for name, file in found.items() if (why := why_not(file)) is not None}
    for name in left_out:
        del found[name]
    return left_out


def _check_file(file: Path, folder: Path) -> None:
    """Raise UnsafeFileError for a name that the Hub would not take, and for a link that leads too far: it may lead to a
    file of its own folder or, as in the Hub cache, of the same repository.
    """
    if not is_inner(str(file.relative_to(folder))):
        raise UnsafeFileError(f"{file}: has a name that cannot be shown or is none elsewhere; rename it")
    if file.is_symlink():
        target, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
        repo = next((at.parent for at in home.parents if at.name == "snapshots"), home)
        if not target.is_relative_to(repo) or not target.is_file():
            raise UnsafeFileError(f"{file}: is a link to {target}, outside its folder; remove it or copy the file here")
    elif not file.is_file():
        raise UnsafeFileError(f"{file}: is no file that could be sent; remove it")


# --- nothing of this machine -----------------------------------------------------------------------------------------


def _made_public(found: Mapping[str, Path], base: str | None, named: str | None) -> Iterator[Upload]:
    """The files but for the card: names of the base become its Hub id, and what adapterkit noted loses its paths."""
    for name, file in found.items():
        if name == README:
            continue
        text = _text(file) if _is_text(name) else None
        if text is None:
            if name.endswith(".safetensors"):
                _check_metadata(file)
            yield Upload(name, file)
            continue
        plain, change = text, ""
        if name in OURS:
            plain, change = shortened(text, relative=name in OF_RUN), "paths without their folders"
        elif name.endswith(".json") and not name.startswith(f"{RECEIPT_FOLDER}/"):  # by which merges are undone
            plain, change = _with_base(file, plain, base, named)
        check_public(file, plain)
        yield Upload(name, file) if plain == text else Upload(name, file, plain.encode(), change)


def _check_metadata(file: Path) -> None:
    """Raise UnsafeFileError for a local path, such as trainers leave there of their data."""
    if match := LOCAL.search("\n".join(read_header(file).metadata.values())):
        raise UnsafeFileError(
            f"{file}: its metadata holds a local path, {match[0]}; save it again without, an adapter with "
            f"`{_saved_again(file.parent)}`"
        )


def _saved_again(adapter: Path) -> str:
    return command(["adapterkit", "combine", argument(adapter), "-o", "NEW", "--method", "linear"])


def _card(path: Path, facts: card.Facts, named: str | None) -> Upload:
    text = _text(path / README)
    local = [named] if named and public_name(named) is None else []
    record = read_json(path / TRAINING_RECORD) if (path / TRAINING_RECORD).is_file() else {}
    if text and (given := record.get("command")) and isinstance(given, str):
        text = text.replace(given, shortened(given, relative=True))
    done, added = card.completed(text, facts, local)
    check_public(path / README, done)
    if text is None:
        return Upload(README, None, done.encode(), "new")
    return Upload(README, path / README, done.encode(), f"with {', '.join(added)}" if added else "")


def _with_base(file: Path, text: str, base: str | None, named: str | None) -> tuple[str, str]:
    """A config whose name for the base is a path, or another than the one asked for, with the Hub id instead."""
    try:
        config = read_json(file)
    except FormatError:  # a list, or none of ours: what must be a config was read before
        return text, ""
    format = formats.format_of_config(file.name, config)
    own = format.BASE_KEY if format else None
    keys = dict.fromkeys([*NAMES_A_BASE, *([own] if own else [])])
    wrong = [
        key
        for key in keys
        if isinstance(value := config.get(key), str)
        and value
        and value != base
        and (public_name(value) is None or (key in (own, NAMES_A_BASE[0]) and value == named))
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
    """The text of a file, where there is one and it is no data."""
    if not file.is_file():
        return None
    checked = file.name in (*CHECKED, *formats.config_names())
    if file.stat().st_size > (MAX_TEXT_BYTES if checked else TEXT_BYTES):
        if checked:
            raise FormatError(f"{file}: is {file.stat().st_size:,} bytes long, expected at most {MAX_TEXT_BYTES:,}")
        return None
    try:
        return read_whole(file, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: is not UTF-8: {error.reason} at byte {error.start}") from error


def _span(values: tuple[Any, ...]) -> str:
    return "" if not values else f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _line(summary: Summary) -> str:
    return f"{summary.kind}, rank {_span(summary.ranks)}, {counted(summary.parameters, 'parameter')}"
