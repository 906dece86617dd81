"""Strangers' repositories, servers that are no Hub, broken caches, and ctrl-C: one clear error, and nothing elsewhere."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hubserver
import pytest
from handmade import CONFIG, adapterkit, contents, write_adapter, write_base
from hubserver import Hub
from huggingface_hub import constants

from adapterkit.hub import resolve
from adapterkit.hub.abreast import abreast
from adapterkit.hub.names import is_inner

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
        assert "has a name that cannot be used here" in adapterkit(*command).message(1)
    assert not is_inner(name)
    assert not hub.asked("GET .*/resolve/.*")
    assert not list(tmp_path.rglob("x.json"))


def test_an_index_whose_name_leads_elsewhere_is_not_written(hub: Hub, tmp_path: Path) -> None:
    hub.add("lab/base", files(write_base(tmp_path / "base")) | {f"{tmp_path}/evil.safetensors.index.json": b"{}"})
    assert "cannot be used here" in adapterkit("inspect", "lab/base").message(1)
    assert not (tmp_path / "evil.safetensors.index.json").exists()


@pytest.mark.parametrize("size", [2**62, -1, None, "12", 1.5])
def test_a_size_that_no_file_has(adapter: Path, saying: Callable[..., None], size: Any) -> None:
    saying(lambda file: file.update(size=size))
    for command in ("inspect", "pull"):
        assert f"is said to be {size} bytes long" in adapterkit(command, ADAPTER).message(1)


@pytest.mark.parametrize("sha256", ["../../../../x", "A" * 64, "", "0" * 63])
def test_a_hash_that_is_none_is_no_path(
    adapter: Path, tmp_path: Path, saying: Callable[..., None], sha256: str
) -> None:
    before = contents(tmp_path)
    saying(lambda file: file.get("lfs", {}).update(sha256=sha256))
    message = adapterkit("pull", ADAPTER).message_of_last(1)
    assert "goes by a hash that is none" in message
    assert contents(tmp_path) == before
    saying(lambda file: file.update(blobId="../x"))
    assert "goes by a hash that is none" in adapterkit("pull", ADAPTER).message(1)


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
        assert "the answer is none of a Hub's" in adapterkit(*command).message(1)


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
    assert message.startswith(f"{ADAPTER}/adapter_config.json: is 125 bytes long, which no config is")
    assert not hub.asked("GET .*adapter_config.json")


def test_numbers_that_no_config_has_are_not_listed(hub: Hub, tmp_path: Path) -> None:
    config = b'{"r": 1%s, "lora_alpha": 1%s}' % (b"0" * 400, b"0" * 400)
    (write_adapter(tmp_path / "in" / "x", config=config) / WEIGHTS).rename(tmp_path / "in" / "x" / "adapter_model.bin")
    [row] = json.loads(adapterkit("list", tmp_path / "in", "--json").out)
    assert (row["ranks"], row["alphas"]) == ([], [])


# --- servers that are no Hub -------------------------------------------------------------------------------------------

PAGE = b"<html><body>Sorry \x1b[31m hf_writer</body></html>"


@pytest.mark.parametrize("body", [PAGE, b"", b"null", b"[]", b"{}", b"[" * 100_000])
def test_another_answer_than_a_hub_gives(hub: Hub, adapter: Path, body: bytes) -> None:
    hub.fail("GET /api/(models|whoami).*", body=body, times=99)
    for command in (["inspect", ADAPTER], ["pull", ADAPTER], ["push", adapter, "me/x"]):
        message = adapterkit(*command).message(1)
        assert f"Is {hub.url} one?" in message
        assert "hf_writer" not in message
    if body not in (b"[]", b"{}"):
        assert "the answer is none of a Hub's" in adapterkit("list", "--hub").message(1)


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
    assert "README.md came with other bytes than the Hub says" in adapterkit("pull", ADAPTER).message_of_last(1)
    hub.fail("GET .*README.md", after=10)
    hub.requests.clear()
    resolve(ADAPTER)
    assert [one.span for one in hub.asked("GET .*README.md")] == ["bytes=0-", "bytes=10-"]


def test_where_a_file_is_asked_about_a_busy_hub_is_asked_again(hub: Hub, adapter: Path) -> None:
    hub.fail("HEAD .*safetensors", 503, times=7)  # of which the client makes some tries itself
    assert files(resolve(ADAPTER))[WEIGHTS] == files(adapter)[WEIGHTS]


def test_a_wait_without_end_is_not_waited(hub: Hub, adapter: Path) -> None:
    hub.fail("GET /api/models/.*", 429, headers=(("Retry-After", "99999999"),))
    assert "asks to come back in 99,999,999 s" in adapterkit("pull", ADAPTER).message(5)
    assert not hub.slept


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
    assert "is no name that the Hub allows" in adapterkit("pull", "--", name).message(1)
    assert adapterkit("inspect", "--", name).code == 1
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/-b", "a/b--c", "a/" + "b" * 300])
def test_names_that_the_client_refuses(hub: Hub, name: str) -> None:
    assert "neither a local path nor a name that the Hub allows" in adapterkit("pull", name).message(1)


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
    assert message == f"interrupted; what came of {ADAPTER} is kept, and getting it again goes on from there"
    assert left.read_bytes() == weights[:1000]
    hub.requests.clear()
    [plan] = json.loads(adapterkit("pull", ADAPTER, "--dry-run", "--json").out)
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
        abreast(work, range(100), 1)
    assert seen == [0, 1, 2]
    assert abreast(work, [3, 4, 5], 8) == [9, 16, 25]
    assert abreast(work, [], 8) == []
