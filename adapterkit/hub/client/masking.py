"""Tokens kept out of whatever is shown or handed on: all that are known here, and whatever looks like one."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from adapterkit.errors import FormatError
from adapterkit.files.opening import read_whole

MASK = "hf_…"
SHAPE = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
SHORTEST = 6  # characters: less occurs in any text
MAX_TOKEN_BYTES = 10_000  # of the file with the token
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
ESCAPED = re.compile(rb"\\u00[2-7]")  # letters that JSON has no reason to escape


def masked(text: str) -> str:
    """`text` with a mask for every token; to be called before anything is cut from it."""
    return masked_bytes(text.encode(errors="surrogateescape")).decode(errors="surrogateescape")


def masked_bytes(data: bytes, sent: str | None = None) -> bytes:
    """The same of bytes, and for the Authorization header that was `sent`."""
    for secret in (*known(), *_secrets_of(sent or "")):
        for form in _forms(secret):
            data = data.replace(form, MASK.encode())
    return SHAPE.sub(MASK.encode(), data)


def masked_json(data: bytes, sent: str | None) -> bytes:
    """The same of JSON, where letters may be escaped."""
    if ESCAPED.search(data):
        with contextlib.suppress(ValueError, RecursionError):
            data = json.dumps(json.loads(data), ensure_ascii=False).encode(errors="replace")
    return masked_bytes(data, sent)


def known() -> Iterator[str]:
    """The tokens of the environment and of `hf auth login`, and the credentials in the Hub's address."""
    from huggingface_hub import constants

    yield from filter(None, (os.environ.get(name, "").strip() for name in VARIABLES))
    with contextlib.suppress(FormatError, ValueError):
        yield read_whole(Path(constants.HF_TOKEN_PATH), MAX_TOKEN_BYTES).decode().strip()
    user, at, _ = urlsplit(constants.ENDPOINT).netloc.rpartition("@")
    if at:
        yield from (user, unquote(user), unquote(user.partition(":")[2]))


def _secrets_of(header: str) -> Iterator[str]:
    """What an Authorization header holds: a token, or a name with its password."""
    scheme, _, value = header.partition(" ")
    yield value
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value).decode()
        except (binascii.Error, ValueError):
            return
        yield from (pair, pair.partition(":")[2])


def _forms(secret: str) -> Iterator[bytes]:
    """How a secret may be written: as it is, in an address, and in base64."""
    raw = secret.encode(errors="surrogateescape")
    if len(raw) >= SHORTEST:
        yield from dict.fromkeys((raw, quote(secret, safe="", errors="replace").encode(), base64.b64encode(raw)))
