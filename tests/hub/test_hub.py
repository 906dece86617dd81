"""The Hub through its real client, against a server of our own: headers alone, pulling, listing, and what goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib.util import module_from_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, Terminal, adapterkit, contents, packed, write_adapter, write_base
from hubserver import Hub, Token
from huggingface_hub import constants
from safetensors.torch import load_file

import adapterkit as package
from adapterkit.errors import OfflineError, UsageError
from adapterkit.hub import HubId, as_hub_id, hub_repo, is_hub_id, remote, resolve
from adapterkit.hub.locate import Location, locate
from adapterkit.hub.names import hub_cache, parse_hub_id

ADAPTER = "someone/lora"
BASE = "lab/base"


def files(folder: Path) -> dict[str, bytes]:
    """What a repository made of `folder` has."""
    return {name: data for name, data in contents(folder).items() if data is not None}


@pytest.fixture
def adapter(hub: Hub, tmp_path: Path) -> Path:
    """An adapter for `BASE`, in a folder and on the Hub."""
    folder = write_adapter(tmp_path / "adapter", config=CONFIG | {"base_model_name_or_path": BASE})
    hub.add(ADAPTER, files(folder) | {"README.md": card(BASE)}, downloads=12, likes=3)
    return folder


@pytest.fixture
def base(hub: Hub, tmp_path: Path) -> Path:
    """The base, in a folder and on the Hub."""
    folder = write_base(tmp_path / "base")
    hub.add(BASE, files(folder))
    return folder


def card(base: str, **more: str) -> bytes:
    lines = [f"base_model: {base}", "library_name: peft", *(f"{key}: {value}" for key, value in more.items())]
    return ("---\n" + "\n".join(lines) + "\n---\n# It\n").encode()


def output(*args: str | Path) -> Any:
    """What a command prints as JSON."""
    result = adapterkit(*args, "--json")
    assert result.code == 0, result
    return json.loads(result.out)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1", HubId("org/name", "v1")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name:a/b", HubId("org/name", None, "a/b")),
        ("org/name@v1:a", HubId("org/name", "v1", "a")),
        ("name", None),
        ("a/b/c", None),
        ("./a", None),
        ("/a/b", None),
        ("../a", None),
        ("a/..", None),
        ("org/name:../x", None),
    ],
)
def test_names(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected
    assert is_hub_id(text) is (expected is not None)
    if expected is not None:
        assert str(expected) == text
        assert hub_repo(text) == "org/name"


def test_what_lies_here_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_hub_id("a/b") == HubId("a/b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert as_hub_id("a/b") is None
    assert hub_repo("a/b") is None


# --- headers alone ---------------------------------------------------------------------------------------------------


CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize("value", ["", "/a", "~/a", "$HOME/a", "~nobody/${XDG_CACHE_HOME}", "a//../$UNSET/~"])
def test_the_cache_is_where_the_client_has_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the client is not imported for that, since it takes longer than completing a name may."""
    spec = constants.__spec__
    assert spec is not None and spec.loader is not None
    for some in (some for n in range(5) for some in combinations(CACHES, n)):
        for name in CACHES:
            monkeypatch.delenv(name, raising=False)
        for name in some:
            monkeypatch.setenv(name, f"{value}/{name}" if value else "")
        again = module_from_spec(spec)
        spec.loader.exec_module(again)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "huggingface_hub.constants")
            assert hub_cache() == Path(again.HF_HUB_CACHE), some


def test_inspect_reads_headers_only(hub: Hub, adapter: Path) -> None:
    remote = output("inspect", ADAPTER)
    local = output("inspect", adapter, "--header-only")
    weights = hub.repos[ADAPTER].files()["adapter_model.safetensors"].data
    header = 8 + int.from_bytes(weights[:8], "little")
    assert remote["summary"] == local["summary"]
    assert remote["modules"] == local["modules"]
    assert header < len(weights) < 100_000
    assert remote["fetched"] == len(weights) + len(files(adapter)["adapter_config.json"])
    assert [one.span for one in hub.asked("GET .*safetensors")] == ["bytes=0-99999"]
    assert not (Path(constants.HF_HUB_CACHE)).exists()


def test_a_long_header_takes_a_second_request_for_just_the_rest(hub: Hub, tmp_path: Path) -> None:
    names = [f"base_model.model.layers.{i}.{'x' * 200}.lora_{side}.weight" for i in range(300) for side in "AB"]
    tensors = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
    }
    data = packed(tensors, bytes(4 * len(names)))
    length = len(data) - 4 * len(names)
    hub.add(ADAPTER, {"adapter_model.safetensors": data, "adapter_config.json": b'{"r": 1, "lora_alpha": 1}'})
    assert length > 100_000
    assert output("inspect", ADAPTER)["summary"]["modules"] == 300
    assert [one.span for one in hub.asked("GET .*safetensors")] == ["bytes=0-99999", f"bytes=100000-{length - 1}"]


def test_a_server_without_ranges_gives_the_same(hub: Hub, adapter: Path) -> None:
    known = output("inspect", ADAPTER)
    hub.ranges = False
    assert output("inspect", ADAPTER) == known


@pytest.mark.parametrize("how", [{"after": 60}, {"piece": 97}, {"status": 503}])
def test_headers_come_through_a_bad_line(hub: Hub, adapter: Path, how: dict[str, int]) -> None:
    known = output("inspect", ADAPTER)
    hub.fail("GET .*/resolve/.*", **how, times=2)
    found = output("inspect", ADAPTER)
    assert all("retrying" in note for note in found.pop("notes")) and found.items() <= known.items()


def test_the_text_says_what_was_fetched(hub: Hub, adapter: Path) -> None:
    result = adapterkit("inspect", ADAPTER)
    assert "fetched " in result.out
    assert "--full gets the" in result.out
    assert "‖ΔW‖" not in result.out
    assert "‖ΔW‖" in adapterkit("inspect", ADAPTER, "--full").out
    assert "‖ΔW‖" in adapterkit("inspect", ADAPTER).out  # which has it in the cache now


def test_a_base_and_how_an_adapter_fits_it(hub: Hub, adapter: Path, base: Path) -> None:
    known = output("inspect", base)
    found = output("inspect", BASE)
    assert found["stored"] == known["stored"]
    assert found["fetched"] > 0
    match = output("inspect", ADAPTER, "--against", BASE)["against"]
    assert (match["found"], match["total"]) == (4, 4)
    assert all(one.span for one in hub.asked("GET .*safetensors"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\xff" * 16, "header"),
        (packed({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)), "x"),
    ],
)
def test_broken_weights_are_told_by_their_name_on_the_hub(hub: Hub, data: bytes, expected: str) -> None:
    hub.add(ADAPTER, {"adapter_model.safetensors": data, "adapter_config.json": b"{}"})
    message = adapterkit("inspect", ADAPTER).message(1)
    assert message.startswith(f"{ADAPTER}/adapter_model.safetensors: ")
    assert "/tmp" not in message


def test_what_has_no_header_is_refused(hub: Hub) -> None:
    hub.add(ADAPTER, {"adapter_model.bin": b"x", "adapter_config.json": b"{}"})
    assert "--full downloads them" in adapterkit("inspect", ADAPTER).message(1)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--header-only", "--full"], "give one of them"),
        (["--plot", "x.png"], "say --full"),
    ],
)
def test_options_that_do_not_go_with_headers(hub: Hub, adapter: Path, args: list[str], expected: str) -> None:
    assert expected in adapterkit("inspect", ADAPTER, *args).message(2)


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_several_adapters_want_a_name(hub: Hub, adapter: Path) -> None:
    data = files(adapter)
    hub.add("someone/many", {f"{folder}/{name}": text for folder in ("en", "de/x") for name, text in data.items()})
    message = adapterkit("inspect", "someone/many").message(1)
    assert message.endswith("several adapters in folders; name one of them: someone/many:de/x, someone/many:en")
    assert output("inspect", "someone/many:de/x")["summary"]["modules"] == 4
    assert files(resolve("someone/many:en")) == data
    assert "no folder no in the repository" in adapterkit("inspect", "someone/many:no").message(1)


def test_what_is_not_the_adapter_stays_there(hub: Hub, adapter: Path) -> None:
    rest = {"optimizer.pt": b"x", "checkpoint-5/adapter_model.safetensors": b"x", ".hidden.json": b"{}", "a.png": b"x"}
    hub.add("someone/all", files(adapter) | rest)
    assert files(resolve("someone/all")) == files(adapter)


def test_what_is_not_the_base_stays_there(hub: Hub, base: Path) -> None:
    rest = {"original/consolidated.safetensors": b"x", "consolidated.safetensors": b"x", "model.gguf": b"x"}
    hub.add("lab/all", files(base) | rest | {"original/params.json": b"{}"})
    assert files(resolve("lab/all")) == files(base) | {"original/params.json": b"{}"}


def test_a_repository_with_neither(hub: Hub) -> None:
    hub.add("someone/text", {"README.md": b"hello"})
    assert "neither an adapter nor a base" in adapterkit("pull", "someone/text").message(1)


# --- pulling ---------------------------------------------------------------------------------------------------------


def test_pull_gets_the_same_bytes_and_asks_once(hub: Hub, adapter: Path) -> None:
    first = adapterkit("pull", ADAPTER)
    assert first.code == 0
    assert "3 files" in first.err
    folder = Path(first.out.strip())
    assert files(folder) == files(adapter) | {"README.md": card(BASE)}
    asked = len(hub.asked("GET .*/resolve/.*"))
    again = adapterkit("pull", ADAPTER)
    assert (again.out, len(hub.asked("GET .*/resolve/.*"))) == (first.out, asked)
    assert "up to date" in again.err


def test_pull_shows_progress_as_json_lines(hub: Hub, adapter: Path) -> None:
    lines = [
        json.loads(line)
        for line in adapterkit("--progress", "json", "pull", ADAPTER).err.splitlines()
        if line[0] == "{"
    ]
    whole = sum(len(blob.data) for blob in hub.repos[ADAPTER].files().values())
    assert lines[-1] == {"progress": f"downloading {ADAPTER}", "done": whole, "total": whole}
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)


def test_pull_into_a_folder(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "here"
    assert adapterkit("pull", ADAPTER, "-o", out).out.strip() == str(out)
    assert files(out)["adapter_model.safetensors"] == files(adapter)["adapter_model.safetensors"]
    assert not any(path.is_symlink() for path in out.iterdir())
    assert "already exists" in adapterkit("pull", ADAPTER, "-o", out).message(7)


@pytest.mark.parametrize("where", ["", "x", "../x", "../../blobs/x"])
@pytest.mark.parametrize("command", ["pull", "train", "train --init-from", "eval", "eval ADAPTER"])
def test_no_output_goes_where_the_cache_has_an_input(
    hub: Hub, adapter: Path, base: Path, tmp_path: Path, command: str, where: str
) -> None:
    """Into a snapshot or beside it: refused before anything is asked of the Hub."""
    name = ADAPTER if command in ("train --init-from", "eval ADAPTER") else BASE
    snapshot = Path(adapterkit("pull", name).out.strip())
    (snapshot / ("config.json" if name == BASE else "adapter_config.json")).unlink()  # to be got again
    (tmp_path / "data.jsonl").write_text('{"text": "x"}')
    out, data, before, asked = snapshot / where, tmp_path / "data.jsonl", contents(tmp_path), len(hub.requests)
    args = {
        "pull": (BASE, "-o", out), "train": (BASE, data, "-o", out, "--overwrite"),
        "train --init-from": (base, data, "--init-from", ADAPTER, "-o", out, "--overwrite"),
        "eval": (BASE, data, "--predictions", out / "p", "--overwrite"),
        "eval ADAPTER": (base, ADAPTER, data, "--predictions", out / "p", "--overwrite"),
    }  # fmt: skip
    message = adapterkit(command.split()[0], *args[command]).message(2)
    assert f"is the input {tmp_path / 'hub-cache' / 'models--'}" in message
    assert contents(tmp_path) == before and len(hub.requests) == asked


def test_a_pull_is_planned_and_run_in_python(hub: Hub, adapter: Path, base: Path, tmp_path: Path) -> None:
    plan = package.plan_pull([ADAPTER, BASE])
    texts = str(plan), adapterkit("pull", ADAPTER, BASE, "--dry-run").out
    python, printed = (re.sub("[0-9.]+ GB free", "", text) for text in texts)  # others use the disk too
    assert python.splitlines() == printed.splitlines()[:2]
    assert not hub.asked("GET .*/resolve/.*")
    *moved, last = package.run(pickle.loads(pickle.dumps(plan)))
    counts = [event for event in moved if isinstance(event, package.BytesDone)]
    assert all(one.done <= one.total for one in counts) and counts[-1].what == f"downloading {BASE}"
    assert [event.id for event in moved if isinstance(event, package.Fetched)] == [ADAPTER, BASE]
    assert last == package.Pulled((resolve(ADAPTER), resolve(BASE)))
    assert package.pull(ADAPTER, tmp_path / "copy").path == tmp_path / "copy"
    assert files(tmp_path / "copy").items() >= files(adapter).items()
    with pytest.raises(UsageError, match="one ID at a time"):
        package.pull([ADAPTER, BASE], "x")


def test_pull_dry_run_gets_nothing(hub: Hub, adapter: Path) -> None:
    [facts] = output("pull", ADAPTER, "--dry-run")["downloads"]
    assert facts["bytes"] == sum(len(blob.data) for blob in hub.repos[ADAPTER].files().values())
    assert not hub.asked("GET .*/resolve/.*")


@pytest.mark.parametrize("revision", ["old", "branch", "commit"])
def test_pull_of_a_revision(hub: Hub, adapter: Path, revision: str) -> None:
    repo = hub.repos[ADAPTER]
    first = repo.branches["main"]
    repo.tags["old"] = repo.branches["branch"] = first
    hub.add(ADAPTER, files(adapter) | {"README.md": b"newer"})
    name = first if revision == "commit" else revision
    assert (resolve(f"{ADAPTER}@{name}") / "README.md").read_bytes() == card(BASE)
    assert (resolve(ADAPTER) / "README.md").read_bytes() == b"newer"


def test_a_name_is_asked_anew_and_what_changed_is_got(hub: Hub, adapter: Path) -> None:
    resolve(ADAPTER)
    hub.add(ADAPTER, files(adapter) | {"README.md": b"newer"})
    before = len(hub.asked("GET .*safetensors"))
    assert (resolve(ADAPTER) / "README.md").read_bytes() == b"newer"
    assert len(hub.asked("GET .*safetensors")) == before  # the weights are the same


def test_a_line_that_breaks_is_taken_up_again(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*safetensors", after=1000, times=2)
    assert files(resolve(ADAPTER)) == files(adapter) | {"README.md": card(BASE)}
    assert [one.span for one in hub.asked("GET .*safetensors")] == ["bytes=0-", "bytes=1000-", "bytes=2000-"]


def test_an_interrupted_pull_goes_on_where_it_was(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*safetensors", after=1000, times=1)
    hub.fail("GET .*safetensors", status=503, times=9)
    assert "out of service (503)" in adapterkit("pull", ADAPTER).message_of_last(5)
    hub.faults.clear()
    hub.requests.clear()
    assert adapterkit("pull", ADAPTER).code == 0
    assert [one.span for one in hub.asked("GET .*safetensors")] == ["bytes=1000-"]
    assert files(resolve(ADAPTER)) == files(adapter) | {"README.md": card(BASE)}
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.adapterkit"))


def test_a_line_that_stays_broken_ends_and_keeps_what_came(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*safetensors", after=100, times=99)
    assert "cannot be reached" in adapterkit("pull", ADAPTER).message_of_last(5)
    weights = hub.repos[ADAPTER].files()["adapter_model.safetensors"]
    [left] = Path(constants.HF_HUB_CACHE).rglob(f"{weights.sha256}.adapterkit")
    assert left.read_bytes() == files(adapter)["adapter_model.safetensors"][:400]


def test_other_bytes_than_the_hub_names_are_not_kept(hub: Hub, adapter: Path) -> None:
    hub.fail("GET .*safetensors", garble=True)
    assert "does not match its hash on the Hub" in adapterkit("pull", ADAPTER).message_of_last(1)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*safetensors*"))
    assert files(resolve(ADAPTER)) == files(adapter) | {"README.md": card(BASE)}


def test_too_small_a_disk_is_told_before_the_first_byte(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "has 1 free;" in adapterkit("pull", ADAPTER).message_of_last(6)
    assert not hub.asked("GET .*/resolve/.*")


def test_several_at_a_time_and_names_that_are_none(hub: Hub, adapter: Path, base: Path) -> None:
    assert len(adapterkit("pull", ADAPTER, BASE).out.splitlines()) == 2
    assert "one ID at a time" in adapterkit("pull", ADAPTER, BASE, "-o", "x").message(2)
    assert "not a valid Hub id" in adapterkit("pull", "./x").message(1)


# --- merging ---------------------------------------------------------------------------------------------------------


def test_a_merge_of_what_is_on_the_hub(hub: Hub, adapter: Path, base: Path, tmp_path: Path) -> None:
    assert adapterkit("merge", BASE, ADAPTER, "-o", tmp_path / "theirs").code == 0
    assert adapterkit("merge", base, adapter, "-o", tmp_path / "ours").code == 0
    for name, data in files(tmp_path / "ours").items():
        if name.endswith(".safetensors"):
            assert files(tmp_path / "theirs")[name] == data
    assert json.loads(files(tmp_path / "theirs")["adapterkit_merge.json"])["base"]["name"] == BASE


def test_a_plan_takes_headers_only(hub: Hub, adapter: Path, base: Path, tmp_path: Path) -> None:
    plan = output("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--dry-run")
    assert plan["tensors_changed"] == 4
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_tokenizer_on_the_hub_is_compared_after_the_download(
    hub: Hub, adapter: Path, base: Path, tmp_path: Path
) -> None:
    hub.add(ADAPTER, files(adapter) | {"chat_template.jinja": b"{{ messages }}"})
    for more in ([], ["--tokenizer", "adapter"]):
        result = adapterkit("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--dry-run", *more)
        assert (result.code, "compared with the base's once they are downloaded" in result.err) == (0, True)
    result = adapterkit("merge", BASE, ADAPTER, "-o", tmp_path / "out")
    assert "whose chat_template.jinja differs from the base's" in result.err and result.code == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_plan_takes_values_where_shapes_are_values(
    hub: Hub, adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nf4 stores shapes in tensors, so headers are not enough."""
    monkeypatch.setattr(remote, "FIRST_REQUEST", 8)  # or it reads all of a file as small as this
    assert adapterkit("quantize", base, "--to", "nf4", "-o", tmp_path / "nf4").code == 0
    hub.add(f"{BASE}-nf4", files(tmp_path / "nf4"))
    plan = output("merge", f"{BASE}-nf4", ADAPTER, "-o", tmp_path / "out", "--dry-run")
    assert plan["tensors_changed"] == 4


def test_what_does_not_fit_is_told_before_it_is_downloaded(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.add(BASE, files(write_base(tmp_path / "other", rows=40)))
    message = adapterkit("merge", BASE, ADAPTER, "-o", tmp_path / "out").message(3)
    assert "the base weight is" in message
    assert not Path(constants.HF_HUB_CACHE).exists()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_not_there(hub: Hub, adapter: Path, base: Path) -> None:
    assert adapterkit("pull", "someone/lara").message(1).endswith("Did you mean someone/lora?")
    assert "Did you mean" not in adapterkit("pull", "who/what").message(1)


@pytest.mark.parametrize(("token", "said"), [("hf_reader", "this token has no access to it"), ("", "`hf auth login`")])
def test_what_is_private_may_be_there(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    hub.repos[ADAPTER].private = True
    monkeypatch.setenv("HF_TOKEN", token)
    assert said in adapterkit("pull", ADAPTER).message(1)


def test_what_is_gated_says_where_to_ask(hub: Hub, adapter: Path) -> None:
    hub.repos[ADAPTER].gated = True
    for command in ("pull", "inspect"):
        assert adapterkit(command, ADAPTER).message_of_last(4).endswith(f"request access at {hub.url}/{ADAPTER}")
    hub.tokens["hf_writer"] = Token("me", gates=(ADAPTER,))
    assert adapterkit("pull", ADAPTER).code == 0


def test_a_token_that_is_wrong(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = adapterkit("pull", ADAPTER).message(4)
    assert "invalid token" in message
    assert "hf_wrong" not in message


def test_a_revision_that_is_not_there(hub: Hub, adapter: Path) -> None:
    hub.repos[ADAPTER].tags["v1"] = hub.repos[ADAPTER].branches["main"]
    assert adapterkit("pull", f"{ADAPTER}@v2").message(1).endswith("revision not found; expected one of main, v1")


def test_a_hub_that_asks_to_wait(hub: Hub, adapter: Path) -> None:
    hub.fail("GET /api/models/.*", 429, headers=(("Retry-After", "7"),))
    hub.fail("GET /api/models/.*", 429, headers=(("ratelimit", '"api";r=0;t=9'),))
    result = adapterkit("pull", ADAPTER)
    assert (result.code, hub.slept) == (0, [7, 9])
    assert "note: the Hub is busy (429); retrying in 7 s" in result.err


@pytest.mark.parametrize(("status", "said"), [(500, "out of service (500)"), (429, "rate limit exceeded (429)")])
def test_a_hub_that_stays_busy_is_asked_so_often(hub: Hub, adapter: Path, status: int, said: str) -> None:
    hub.fail("GET /api/models/.*", status, times=99)
    assert f"{said}, also after retries; try again later" in adapterkit("pull", ADAPTER).message_of_last(5)
    assert len(hub.asked("GET /api/models/.*")) == 4
    assert hub.slept == [1, 2, 4]


@pytest.mark.parametrize("command", [["pull", ADAPTER], ["list", ".", "--hub"]])
def test_a_hub_that_hangs(hub: Hub, monkeypatch: pytest.MonkeyPatch, command: list[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    hub.fail("GET .*", hang=True, times=99)
    assert "does not respond" in adapterkit(*command).message_of_last(5)


def test_no_hub_at_all(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = resolve(ADAPTER)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "cannot be reached" in adapterkit("pull", ADAPTER).message(5)
    result = adapterkit("inspect", ADAPTER)
    assert result.code == 0
    assert "using the Hub cache" in result.err
    assert resolve(ADAPTER) == known


def test_an_argument_lies_in_one_of_four_places(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function says in which, and tells of a download as it goes on."""
    told: list[tuple[int, int]] = []

    @contextmanager
    def tell(what: str) -> Iterator[Callable[[int, int], None]]:
        assert what == f"downloading {ADAPTER}"
        yield lambda done, total: told.append((done, total))

    assert locate(adapter) == Location(adapter, "local")
    with ExitStack() as outlines:
        place = locate(ADAPTER, outlines)
        assert place.how == "headers" and 0 < (place.fetched or 0) < place.size and place.path.is_dir()
    assert not place.path.exists()
    monkeypatch.setattr("adapterkit.hub.locate.on_download", ContextVar("on_download", default=tell))
    place = locate(ADAPTER)
    assert place.how == "downloaded" and told[-1][0] == told[-1][1] > 0
    told.clear()
    with ExitStack() as outlines:
        assert locate(ADAPTER, outlines) == locate(ADAPTER) == Location(place.path, "cached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(ADAPTER) == Location(place.path, "cached") and not told
    with pytest.raises(OfflineError):
        locate(BASE)


def test_offline_the_cache_is_used(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = resolve(ADAPTER)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(ADAPTER) == known
    assert adapterkit("inspect", ADAPTER).code == 0
    assert "HF_HUB_OFFLINE" in adapterkit("inspect", "someone/else").message(5)
    assert not hub.requests


def test_the_token_is_never_shown(hub: Hub, adapter: Path) -> None:
    hub.fail("GET /api/models/.*", 418, headers=(("X-Error-Message", "no tea for hf_writer"),))
    assert adapterkit("pull", ADAPTER).message(1).startswith(f"{ADAPTER}: the Hub refused (418): no tea for hf_…")
    hub.fail("GET /api/models/.*", 403, headers=(("X-Error-Message", "not for hf_writer"),))
    assert "hf_writer" not in adapterkit("pull", ADAPTER).message(4)


# --- listing ---------------------------------------------------------------------------------------------------------


def rows(*args: str | Path) -> list[Any]:
    """What `adapterkit list` finds."""
    found = output("list", *args)["adapters"]
    assert isinstance(found, list)
    return found


def test_list_of_folders(hub: Hub, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "in" / "a", config=CONFIG | {"base_model_name_or_path": BASE})
    two = write_adapter(tmp_path / "in" / "b" / "ünï コ", config=CONFIG | {"r": 4, "lora_alpha": 9})
    write_base(tmp_path / "in" / "base")
    found = rows(tmp_path / "in")
    assert [row["name"] for row in found] == [str(one), str(two)]
    assert [row["alphas"] for row in found] == [[6.0], [9.0]]
    assert found[0]["ranks"] == [4]
    assert found[0]["targets"] == ["o_proj", "q_proj"]
    assert found[0]["size"] == sum(tensor.nbytes for tensor in load_file(one / "adapter_model.safetensors").values())
    assert [row["name"] for row in rows(tmp_path / "in", "--base", BASE)] == [str(one)]
    assert [row["name"] for row in rows(tmp_path / "in", "--search", "コ q_proj")] == [str(two)]
    assert "ünï" in adapterkit("list", tmp_path / "in").out
    in_python = package.list_adapters(tmp_path / "in", search="コ")
    assert [row.path for row in in_python] == [two]
    assert repr(in_python[0]) == f"<AdapterEntry: {two}: LoRA, rank 4, o_proj, q_proj>"
    for wrong, said in (
        ({"details": True}, "needs `hub`"),
        ({"limit": 7}, "`limit` needs `hub`"),
        ({"limit": 0}, "1 or more"),
        ({"sort": "nam"}, "mean name"),
    ):
        with pytest.raises(UsageError, match=said):
            package.list_adapters(tmp_path, **wrong)


def test_list_tells_what_is_wrong(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "in" / "cut").mkdir(parents=True)
    (tmp_path / "in" / "cut" / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "in" / "half").mkdir()
    (tmp_path / "in" / "half" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 3, "target_modules": ["q"]}')
    (tmp_path / "in" / "bad").mkdir()
    (tmp_path / "in" / "bad" / "adapter_config.json").write_text("{")
    bad, cut, half = rows(tmp_path / "in")
    assert "JSON" in bad["problem"]
    assert cut["problem"]
    assert (half["state"], half["ranks"], half["problem"]) == ("partial", [8], "weights are missing")
    assert "⚠" in adapterkit("list", tmp_path / "in").out
    assert adapterkit("list", tmp_path / "none").message(1) == f"{tmp_path / 'none'}: no such folder"


def test_list_has_the_cache_with_every_revision_and_folder(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    repo, empty = hub.repos[ADAPTER], tmp_path / "empty"
    empty.mkdir()
    repo.tags["v1"] = repo.branches["main"]
    hub.add("someone/many", {f"en/{name}": data for name, data in files(adapter).items()})
    resolve(f"{ADAPTER}@v1")
    resolve("someone/many:en")
    hub.add(ADAPTER, files(adapter) | {"README.md": b"newer"})
    resolve(ADAPTER)
    assert [row["name"] for row in rows(empty)] == [ADAPTER, f"{ADAPTER}@v1", "someone/many:en"]
    assert all(Path(row["path"]).is_dir() for row in rows(empty))


def test_list_of_the_hub(hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "adapter")
    hub.page = 2
    for number in range(5):
        hub.add(f"x/lora-{number}", files(adapter) | {"README.md": card(BASE)}, downloads=number)
    hub.add("x/other", files(adapter) | {"README.md": card("lab/another")})
    hub.add("x/merged", {"README.md": card(BASE, base_model_relation="merge")})
    found = [row for row in rows("--hub", "--base", BASE, "--sort", "downloads") if row["state"] == "remote"]
    assert [row["name"] for row in found] == [ADAPTER, "x/lora-4", "x/lora-3", "x/lora-2", "x/lora-1", "x/lora-0"]
    assert (found[0]["downloads"], found[0]["likes"], found[0]["base_model"]) == (12, 3, BASE)
    assert len([row for row in rows("--hub", "--limit", "3") if row["state"] == "remote"]) == 3
    assert [row["name"] for row in rows("--hub", "--search", "other")] == ["x/other"]
    assert not hub.asked("(GET|HEAD) .*/resolve/.*")  # that would count as downloads


def test_details_of_what_is_on_the_hub(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "adapter")
    hub.add("x/gated", files(adapter) | {"README.md": card(BASE)}, gated=True)
    hub.add("x/here", files(adapter) | {"README.md": card(BASE)})
    resolve("x/here")
    plain = {row["name"]: row for row in rows("--hub") if row["downloads"] is not None}
    assert (plain[ADAPTER]["ranks"], plain[ADAPTER]["state"]) == ([], "remote")
    assert (plain["x/here"]["ranks"], plain["x/here"]["state"]) == ([4], "here")
    before = len(hub.requests)
    found = {row["name"]: row for row in rows("--hub", "--details") if row["downloads"] is not None}
    assert (found[ADAPTER]["ranks"], found[ADAPTER]["alphas"], found[ADAPTER]["targets"]) == (
        [4],
        [6.0],
        ["o_proj", "q_proj"],
    )
    assert found[ADAPTER]["size"] == sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    assert found[ADAPTER]["downloads"] == 12
    assert "gated repository" in found["x/gated"]["problem"]
    assert all(one.span for one in hub.requests[before:] if "/resolve/" in one.path)
    assert "say --hub" in adapterkit("list", "--details").message(2)


def test_what_is_here_is_listed_also_where_the_hub_is_away(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    result = adapterkit("list", tmp_path / "adapter", "--hub")
    assert "● " in result.out
    assert "cannot be reached" in result.message(5)
    assert sum(hub.slept) < 10  # the client by itself takes 23 s
    facts = json.loads(adapterkit("list", tmp_path / "adapter", "--hub", "--json").out)
    assert len(facts["adapters"]) == 1 and facts["exit_code"] == 5 and "cannot be reached" in facts["error"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [(["--sort", "trending"], "say --hub"), (["--hub", "--sort", "rank"], "does not sort by rank")],
)
def test_sorting_that_there_is_not(hub: Hub, args: list[str], expected: str) -> None:
    assert expected in adapterkit("list", *args).message(2)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (None, "adapter rank alpha targets size base"),
        (80, "adapter rank alpha targets size base"),
        (50, "adapter rank alpha targets size base"),
        (36, "adapter rank alpha size"),
    ],
)
def test_a_list_fits_the_terminal(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int | None, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    many = [f"{letter}_proj" for letter in "abcdefghijkl"]
    write_adapter(tmp_path / "x" / "a", config=CONFIG | {"base_model_name_or_path": "lab/a-base-with-a-name"})
    write_adapter(tmp_path / "x" / ("b" * 60), config=CONFIG | {"target_modules": many})
    if columns is not None:
        monkeypatch.setattr(Terminal, "isatty", lambda _: True)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    lines = adapterkit("list", "x").out.splitlines()
    assert lines[0].split() == expected.split()
    assert all(len(line) <= (columns or 999) for line in lines if "b" * 60 not in line)
    assert f"● x/{'b' * 60}" in "\n".join(lines)
    assert (len(lines) == 3) is (columns is None)
    assert ("a-base-with-a-name" in lines[1]) is (columns != 50 and columns != 36)


def test_a_hub_that_is_busy_is_asked_for_its_list_again(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.fail("GET /api/models", 503)
    assert ADAPTER in adapterkit("list", tmp_path, "--hub").out


def test_nothing_found(hub: Hub, tmp_path: Path) -> None:
    assert adapterkit("list", tmp_path).out == "no adapters found; add --hub to search the Hub\n"
