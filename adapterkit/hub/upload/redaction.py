"""Shorten local paths in text to their last part, and refuse text with tokens or paths."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path

from adapterkit.errors import UnsafeFileError
from adapterkit.hub.names import is_hub_id
from adapterkit.hub.upload.secrets import find_secret

# Usual parents of home, data and job folders, whose paths reveal a machine; Windows paths have a drive letter.
ROOTS = (
    "home|root|Users|mnt|data|tmp|var|opt|srv|media|scratch|work|workspace|content|kaggle|private|Volumes|gpfs|lustre|"
    "raid|nfs|dbfs|storage|projects?|dev/shm"
)
LOCAL_PATH = re.compile(rf"(?:(?<![\w./:~-])|(?<=file://))(?:/(?:{ROOTS})/|~/|[A-Za-z]:\\)[^\s\"'`<>|)\]]+")
RELATIVE_PATH = re.compile(r"(?<![^\s\"'`=(\[,])[^\s\"'`<>|()\[\]{},:=]*/[^\s\"'`<>|()\[\]{},:]*")
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|txt|ya?ml|safetensors|png|svg)$")


def strip_folders(text: str, relative: bool) -> str:
    """Replace each local path in `text` by its last part, with `relative` relative paths too."""

    def last(match: re.Match[str]) -> str:
        return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]

    def last_of_relative(match: re.Match[str]) -> str:
        is_name = is_hub_id(match[0]) and not DATA_FILE.search(match[0])
        return match[0] if is_name else last(match) or match[0]

    text = LOCAL_PATH.sub(last, text)
    return RELATIVE_PATH.sub(last_of_relative, text) if relative else text


def check_public(file: Path, text: str) -> None:
    """Raise UnsafeFileError for a token or a local path, in JSON also for an escaped one."""
    if file.suffix == ".json":
        text = f"{text}\n{_unescape(text)}"
    check_no_token(file, text)
    if match := LOCAL_PATH.search(text):
        raise UnsafeFileError(f"{file}: contains a local path, {match[0]}; remove it")


def check_no_token(file: Path, text: str) -> None:
    """Raise UnsafeFileError for a token or another secret."""
    if found := find_secret(BytesIO(text.encode(errors="surrogateescape"))):
        raise UnsafeFileError(f"{file}: contains {found[0]}; remove it, and revoke it")


def _unescape(text: str) -> str:
    r"""JSON text without escapes: `"\/home"` and `"\u002fhome"` are `"/home"`."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
