"""Mask tokens in messages and responses: configured ones, and strings that look like Hub tokens."""

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
TOKEN_PATTERN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
MIN_TOKEN_LENGTH = 6  # characters: shorter strings occur in any text
MAX_TOKEN_BYTES = 10_000  # of the token file
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
NEEDLESS_ESCAPE = re.compile(rb"\\u00[2-7]")  # ASCII, which JSON writers don't escape


def masked(text: str) -> str:
    """`text` with every token masked; call it before truncating, which could leave a part of a token."""
    return masked_bytes(text.encode(errors="surrogateescape")).decode(errors="surrogateescape")


def masked_bytes(data: bytes, sent: str | None = None) -> bytes:
    """`data` with every token masked, and the credentials of the Authorization header `sent`."""
    for secret in (*known_tokens(), *_credentials(sent or "")):
        for encoded in _encodings(secret):
            data = data.replace(encoded, MASK.encode())
    return TOKEN_PATTERN.sub(MASK.encode(), data)


def masked_json(data: bytes, sent: str | None) -> bytes:
    """`masked_bytes` for JSON, whose letters may be escaped."""
    if NEEDLESS_ESCAPE.search(data):
        with contextlib.suppress(ValueError, RecursionError):
            data = json.dumps(json.loads(data), ensure_ascii=False).encode(errors="replace")
    return masked_bytes(data, sent)


def known_tokens() -> Iterator[str]:
    """Yield the tokens in the environment and from `hf auth login`, and the credentials in the Hub's URL."""
    from huggingface_hub import constants

    yield from filter(None, (os.environ.get(name, "").strip() for name in TOKEN_VARIABLES))
    with contextlib.suppress(FormatError, ValueError):
        yield read_whole(Path(constants.HF_TOKEN_PATH), MAX_TOKEN_BYTES).decode().strip()
    user, at, _ = urlsplit(constants.ENDPOINT).netloc.rpartition("@")
    if at:
        yield from (user, unquote(user), unquote(user.partition(":")[2]))


def _credentials(header: str) -> Iterator[str]:
    """Yield the secrets in an Authorization header: a token, or `user:password` and the password."""
    scheme, _, value = header.partition(" ")
    yield value
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value).decode()
        except (binascii.Error, ValueError):
            return
        yield from (pair, pair.partition(":")[2])


def _encodings(secret: str) -> Iterator[bytes]:
    """Yield a secret as raw bytes, percent-encoded, and in base64."""
    raw = secret.encode(errors="surrogateescape")
    if len(raw) >= MIN_TOKEN_LENGTH:
        yield from dict.fromkeys((raw, quote(secret, safe="", errors="replace").encode(), base64.b64encode(raw)))
