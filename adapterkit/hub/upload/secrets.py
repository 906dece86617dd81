"""Secrets among bytes of any kind: tokens by their shape, private keys, logins. As fast as a disk reads weights.

Shapes are those that their issuers document, as far as they begin with a mark of their own: random weights, base64 and
tokenizers hold none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

CHUNK, OVERLAP = 4 << 20, 8192  # bytes; nothing that is looked for is longer than the latter

# A mark, and the pattern that is matched where it stands. All of them hold RUN letters, digits, - or _ side by side.
SHAPES = {
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
    (mark.encode(), what, re.compile(rf"(?:{pattern})(?![A-Za-z0-9])".encode() if mark[0] != "-" else pattern.encode()))
    for mark, (what, pattern) in SHAPES.items()
]
# Before them stands neither letter nor digit, unless it ends an escape: `\n`, `\u000a`, `%0A`.
BEFORE = re.compile(rb"(?:\A|[^A-Za-z0-9]|\\[nrt]|\\u00[0-9a-fA-F]{2}|%[0-9A-F]{2})\Z", re.DOTALL)
PLACEHOLDER = re.compile(rb"[a-z_-]*([x*0])\1+|\w+EXAMPLE(?:KEY)?", re.IGNORECASE)
LOGIN = re.compile(rb"machine\s+\S+\s+login\s+\S+\s+password\s+\S{6}")

RUN, STEP = 16, 8  # bytes: of RUN side by side, two neighbours are at multiples of STEP
AROUND = 400  # bytes that may belong to a secret before and after its run
WORD = np.zeros(256, bool)
WORD[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")] = True
View = np.ndarray[tuple[int], np.dtype[np.uint8]]


def find_secret(stream: IO[bytes], known: tuple[bytes, ...] = ()) -> tuple[str, int] | None:
    """What secret `stream` holds, and at which byte; what is `known` to be one whatever its shape. None where none is.

    Text may be UTF-8 or UTF-16, and lie among any other bytes.
    """
    at, data = 0, stream.read(CHUNK)
    while data:
        for what, place in _found(data, known):
            return what, at + place
        rest = data[-OVERLAP:]
        at += len(data) - len(rest)
        data = stream.read(CHUNK)
        data = rest + data if data else b""
    return None


def _found(data: bytes, known: tuple[bytes, ...]) -> Iterator[tuple[str, int]]:
    for token in known:
        if (place := data.find(token)) >= 0:
            yield "the token of this machine", place
    array = np.frombuffer(data, np.uint8)
    for start, stop in _spans(
        _runs(array, array[::STEP] - np.uint8(45) < 78)
    ):  # which is fast, and true of all of WORD
        for what, place in _secrets(data[start:stop], known):
            yield what, start + place
    for first in (0, 1):  # UTF-16: letters with a zero beside each
        letters, zeros = array[first::2], array[1 - first :: 2]
        for start, stop in _spans(_runs(letters, zeros[: len(letters)][::STEP] == 0)):
            for what, place in _secrets(letters[start:stop].tobytes(), known):
                yield what, first + 2 * (start + place)
    if 0 not in data[:OVERLAP] and (match := LOGIN.search(data)):
        yield "a login of .netrc", match.start()


def _runs(view: View, sampled: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
    """Where runs of WORD are, of which most is never looked at: `sampled` says where every STEP-th byte may be one."""
    at = np.flatnonzero(sampled[1:] & sampled[:-1]) * STEP
    for between in (0, 1, 5, 3, 7, 2, 6, 4, 8):
        at = at[WORD[view[at + between]]]
    return at


def _spans(at: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """From where to where runs `at` these places reach, with what is around them."""
    apart = np.flatnonzero(np.diff(at) > AROUND)
    if len(at):
        for start, stop in zip(at[[0, *(apart + 1)]], at[[*apart, -1]], strict=True):
            yield max(0, int(start) - AROUND), int(stop) + AROUND


def _secrets(text: bytes, known: tuple[bytes, ...]) -> Iterator[tuple[str, int]]:
    """The secrets in a text."""
    for token in known:
        if (place := text.find(token)) >= 0:
            yield "the token of this machine", place
    for mark, what, pattern in PATTERNS:
        place = text.find(mark)
        while place >= 0:
            match = pattern.match(text, place)
            if match and BEFORE.search(text, max(0, place - 6), place) and not PLACEHOLDER.fullmatch(match[0]):
                yield what, place
            place = text.find(mark, place + 1)
