"""Tokens in what is shown: wherever they come from and however they are written, and nothing else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest
from huggingface_hub import constants

from adapterkit.hub.client.masking import MASK, masked, masked_bytes, masked_json

SECRET = "p/ss wörd+=%"  # which has another form in an address


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.test")


def spellings(secret: str) -> list[str]:
    return [secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode()]


@pytest.mark.parametrize(
    "source", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "the file", "the address", "the address's password", "Bearer", "Basic", "basic's password"]
)  # fmt: skip
def test_a_token_from_anywhere_in_any_spelling(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent, secret = None, SECRET
    if source.startswith("HF") or source.startswith("HUGG"):
        monkeypatch.setenv(source, f" {SECRET}\n")
    elif source == "the file":
        (tmp_path / "token").write_text(f"{SECRET}\n")
    elif "address" in source:
        secret = SECRET if "password" in source else f"me:{SECRET}"
        monkeypatch.setattr(constants, "ENDPOINT", f"https://me:{quote(SECRET, safe='')}@hub.test")
    elif source == "Bearer":
        sent = f"Bearer {SECRET}"
    else:
        sent = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        secret = SECRET if "password" in source else f"me:{SECRET}"
    for spelled in spellings(secret):
        data = masked_bytes(f"<{spelled}|{spelled}>".encode(), sent)
        assert data.decode() == f"<{MASK}|{MASK}>", spelled
    assert masked_bytes(b"password, me: nothing", sent) == b"password, me: nothing"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_" + "a" * 20, MASK),
        ("hf_" + "a" * 19, "hf_" + "a" * 19),
        ("api_org_" + "Z9" * 10, MASK),
        ("(hf_" + "a" * 40 + ")", f"({MASK})"),
        ("shf_" + "a" * 20, "shf_" + "a" * 20),
        ("Bearer hf_" + "a" * 20 + "-x", f"Bearer {MASK}-x"),
    ],
)
def test_what_looks_like_a_token_of_the_hub(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(("token", "shown"), [("12345", "12345"), ("123456", MASK), ("", "")])
def test_a_token_that_any_text_has_is_none(token: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert masked(f"at {token}.") == f"at {shown}."


def test_bytes_that_are_no_text_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe not UTF-8")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert masked("a\udcff/" + SECRET) == f"a\udcff/{MASK}"
    for header in ("Basic \xff", "Basic !", "Basic /w==", "Bearer", ""):
        assert masked_bytes(b"hello", header) == b"hello"


def test_letters_that_json_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may write any letter as an escape; JSON without one is not read, and what is no JSON is masked as text."""
    token = "hf_" + "k" * 30
    monkeypatch.setenv("HF_TOKEN", token)
    for first in (token[0], token[-1]):
        escaped = token.replace(first, f"\\u{ord(first):04x}")
        assert json.loads(masked_json(f'{{"error": "ü {escaped}"}}'.encode(), None)) == {"error": f"ü {MASK}"}
    for data in (b'{"a":  1}', b'{"a": "\\u00e9"}', b"\\u0068 not JSON", b"[" * 100_000 + b"\\u0068"):
        assert masked_json(data + token.encode(), None) == data + MASK.encode()
    assert masked_json(b'{"a": "\\u0070/ss"}', "Bearer p/ss w") == b'{"a": "p/ss"}'


def test_letters_that_no_encoding_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the environment that are no UTF-8, letters that JSON escapes and UTF-8 lacks, and those that ASCII lacks."""
    monkeypatch.setenv("HF_TOKEN", "p\udcffssword")
    assert masked("for p\udcffssword.") == f"for {MASK}."
    monkeypatch.setenv("HF_TOKEN", SECRET)
    written = SECRET.replace("ö", "\\u00f6").replace("d", "\\u0064")
    assert masked_json(f'{{"a": "\\ud800 {written} ü"}}'.encode(), None).decode() == f'{{"a": "? {MASK} ü"}}'
