"""Find secrets in bytes of any kind: tokens, private keys, logins. Keeps up with a disk that reads weights.

Formats are those that the issuers document, if they start with a distinctive prefix, which random weights, base64 and
tokenizers do not contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

CHUNK, OVERLAP = 4 << 20, 8192  # bytes; no secret is longer than the overlap

# Prefix -> name and pattern. Each matches at least MIN_RUN consecutive letters, digits, - or _.
TOKEN_FORMATS = {
    "hf_": ("a Hub token", r"hf_(?:[A-Za-z0-9]{30,}|oauth_[\w.-]{30,})"),
    "api_org_": ("a Hub token", r"api_org_[A-Za-z0-9]{30,}"),
    **{f"gh{kind}_": ("a GitHub token", r"gh._[A-Za-z0-9]{36,}") for kind in "pousr"},
    "github_pat_": ("a GitHub token", r"github_pat_\w{60,}"),
    "glpat-": ("a GitLab token", r"glpat-[\w-]{20,}"),
    "sk-": (
        "a key of OpenAI or Anthropic",
        r"sk-(?:(?:proj|svcacct|admin|or-v1|ant-[a-z]+\d*)-[\w-]{32,}|[A-Za-z0-9]{32,})",
    ),
    "AKIA": ("an AWS key", r"AKIA[A-Z0-9]{16}"),
    "ASIA": ("an AWS key", r"ASIA[A-Z0-9]{16}"),
    "aws_secret_access_key": ("an AWS key", r"\w+[\"'\s=:\\]{1,9}[A-Za-z0-9/+]{40}"),
    "AWS_SECRET_ACCESS_KEY": ("an AWS key", r"\w+[\"'\s=:\\]{1,9}[A-Za-z0-9/+]{40}"),
    "AIza": ("a Google key", r"AIza[\w-]{35}"),
    "GOCSPX-": ("a Google key", r"GOCSPX-[\w-]{28}"),
    "xox": ("a Slack token", r"xox[abeprs]-[A-Za-z0-9-]{24,}"),
    "sk_live_": ("a Stripe key", r"sk_live_[A-Za-z0-9]{24,}"),
    "rk_live_": ("a Stripe key", r"rk_live_[A-Za-z0-9]{24,}"),
    "npm_": ("an npm token", r"npm_[A-Za-z0-9]{36}"),
    "pypi-": ("a PyPI token", r"pypi-[\w-]{64,}"),
    "gsk_": ("a Groq key", r"gsk_[A-Za-z0-9]{50,}"),
    "nvapi-": ("an NVIDIA key", r"nvapi-[\w-]{60,}"),
    "eyJ": ("a signed web token", r"eyJ[\w-]{13,}\.eyJ[\w-]{13,}\.[\w-]{20,}"),
    "wandb": ("a Weights & Biases key", r"wandb[^\r\n]{0,20}(?:key|login)[^\r\n0-9a-f]{0,12}[0-9a-f]{40}"),
    "WANDB": ("a Weights & Biases key", r"WANDB[^\r\n]{0,20}(?:KEY|LOGIN)[^\r\n0-9a-f]{0,12}[0-9a-f]{40}"),
    "-----BEGIN": (
        "a private key",
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:\s|\\[nr])*(?:[A-Za-z0-9+/=]{24}|[A-Z][\w-]+: )",
    ),
}
PATTERNS = [
    (prefix.encode(), name, re.compile((pattern if prefix[0] == "-" else rf"(?:{pattern})(?![A-Za-z0-9])").encode()))
    for prefix, (name, pattern) in TOKEN_FORMATS.items()
]
# No letter or digit precedes a secret, unless it ends an escape: `\n`, `\u000a`, `%0A`.
PRECEDING = re.compile(rb"(?:\A|[^A-Za-z0-9]|\\[nrt]|\\u00[0-9a-fA-F]{2}|%[0-9A-F]{2})\Z", re.DOTALL)
PLACEHOLDER = re.compile(rb"[a-z_-]*([x*0])\1+|\w+EXAMPLE(?:KEY)?", re.IGNORECASE)
LOGIN = re.compile(rb"machine\s+\S+\s+login\s+\S+\s+password\s+\S{6}")

MIN_RUN, STRIDE = 16, 8  # bytes: any MIN_RUN consecutive bytes include two neighbouring multiples of STRIDE
CONTEXT = 400  # bytes before and after a run that may belong to the secret
TOKEN_BYTES = np.zeros(256, bool)
TOKEN_BYTES[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")] = True
View = np.ndarray[tuple[int], np.dtype[np.uint8]]


def find_secret(stream: IO[bytes], known: tuple[bytes, ...] = ()) -> tuple[str, int] | None:
    """The name and offset of a secret in `stream`, or None; `known` secrets are found in any format.

    Text may be UTF-8 or UTF-16, anywhere among other bytes.
    """
    at, data = 0, stream.read(CHUNK)
    while data:
        for name, offset in _scan_chunk(data, known):
            return name, at + offset
        rest = data[-OVERLAP:]
        at += len(data) - len(rest)
        data = stream.read(CHUNK)
        data = rest + data if data else b""
    return None


def _scan_chunk(data: bytes, known: tuple[bytes, ...]) -> Iterator[tuple[str, int]]:
    for token in known:
        if (offset := data.find(token)) >= 0:
            yield "your Hub token", offset
    array = np.frombuffer(data, np.uint8)
    sampled = array[::STRIDE] - np.uint8(45) < 78  # a fast test that all of TOKEN_BYTES pass
    for start, stop in _spans(_find_runs(array, sampled)):
        for name, offset in _match_secrets(data[start:stop], known):
            yield name, start + offset
    for first in (0, 1):  # UTF-16: a zero next to each letter
        letters, zeros = array[first::2], array[1 - first :: 2]
        for start, stop in _spans(_find_runs(letters, zeros[: len(letters)][::STRIDE] == 0)):
            for name, offset in _match_secrets(letters[start:stop].tobytes(), known):
                yield name, first + 2 * (start + offset)
    if 0 not in data[:OVERLAP] and (match := LOGIN.search(data)):
        yield "a login of .netrc", match.start()


def _find_runs(view: View, sampled: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
    """Offsets of runs of TOKEN_BYTES; `sampled` tells whether each STRIDE-th byte may be one."""
    at = np.flatnonzero(sampled[1:] & sampled[:-1]) * STRIDE
    for between in (0, 1, 5, 3, 7, 2, 6, 4, 8):
        at = at[TOKEN_BYTES[view[at + between]]]
    return at


def _spans(at: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Yield the start and stop of runs, with CONTEXT bytes on each side; overlapping ones are joined."""
    apart = np.flatnonzero(np.diff(at) > CONTEXT)
    if len(at):
        for start, stop in zip(at[[0, *(apart + 1)]], at[[*apart, -1]], strict=True):
            yield max(0, int(start) - CONTEXT), int(stop) + CONTEXT


def _match_secrets(text: bytes, known: tuple[bytes, ...]) -> Iterator[tuple[str, int]]:
    """Yield the secrets in a text, with their offsets."""
    for token in known:
        if (offset := text.find(token)) >= 0:
            yield "your Hub token", offset
    for prefix, name, pattern in PATTERNS:
        offset = text.find(prefix)
        while offset >= 0:
            match = pattern.match(text, offset)
            if match and PRECEDING.search(text, max(0, offset - 6), offset) and not PLACEHOLDER.fullmatch(match[0]):
                yield name, offset
            offset = text.find(prefix, offset + 1)
