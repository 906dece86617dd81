"""What of somebody's machine is in a text: local paths, which are cut to names or refused, and tokens."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path

from adapterkit.errors import UnsafeFileError
from adapterkit.hub.names import is_hub_id
from adapterkit.hub.upload.secrets import find_secret

# A path of somebody's machine: below the folders where people and jobs have their files, or of Windows.
ROOTS = (
    "home|root|Users|mnt|data|tmp|var|opt|srv|media|scratch|work|workspace|content|kaggle|private|Volumes|gpfs|lustre|"
    "raid|nfs|dbfs|storage|projects?|dev/shm"
)
LOCAL = re.compile(rf"(?:(?<![\w./:~-])|(?<=file://))(?:/(?:{ROOTS})/|~/|[A-Za-z]:\\)[^\s\"'`<>|)\]]+")
WITH_FOLDERS = re.compile(r"(?<![^\s\"'`=(\[,])[^\s\"'`<>|()\[\]{},:=]*/[^\s\"'`<>|()\[\]{},:]*")
FILES = re.compile(r"\.(jsonl?|csv|tsv|parquet|txt|ya?ml|safetensors|png|svg)$")


def shortened(text: str, relative: bool) -> str:
    """`text` with every local path cut to its last part, and those that are `relative`, too."""

    def last(match: re.Match[str]) -> str:
        return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]

    def last_of_relative(match: re.Match[str]) -> str:
        is_name = is_hub_id(match[0]) and not FILES.search(match[0])
        return match[0] if is_name else last(match) or match[0]

    text = LOCAL.sub(last, text)
    return WITH_FOLDERS.sub(last_of_relative, text) if relative else text


def check_public(file: Path, text: str) -> None:
    """Raise UnsafeFileError for a token, or for a path of this machine; in JSON as it reads when it is parsed, too."""
    if file.suffix == ".json":
        text = f"{text}\n{_unescaped(text)}"
    check_no_token(file, text)
    if match := LOCAL.search(text):
        raise UnsafeFileError(f"{file}: holds a local path, {match[0]}; take it out")


def check_no_token(file: Path, text: str) -> None:
    """Raise UnsafeFileError for what looks like a token."""
    if found := find_secret(BytesIO(text.encode(errors="surrogateescape"))):
        raise UnsafeFileError(f"{file}: holds what looks like {found[0]}; take it out, and revoke it")


def _unescaped(text: str) -> str:
    r"""JSON as it reads when it is read: `"\/home"` and `"\u002fhome"` are `"/home"`."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
