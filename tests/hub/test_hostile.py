"""Strangers' repositories, servers that are no Hub, broken caches, and ctrl-C: one clear error, and nothing elsewhere."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hubserver
import pytest
from handmade import CONFIG, adapterkit, contents, write_adapter, write_base
from hubserver import Hub
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from adapterkit.errors import AdapterkitError, UnsafeFileError
from adapterkit.hub import remote, resolve
from adapterkit.hub.adapter_listing import list_hub
from adapterkit.hub.client import limits
from adapterkit.hub.client.parallel import parallel_map
from adapterkit.hub.names import is_safe_path

ADAPTER = "someone/lora"
WEIGHTS = "adapter_model.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if data is not None}


@pytest.fixture
def adapter(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, in a folder and on the Hub; the current folder is an empty one."""
    folder = write_adapter(tmp_path / "adapter", config=CONFIG | {"base_model_name_or_path": "lab/base"})
    hub.add(ADAPTER, files(folder) | {"README.md": b"---\nbase_model: lab/base\nlibrary_name: peft\n---\n"})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return folder


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the Hub say other things of its repositories; of each file with a function."""
    real = hubserver._info

    def say(of_file: Callable[[dict[str, Any]], object] = lambda _: None, **changes: Any) -> None:
        def info(*args: Any) -> dict[str, Any]:
            facts = real(*args) | changes
            for file in facts["siblings"] if "siblings" not in changes else []:
                of_file(file)
            return facts

        monkeypatch.setattr(hubserver, "_info", info)

    return say


# --- what repositories may claim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "a//x.json", "a\\..\\x.json", "x\x1b[31m.json", "x" * 300]
)
def test_a_name_that_leads_elsewhere(hub: Hub, tmp_path: Path, name: str) -> None:
    name += "" if name.endswith(".json") else ".json"
    hub.add("lab/base", files(write_base(tmp_path / "base")) | {name: b"{}"})
    for command in (["inspect", "lab/base"], ["pull", "lab/base"]):
        assert "unsafe name" in adapterkit(*command).message(1)
    assert not is_safe_path(name)
    assert not hub.asked("GET .*/resolve/.*")
    assert not list(tmp_path.rglob("x.json"))


def test_an_index_whose_name_leads_elsewhere_is_not_written(hub: Hub, tmp_path: Path) -> None:
    hub.add("lab/base", files(write_base(tmp_path / "base")) | {f"{tmp_path}/evil.safetensors.index.json": b"{}"})
    assert "unsafe name" in adapterkit("inspect", "lab/base").message(1)
    assert not (tmp_path / "evil.safetensors.index.json").exists()


@pytest.mark.parametrize("size", [2**62, -1, None, "12", 1.5])
def test_a_size_that_no_file_has(adapter: Path, saying: Callable[..., None], size: Any) -> None:
    saying(lambda file: file.update(size=size))
    for command in ("inspect", "pull"):
        assert f"invalid size, {size} bytes" in adapterkit(command, ADAPTER).message(1)


@pytest.mark.parametrize("sha256", ["../../../../x", "A" * 64, "", "0" * 63])
def test_a_hash_that_is_none_is_no_path(
    adapter: Path, tmp_path: Path, saying: Callable[..., None], sha256: str
) -> None:
    before = contents(tmp_path)
    saying(lambda file: file.get("lfs", {}).update(sha256=sha256))
    message = adapterkit("pull", ADAPTER).message_of_last(1)
    assert "invalid hash" in message
    assert contents(tmp_path) == before
    saying(lambda file: file.update(blobId="../x"))
    assert "invalid hash" in adapterkit("pull", ADAPTER).message(1)


@pytest.mark.parametrize("sha", [None, "../../../x", "main", 7])
def test_a_commit_that_is_none(adapter: Path, saying: Callable[..., None], sha: Any) -> None:
    saying(sha=sha)
    assert "expected 40 hexadecimal digits" in adapterkit("pull", ADAPTER).message(1)


def test_without_hashes_the_client_gets_it(hub: Hub, adapter: Path, saying: Callable[..., None]) -> None:
    saying(lambda file: file.pop("lfs", None) and file.update(blobId=None))
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


@pytest.mark.parametrize(
    "changes",
    [
        {"siblings": "x"}, {"siblings": [1]}, {"siblings": [{}]}, {"lastModified": "gestern"}, {"safetensors": "x"},
    ],
)  # fmt: skip
def test_facts_of_another_kind(hub: Hub, adapter: Path, saying: Callable[..., None], changes: dict[str, Any]) -> None:
    hub.add("lab/base", {"config.json": b"{}"})
    saying(**changes)
    for command in (["inspect", ADAPTER], ["pull", ADAPTER], ["list", "--hub"], ["push", adapter, "me/x"]):
        assert "invalid response (" in adapterkit(*command).message(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"siblings": None}, {"cardData": "x"}, {"cardData": [1]}, {"cardData": None}, {"tags": None},
        {"downloads": "viele", "likes": []}, {"gated": {"a": 1}}, {"id": "a/b\x1b[31m\n"}, {"safetensors": None},
    ],
)  # fmt: skip
def test_rows_of_strangers_are_shown(adapter: Path, saying: Callable[..., None], changes: dict[str, Any]) -> None:
    saying(**changes)
    result = adapterkit("list", "--hub")
    assert result.code == 0
    assert "\x1b" not in result.out
    assert len(result.out.splitlines()) == 2


def test_a_huge_config_is_not_read(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.hub.remote.MAX_CONFIG_BYTES", 50)
    message = adapterkit("inspect", ADAPTER).message(1)
    assert message.startswith(f"{ADAPTER}/adapter_config.json: 125 bytes, expected at most 50")
    assert not hub.asked("GET .*adapter_config.json")


def test_numbers_that_no_config_has_are_not_listed(hub: Hub, tmp_path: Path) -> None:
    config = b'{"r": 1%s, "lora_alpha": 1%s}' % (b"0" * 400, b"0" * 400)
    (write_adapter(tmp_path / "in" / "x", config=config) / WEIGHTS).rename(tmp_path / "in" / "x" / "adapter_model.bin")
    [row] = json.loads(adapterkit("list", tmp_path / "in", "--json").out)["adapters"]
    assert (row["ranks"], row["alphas"]) == ([], [])


# --- servers that are no Hub -------------------------------------------------------------------------------------------

PAGE = b"<html><body>Sorry \x1b[31m hf_writer</body></html>"


@pytest.mark.parametrize("body", [PAGE, b"", b"null", b"[]", b"{}", b"[" * 100_000])
def test_another_answer_than_a_hub_gives(hub: Hub, adapter: Path, body: bytes) -> None:
    hub.fail("GET /api/(models|whoami).*", body=body, times=99)
    for command in (["inspect", ADAPTER], ["pull", ADAPTER], ["push", adapter, "me/x"]):
        message = adapterkit(*command).message(1)
        assert f"is {hub.url} a Hugging Face Hub?" in message
        assert "hf_writer" not in message
    if body not in (b"[]", b"{}"):
        assert "invalid response (" in adapterkit("list", "--hub").message(1)


@pytest.mark.parametrize(("status", "code"), [(400, 1), (402, 1), (403, 4), (404, 1), (413, 1), (451, 1), (520, 1)])
def test_an_error_page_for_browsers(hub: Hub, adapter: Path, status: int, code: int) -> None:
    hub.fail(".*(whoami|models/|resolve).*", status, body=PAGE, times=99)
    for command in (["inspect", ADAPTER], ["pull", ADAPTER], ["push", adapter, "me/x"]):
        assert "<html>" not in adapterkit(*command).message(code)


@pytest.mark.parametrize("to", ["{url}/api/models/someone/lora", "file:///etc/passwd", "http://[::"])
def test_redirects_that_lead_nowhere(hub: Hub, adapter: Path, to: str) -> None:
    where = to.format(url=hub.url)
    hub.fail("GET /api/models/.*", 307, body=b"", headers=(("Location", where),), times=99)
    assert "cannot be reached" in adapterkit("pull", ADAPTER).message(5)


def test_a_repository_that_was_renamed(hub: Hub, adapter: Path) -> None:
    hub.repos["someone/new"] = hub.repos[ADAPTER]
    for pattern, path in ((f"GET /api/models/{ADAPTER}", "/api/models/someone/new?blobs=true"),):
        hub.fail(pattern, 307, body=b"", headers=(("Location", path),), times=99)
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


def test_more_bytes_than_were_announced_are_not_written(hub: Hub, adapter: Path) -> None:
    weights = files(adapter)[WEIGHTS]
    hub.fail("GET .*safetensors", body=weights + b"x" * 100_000)
    assert files(resolve(ADAPTER))[WEIGHTS] == weights


@pytest.mark.parametrize("status", [200, 204, 304])
def test_fewer_bytes_than_were_announced(hub: Hub, adapter: Path, status: int) -> None:
    hub.fail("GET .*/resolve/.*", status, body=b"", times=99)
    assert "the Hub sent 0 " in adapterkit("inspect", ADAPTER).message(5)
    assert "the Hub sent 0 of " in adapterkit("pull", ADAPTER).message_of_last(5)


def test_small_files_are_checked_and_go_on_as_well(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*README.md", garble=True)
    assert "README.md does not match its hash on the Hub" in adapterkit("pull", ADAPTER).message_of_last(1)
    hub.fail("GET .*README.md", after=10)
    hub.requests.clear()
    resolve(ADAPTER)
    assert [one.span for one in hub.asked("GET .*README.md")] == ["bytes=0-", "bytes=10-"]


def test_where_a_file_is_asked_about_a_busy_hub_is_asked_again(hub: Hub, adapter: Path) -> None:
    hub.fail("HEAD .*safetensors", 503, times=7)  # of which the client makes some tries itself
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


def test_a_pointer_instead_of_the_file_is_not_kept(hub: Hub, adapter: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 6112\n"
    hub.fail("GET .*safetensors", body=pointer)
    assert "a Git LFS pointer instead of adapter_model.safetensors" in adapterkit("pull", ADAPTER).message_of_last(1)
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


@pytest.mark.parametrize(
    ("fault", "code", "received"),
    [
        ({"after": 1000, "times": 9}, 5, 4000),  # the connection is reset, as often as it is asked again
        ({"after": 1000, "headers": (("Content-Length", "99"),), "times": 9}, 5, 99),
        ({"headers": (("Content-Length", "99"),), "times": 9}, 5, 99),
        ({"headers": (("Content-Length", "99999999"),), "after": 500, "times": 9}, 5, 2000),
        ({"status": 416, "times": 9}, 1, 0),
        ({"status": 503, "times": 9}, 5, 0),
        ({"status": 429, "headers": (("Retry-After", "86400"),), "times": 9}, 5, 0),
        ({"status": 403, "times": 9}, 4, 0),
        ({"status": 404, "times": 9}, 1, 0),
        ({"garble": True}, 1, 0),
    ],
)
def test_whatever_interrupts_a_pull_it_ends_with_one_line_and_goes_on(
    hub: Hub, adapter: Path, fault: dict[str, Any], code: int, received: int
) -> None:
    weights = files(adapter)[WEIGHTS]
    hub.fail("GET .*safetensors", **fault)
    adapterkit("pull", ADAPTER).message_of_last(code)
    left = [*Path(constants.HF_HUB_CACHE).rglob(f"{hub.repos[ADAPTER].files()[WEIGHTS].sha256}.adapterkit")]
    assert b"".join(one.read_bytes() for one in left) == weights[:received]
    hub.faults.clear()
    hub.requests.clear()
    assert files(resolve(ADAPTER))[WEIGHTS] == weights
    assert [one.span for one in hub.asked("GET .*safetensors")] == [f"bytes={received}-"]


def test_a_file_that_changes_between_two_ranges_is_not_kept(hub: Hub, adapter: Path) -> None:
    weights = files(adapter)[WEIGHTS]
    hub.fail("GET .*safetensors", after=1000)
    hub.fail("GET .*safetensors", garble=True)
    assert "does not match its hash" in adapterkit("pull", ADAPTER).message_of_last(1)
    assert files(resolve(ADAPTER))[WEIGHTS] == weights


def test_a_wait_without_end_is_not_waited(hub: Hub, adapter: Path) -> None:
    hub.fail("GET /api/models/.*", 429, headers=(("Retry-After", "99999999"),))
    assert "asks to retry in 99,999,999 s" in adapterkit("pull", ADAPTER).message(5)
    assert not hub.slept


# --- answers that do not end -------------------------------------------------------------------------------------------

COMMANDS = (["inspect", ADAPTER], ["pull", ADAPTER], ["list", "--hub"])


@pytest.fixture
def timed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever the clock is read, and the server sends the next byte then."""
    monkeypatch.setattr(limits, "clock", hub.clock)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("command", [*COMMANDS, ["push", ".", "me/x"]])
def test_an_answer_of_a_byte_a_second_is_given_up(hub: Hub, adapter: Path, command: list[str]) -> None:
    hub.fail("GET /api/.*", body=b"[" * 200, piece=1, tick=True)
    assert "does not respond in time; try again later" in adapterkit(*command).message(5)
    assert hub.now < 80


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_file_that_comes_too_slowly_goes_on_later(
    hub: Hub, adapter: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        remote, "PARALLEL_REQUESTS", 1
    )  # else the clock, which moves with this file, runs out for another
    hub.fail("GET .*safetensors", piece=1, tick=True, times=9)
    message = adapterkit(*command).message_of_last(5)
    assert re.search(r"the Hub sent only \d\d bytes in 6\d s; try again later to resume", message)
    hub.faults.clear()
    hub.requests.clear()
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]
    [span] = [one.span for one in hub.asked("GET .*safetensors")]
    assert span == "bytes=0-" if command[0] == "inspect" else re.fullmatch(r"bytes=\d\d-", str(span))


@pytest.mark.usefixtures("timed")
def test_a_slow_line_is_no_fault(hub: Hub, adapter: Path) -> None:
    weights = files(adapter)[WEIGHTS] + bytes(400_000)
    hub.add(ADAPTER, files(adapter) | {"notes.md": weights})
    hub.fail("GET .*notes.md", piece=1100, tick=True)
    assert files(resolve(ADAPTER))["notes.md"] == weights
    assert hub.now > 300


@pytest.mark.parametrize("pattern", ["GET /api/.*", ".*/resolve/.*safetensors"])
def test_headers_that_never_end(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    hub.fail(pattern, slow_headers=True, times=99)
    assert "does not respond" in adapterkit("pull", ADAPTER).message_of_last(5)


@pytest.mark.parametrize("of", ["GET /api/.*", "GET .*/resolve/.*"])
@pytest.mark.parametrize(("status", "code"), [(200, 1), (404, 1), (500, 1)])
def test_an_endless_answer_does_not_fill_the_memory(hub: Hub, adapter: Path, of: str, status: int, code: int) -> None:
    hub.fail(of, status, body=b"[" * (1 << 16), endless=True, times=99)
    if of == "GET /api/.*":
        assert "has more than 16,777,216 bytes" in adapterkit("list", "--hub").message(code)
        assert "has more than 16,777,216 bytes" in adapterkit("push", adapter, "me/x").message(code)
    elif status == 200:
        assert "does not match its hash on the Hub" in adapterkit("pull", ADAPTER).message_of_last(1)
        return
    assert "has more than 16,777,216 bytes" in adapterkit("pull", ADAPTER).message_of_last(code)


@pytest.mark.parametrize("of", ["GET /api/.*", "GET .*/resolve/.*"])
@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_that_unpacks_to_all_memory_is_not_unpacked(hub: Hub, adapter: Path, of: str, status: int) -> None:
    bomb = gzip.compress(b"[" * (1 << 20))
    hub.fail(of, status, body=bomb, headers=(("Content-Encoding", "gzip"),), times=99)
    assert "unexpected Content-Encoding in the Hub's response: gzip" in adapterkit("pull", ADAPTER).message_of_last(1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"[]", "does not end within 100 requests"), (None, "keeps returning the same page of results")],
)
def test_pages_without_end(hub: Hub, adapter: Path, body: bytes | None, expected: str) -> None:
    row = json.dumps([hubserver._info(hub.repos[ADAPTER], "main", False)]).encode()
    link = (("Link", f'<{hub.url}/api/models?cursor=1>; rel="next"'),)
    hub.fail("GET /api/models", body=body or row, headers=link, times=999)
    assert expected in adapterkit("list", "--hub").message_of_last(1)
    assert len(hub.requests) <= 101


def test_a_wait_without_end_is_not_waited_by_the_client_either(hub: Hub, adapter: Path) -> None:
    hub.fail("GET /api/models", 429, headers=(("Retry-After", "99999999"),), times=99)
    hub.fail("POST .*(preupload|batch).*", 429, headers=(("ratelimit", '"api";r=0;t=99999999'),), times=99)
    for command in (["list", "--hub"], ["push", adapter, "me/x"]):
        hub.add("lab/base", {"config.json": b"{}"})
        assert "asks to retry in 99,999,999 s" in adapterkit(*command).message_of_last(5)
    assert not hub.slept


@pytest.mark.parametrize(
    ("fault", "code"),
    [({"after": 3}, 5), ({"status": 503}, 5), ({"status": 404}, 1), ({"status": 401}, 4), ({"body": b"[{]"}, 1)],
)
def test_whatever_interrupts_a_list_it_shows_what_is_here(
    hub: Hub, adapter: Path, fault: dict[str, Any], code: int
) -> None:
    hub.fail("GET /api/models", **fault, times=99)
    result = adapterkit("list", adapter, "--hub")
    assert "adapter" in result.out
    result.message_of_last(code)


# --- where requests go, and the token ------------------------------------------------------------------------------------


def test_the_token_goes_to_no_other_server(hub: Hub, adapter: Path) -> None:
    with hubserver.serving() as other:
        other.tokens["hf_writer"] = hub.tokens["hf_writer"]
        other.add(ADAPTER, files(adapter))
        link = (("Link", f'<{other.url}/api/models?cursor=0>; rel="next"'),)
        hub.fail("GET /api/models", body=b"[]", headers=link)
        assert ADAPTER in adapterkit("list", "--hub").out
        for path in (f"GET /api/models/{ADAPTER}", "GET .*/resolve/.*safetensors"):
            to = other.url + path.removeprefix("GET ").replace(
                ".*/resolve/.*", f"/{ADAPTER}/resolve/main/adapter_model."
            )
            hub.fail(path, 307, body=b"", headers=(("Location", to.replace(".safe", "safe")),))
        adapterkit("inspect", ADAPTER)
        assert len(other.requests) >= 2
        assert {one.token for one in other.requests} == {None}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://huggingface.co/api/models/x", "not encrypted"),
        ("http://evil.example.com/", "not encrypted"),
        ("file:///etc/passwd", "not encrypted"),
        ("https://localhost/x", "a private address"),
        ("https://127.0.0.1:8080/x", "a private address"),
        ("https://2130706433/x", "a private address"),
        ("https://10.1.2.3/x", "a private address"),
        ("https://169.254.169.254/latest/meta-data", "a private address"),
        ("https://[::1]/x", "a private address"),
        ("https://[::ffff:127.0.0.1]/x", "a private address"),
        ("https://metadata.google.internal/x", "a private address"),
        ("https://cdn-lfs.hf.co/x", None),
        ("https://huggingface.co.evil.com/x", None),
        ("https://huggingface.co:444/x", None),
    ],
)
def test_where_a_hub_may_lead(monkeypatch: pytest.MonkeyPatch, address: str, expected: str | None) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    request = SimpleNamespace(url=address, headers={"Authorization": "Bearer hf_writer"})
    if expected is None:
        limits._check_address("a/b", request)
        assert not request.headers
    else:
        with pytest.raises(UnsafeFileError, match=expected):
            limits._check_address("a/b", request)


def test_the_token_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint, address in (
        ("https://hf-mirror.example", "https://HF-mirror.example:443/x"),
        ("x", "https://hf.co/x"),
    ):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        request = SimpleNamespace(url=address, headers={"Authorization": "Bearer hf_writer"})
        limits._check_address("a/b", request)
        assert request.headers


TOKEN = "hf_writer"
ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in TOKEN)


@pytest.mark.parametrize("cut", range(289, 302))
def test_no_part_of_a_token_is_shown_where_a_message_is_cut(hub: Hub, adapter: Path, cut: int) -> None:
    said = "x" * (cut - len("no ")) + "no " + TOKEN + " more"
    body = json.dumps({"error": said.replace("no ", "nor ")}).encode()
    hub.fail("GET /api/models/.*", 418, body=body, headers=(("X-Error-Message", said),))
    message = adapterkit("pull", ADAPTER).message(1)
    assert not any(TOKEN[:n] in message for n in range(4, 10)), message


@pytest.mark.parametrize(
    "echo",
    [
        {"headers": (("X-Error-Message", f"for {TOKEN}"),)}, {"body": f'{{"error": "{TOKEN}"}}'.encode()},
        {"body": f'{{"error": "{ESCAPED}"}}'.encode()}, {"body": f'{{"errors": [{{"message": "{TOKEN}"}}]}}'.encode()},
        {"body": f"<html>{TOKEN}".encode(), "reason": f"Not for {TOKEN}"}, {"body": TOKEN.encode()},
        {"body": base64.b64encode(TOKEN.encode())}, {"body": b'{"error": "hf_' + b"Ab3" * 12 + b'"}'},
        {"headers": (("X-Error-Message", f"Basic {base64.b64encode(TOKEN.encode()).decode()}"),)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 403, 404, 418])
def test_a_hub_that_says_the_token_back(hub: Hub, adapter: Path, echo: dict[str, Any], status: int) -> None:
    hub.fail("(GET|HEAD|POST) .*", status, **echo, times=99)
    for command in (["pull", ADAPTER], ["list", "--hub", "--json"], ["push", adapter, "me/x", "--json"]):
        result = adapterkit(*command)
        text = result.out + result.err
        assert result.code in (1, 4)
        assert not any(one in text for one in (TOKEN, "aGZfd3JpdGVy", "Ab3Ab3", ESCAPED)), text


def test_rows_that_say_the_token_back(hub: Hub, adapter: Path, saying: Callable[..., None]) -> None:
    saying(id=f"a/{TOKEN}", tags=[f"base_model:adapter:x/{TOKEN}"])
    assert TOKEN not in adapterkit("list", "--hub", "--json").out
    hub.fail("GET /api/whoami-v2", body=f'{{"name": "{ESCAPED}"}}'.encode())
    assert TOKEN not in str(adapterkit("push", adapter, "x"))


@pytest.mark.parametrize("token", ["hf_secret in two", "hf_secret\x01", "hf_secretü", "hf_secret\tx", "\x7fhf_secret"])
def test_a_token_that_no_header_can_hold(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    for command in (["inspect", ADAPTER], ["pull", ADAPTER], ["list", "--hub"], ["push", adapter, "me/x"]):
        message = adapterkit(*command).message(4)
        assert "invalid token: contains a space" in message
        assert "secret" not in message
    assert not hub.requests


def test_credentials_in_the_address_of_the_hub_are_not_shown(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//somebody:pass%40word@"))
    hub.fail("GET /api/models/.*", body=b"[", times=9)
    hub.fail("GET /api/whoami-v2", 418, body=b"pass@word somebody:pass%40word")
    for command in (["pull", ADAPTER], ["push", adapter, "me/x"]):
        message = adapterkit(*command).message(1)
        assert "pass" not in message


# --- what belongs to the process -----------------------------------------------------------------------------------------


def globals_of_the_client() -> Any:
    from huggingface_hub.utils.tqdm import progress_bar_states

    theirs, client = logging.getLogger("huggingface_hub"), get_session()
    return (
        client, {name: [*hooks] for name, hooks in client.event_hooks.items()}, client.timeout, theirs.level,
        [(handler, [*handler.filters]) for handler in theirs.handlers], [*theirs.filters], dict(progress_bar_states),
        [*warnings.filters],
    )  # fmt: skip


def test_what_the_client_shares_is_as_it_was(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_session(), "event_hooks", {"request": [lambda _: None], "response": [lambda _: None]})
    before = globals_of_the_client()
    resolve(ADAPTER)
    rows = list_hub(None, "")
    next(rows)
    assert globals_of_the_client() == before  # also while rows are shown
    rows.close()
    hub.fail("GET /api/models/.*", 418, times=1)
    hub.fail("GET /api/models", 503, times=1)
    with pytest.raises(AdapterkitError):
        resolve(ADAPTER)
    adapterkit("list", "--hub")
    with ThreadPoolExecutor(4) as threads:
        assert len({*threads.map(resolve, [ADAPTER] * 8)}) == 1
    assert globals_of_the_client() == before


def test_other_threads_ask_as_they_like(hub: Hub, adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    theirs, notes = logging.getLogger("huggingface_hub"), logging.StreamHandler(io.StringIO())
    theirs.addHandler(notes)

    def meanwhile() -> None:
        big = b"[" + b" " * (17 << 20) + b"]"
        hub.fail("GET /big", body=gzip.compress(big), headers=(("Content-Encoding", "gzip"),))
        answer = get_session().get(f"{hub.url}/big")
        seen.append((len(answer.content), answer.request.extensions["timeout"]["read"]))
        theirs.warning("theirs")
        hub.ended.set()

    hub.fail(f"GET /api/models/{ADAPTER}", hang=True)
    hub.hung = meanwhile
    try:
        assert adapterkit("pull", ADAPTER).code == 0
        assert seen == [((17 << 20) + 2, None)]
        assert notes.stream.getvalue() == "theirs\n"
    finally:
        theirs.removeHandler(notes)


# --- names -------------------------------------------------------------------------------------------------------------


def test_folders_with_any_name(hub: Hub, adapter: Path) -> None:
    folder = "my dir (v2), é'ク"
    hub.add("someone/many", {f"{folder}/{name}": data for name, data in files(adapter).items()})
    assert adapterkit("inspect", "someone/many").message(1).endswith(f"name one of them: someone/many:{folder}")
    assert adapterkit("inspect", f"someone/many:{folder}").code == 0
    assert files(resolve(f"someone/many:{folder}")) == files(adapter)
    assert f"someone/many:{folder}" in adapterkit("list").out


@pytest.mark.parametrize(
    "name", ["", "ünï/x", "~nobody-here/x", "a/b:", "a/b@", "a/b:..", "a/b:c/../d", "a/b@c d", "a\n/b", "/"]
)
def test_names_that_are_none(hub: Hub, name: str) -> None:
    assert "not a valid Hub id" in adapterkit("pull", "--", name).message(1)
    assert adapterkit("inspect", "--", name).code == 1
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/-b", "a/b--c", "a/" + "b" * 300])
def test_names_that_the_client_refuses(hub: Hub, name: str) -> None:
    assert "no such path, and not a valid repository name" in adapterkit("pull", name).message(1)


def test_a_pull_request_can_be_pulled(hub: Hub, adapter: Path) -> None:
    repo = hub.repos[ADAPTER]
    repo.commit(repo.files() | {"README.md": hubserver.Blob(b"theirs", False)}, "theirs", "refs/pr/1")
    assert (resolve(f"{ADAPTER}@refs/pr/1") / "README.md").read_bytes() == b"theirs"


# --- the cache ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_is_a_file(adapter: Path) -> None:
    Path(constants.HF_HUB_CACHE).write_text("x")
    assert "Not a directory" in adapterkit("pull", ADAPTER).message_of_last(1)
    assert adapterkit("inspect", ADAPTER).code == 0
    assert adapterkit("list").code == 0


def test_a_cache_that_cannot_be_written(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = adapterkit("pull", ADAPTER).message_of_last(1)
    assert message.endswith("blobs: Permission denied")


def test_what_is_cut_in_the_cache_is_got_again(hub: Hub, adapter: Path) -> None:
    for blob in (resolve(ADAPTER).parent.parent / "blobs").iterdir():
        os.truncate(blob, 10)
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "README.md"])
@pytest.mark.parametrize("linked", [True, False])
def test_a_flipped_bit_in_the_cache_is_found_and_mended_by_a_pull(
    hub: Hub, adapter: Path, name: str, linked: bool
) -> None:
    path = resolve(ADAPTER)
    known = files(path)
    if not linked:  # as where the cache has no links
        os.replace((path / name).resolve(), path / name)
    flip(path / name)
    [plan] = json.loads(adapterkit("pull", ADAPTER, "--dry-run", "--json").out)["downloads"]
    assert (plan["files"], plan["bytes"]) == (1, len(known[name]))
    assert files(path) != known  # a dry run changes nothing
    hub.fail("GET .*/resolve/.*", garble=True)
    assert "does not match its hash on the Hub" in adapterkit("pull", ADAPTER).message_of_last(1)
    result = adapterkit("pull", ADAPTER)
    assert f"{name} in the cache differs from the Hub; replacing it" in result.err
    assert "1 file, " in result.err
    assert files(path) == known
    assert "up to date, every byte verified" in adapterkit("pull", ADAPTER).err


def test_a_flipped_bit_in_the_cache_does_not_get_into_another_revision(hub: Hub, adapter: Path) -> None:
    flip(resolve(ADAPTER) / WEIGHTS)
    hub.add(ADAPTER, files(adapter) | {"README.md": b"newer"})
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


@pytest.mark.parametrize("of", ["lab/base", ADAPTER])
def test_a_flipped_bit_in_the_cache_does_not_get_into_a_merge(hub: Hub, adapter: Path, tmp_path: Path, of: str) -> None:
    hub.add("lab/base", files(write_base(tmp_path / "base")))
    for one in ("lab/base", ADAPTER):
        resolve(one)
    flip(max(resolve(of).glob("*.safetensors")))
    before = contents(tmp_path)
    for command in (["merge", "lab/base", ADAPTER], ["merge", "lab/base", ADAPTER, "--no-receipt"]):
        message = adapterkit(*command, "-o", tmp_path / "out").message(1)
        assert "is corrupt" in message
        assert "`adapterkit pull` replaces it" in message
    if of == ADAPTER:
        assert "is corrupt" in adapterkit("combine", ADAPTER, "-o", tmp_path / "out").message(1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("hashed", [True, False])
def test_a_hub_that_says_two_things_of_a_file(
    hub: Hub, adapter: Path, saying: Callable[..., None], hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = (("X-Repo-Commit", "0" * 40), ("ETag", '"other"'), ("Content-Length", "6"))
    if not hashed:
        saying(lambda file: file.pop("lfs", None) and file.update(blobId=None))
        monkeypatch.setattr("adapterkit.hub.download.MAX_RESPONSE_BYTES", 1 << 20)
        hub.fail("GET .*safetensors", body=b"x" * (1 << 16), endless=True, times=9)
        assert "the Hub sent more than 1,0" in adapterkit("pull", ADAPTER).message_of_last(1)
        hub.faults.clear()
        assert f"{WEIGHTS} could not be verified: the Hub gives no hash for it" in adapterkit("pull", ADAPTER).err
        return
    hub.fail("HEAD .*safetensors", 200, body=b"", headers=headers, times=9)
    assert adapterkit("pull", ADAPTER).code == 1


def test_a_note_of_the_cache_that_is_broken(adapter: Path) -> None:
    refs = Path(constants.HF_HUB_CACHE) / "models--someone--lora" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"\xff\xfe")
    assert adapterkit("inspect", ADAPTER).code == 0
    assert adapterkit("list").code == 0
    assert adapterkit("pull", ADAPTER).message_of_last(1)


def test_two_pulls_at_once_get_it_once(hub: Hub, adapter: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        one, other = both.map(resolve, [ADAPTER, ADAPTER])
    assert one == other
    assert files(one)[WEIGHTS] == files(adapter)[WEIGHTS]
    assert len(hub.asked("GET .*safetensors")) == 1
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.adapterkit"))


# --- ctrl-C ------------------------------------------------------------------------------------------------------------


def press(once: Callable[[], bool] = lambda: True) -> None:
    """Ctrl-C, as the terminal sends it, when `once` is so."""
    while not once():
        pass
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def test_ctrl_c_ends_a_pull_at_once_and_it_goes_on(hub: Hub, adapter: Path) -> None:
    weights = files(adapter)[WEIGHTS]
    hub.fail("GET .*safetensors", after=1000, hang=True)
    blobs = Path(constants.HF_HUB_CACHE) / "models--someone--lora" / "blobs"
    left = blobs / f"{hub.repos[ADAPTER].files()[WEIGHTS].sha256}.adapterkit"
    hub.hung = lambda: press(lambda: left.stat().st_size == 1000)
    message = adapterkit("pull", ADAPTER).message_of_last(130)
    assert message == f"interrupted; the next download of {ADAPTER} resumes from here"
    assert left.read_bytes() == weights[:1000]
    hub.requests.clear()
    [plan] = json.loads(adapterkit("pull", ADAPTER, "--dry-run", "--json").out)["downloads"]
    assert plan["bytes"] <= sum(len(blob.data) for blob in hub.repos[ADAPTER].files().values()) - 1000
    hub.ended.set()  # and with it the first request, which has the file until then
    assert files(resolve(ADAPTER))[WEIGHTS] == weights
    assert [one.span for one in hub.asked("GET .*safetensors")] == ["bytes=1000-"]


def test_ctrl_c_ends_an_inspect_at_once(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*safetensors", after=10, hang=True)
    hub.hung = press
    assert adapterkit("inspect", ADAPTER).code == 130


def test_the_first_failure_ends_what_is_side_by_side() -> None:
    seen = []

    def work(number: int) -> int:
        seen.append(number)
        if number == 2:
            raise ValueError("two")
        return number * number

    with pytest.raises(ValueError, match="two"):
        parallel_map(work, range(100), 1)
    assert seen == [0, 1, 2]
    assert parallel_map(work, [3, 4, 5], 8) == [9, 16, 25]
    assert parallel_map(work, [], 8) == []


@pytest.mark.parametrize("kind", ["a link", "a hard link", "a named pipe"])
def test_no_other_file_is_written_through_what_an_earlier_pull_left(
    hub: Hub, adapter: Path, tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{ADAPTER.replace('/', '--')}" / "blobs"
    left = blobs / f"{hub.repos[ADAPTER].files()[WEIGHTS].sha256}.adapterkit"
    blobs.mkdir(parents=True)
    if kind == "a link":
        left.symlink_to(mine)
    elif kind == "a hard link":
        left.hardlink_to(mine)
    else:
        os.mkfifo(left)
    assert left.name in adapterkit("pull", ADAPTER).message_of_last(1)
    assert mine.read_bytes() == b"mine"
    left.unlink()
    assert adapterkit("pull", ADAPTER).code == 0
