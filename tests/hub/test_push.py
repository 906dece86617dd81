"""Pushing to the Hub through its real client: what is checked, what is sent, and what is not sent again."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES
from handmade import CONFIG, adapterkit, contents, factors, packed, write_adapter, write_base
from hubserver import Hub, Token
from huggingface_hub import HfApi
from safetensors.torch import save_file
from standins import failing

import adapterkit as package
from adapterkit.cli.signals import Terminated
from adapterkit.errors import AdapterkitError, UnsafeFileError
from adapterkit.hub import download, resolve
from adapterkit.hub.upload import content_scan as contents_of
from adapterkit.hub.upload import push, secrets
from adapterkit.hub.upload.card import CardFacts, base_in_card, complete_card
from adapterkit.hub.upload.content_scan import is_pickle, skip_reason
from adapterkit.hub.upload.secrets import find_secret

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BASE = "lab/base"
REPO = "me/lora"
HOME = "/home/somebody/models/base"


@pytest.fixture
def there(hub: Hub, tmp_path: Path) -> Hub:
    """The Hub with the base on it."""
    hub.add(BASE, {name: data for name, data in contents(write_base(tmp_path / "base")).items() if data is not None})
    return hub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of that base."""
    return write_adapter(tmp_path / "adapter", config=CONFIG | {"base_model_name_or_path": BASE})


def card_of(hub: Hub, repo: str = REPO) -> tuple[dict[str, Any], str]:
    """The YAML and the rest of a card on the Hub."""
    _, block, body = hub.repos[repo].files()["README.md"].data.decode().split("---\n", 2)
    return yaml.safe_load(block), body


def pushed(*args: str | Path) -> Any:
    """What a push prints as JSON."""
    result = adapterkit("push", *args, "--json")
    assert result.code == 0, result
    return json.loads(result.out)


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_push_list_inspect_pull_merge(
    there: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = adapterkit("push", adapter, REPO, "--license", "mit")
    assert sent.code == 0, sent
    assert sent.out.splitlines()[-1] == f"{there.url}/{REPO}"
    (tmp_path / "none").mkdir()
    listed = adapterkit("list", tmp_path / "none", "--hub", "--base", BASE)
    assert f"○ {REPO}" in listed.out
    assert json.loads(adapterkit("inspect", REPO, "--json").out)["summary"]["base_model"] == BASE
    assert adapterkit("pull", REPO, "-o", tmp_path / "pulled").code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "pulled" / weights).read_bytes() == (adapter / weights).read_bytes()
    for name, what in {"here": [tmp_path / "base", adapter], "there": [BASE, REPO]}.items():
        assert adapterkit("merge", *what, "-o", tmp_path / name).code == 0
    for file in (tmp_path / "here").glob("*.safetensors"):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()


def test_what_is_there_afterwards(there: Hub, adapter: Path) -> None:
    before = contents(adapter)
    facts = pushed(adapter, REPO, "--license", "mit", "--message", "hello")
    repo = there.repos[REPO]
    assert facts["commit"] == repo.branches["main"]
    assert len(repo.commits) == 2  # the first is the Hub's own
    assert repo.commits[facts["commit"]][1] == "hello"
    sent = {name: blob.data for name, blob in repo.files().items() if name not in (".gitattributes", "README.md")}
    assert sent == {name: data for name, data in before.items() if data is not None}
    assert contents(adapter) == before
    data, body = card_of(there)
    assert data == {
        "base_model": BASE, "base_model_relation": "adapter", "library_name": "peft", "license": "mit",
        "pipeline_tag": "text-generation", "tags": ["adapterkit", "lora", f"base_model:adapter:{BASE}"],
    }  # fmt: skip
    assert f"# {REPO}" in body
    assert "| rank | 4 |" in body


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_file_that_changes_once_it_was_checked_is_not_sent(
    there: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Also one that is as long, and by its date as old."""
    file, check_card = adapter / "adapter_model.safetensors", push._check_card

    def change(plan: Any) -> None:
        before, data = file.stat(), file.read_bytes()
        if how == "replaced":
            file.unlink()
        file.write_bytes(data[:-1] + b"x")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        check_card(plan)

    monkeypatch.setattr(push, "_check_card", change)
    message = adapterkit("push", adapter, REPO).message_of_last(1)
    assert message == f"{file}: changed during the upload; nothing committed, push again"
    assert "adapter_model.safetensors" not in there.repos[REPO].files()


def test_a_name_alone_is_one_of_my_own(there: Hub, adapter: Path) -> None:
    assert pushed(adapter, "lora")["repo"] == REPO
    assert pushed(adapter, "an-org/lora")["repo"] == "an-org/lora"


def test_private(there: Hub, adapter: Path) -> None:
    pushed(adapter, REPO, "--private")
    assert there.repos[REPO].private
    pushed(adapter, "me/other")
    assert not there.repos["me/other"].private
    assert "repository exists and is public" in adapterkit("push", adapter, "me/other", "--private").message(2)


def test_dry_run_sends_nothing(there: Hub, adapter: Path) -> None:
    result = adapterkit("push", adapter, REPO, "--dry-run")
    assert result.out.endswith("Dry run: nothing uploaded\n")
    assert "adapter_model.safetensors" in result.out
    assert REPO not in there.repos
    assert not there.asked("(POST|PUT) ")


def test_a_push_is_planned_and_run_in_python(there: Hub, adapter: Path) -> None:
    plan = package.plan_push(adapter, "lora", message="hello", license="mit")
    assert (
        str(plan).splitlines()
        == adapterkit("push", adapter, REPO, "--license", "mit", "--dry-run").out.splitlines()[:-1]
    )
    assert not there.asked("(POST|PUT) ")
    *moved, last = package.run(pickle.loads(pickle.dumps(plan)))
    assert [event.done for event in moved][-1] == plan.size == moved[-1].total
    repo = there.repos[REPO]
    assert repo.commits[repo.branches["main"]][1] == "hello" and last.commit == repo.branches["main"]
    assert package.push(adapter, REPO, license="mit").commit is None  # nothing has changed


def test_a_pull_request(there: Hub, adapter: Path) -> None:
    there.add("other/lora", {"README.md": b"theirs"})
    facts = pushed(adapter, "other/lora", "--pr")
    assert facts["url"] == f"{there.url}/other/lora/discussions/1"
    assert set(there.repos["other/lora"].files()) == {"README.md"}
    assert "adapter_model.safetensors" in there.repos["other/lora"].files("refs/pr/1")


# --- not twice -------------------------------------------------------------------------------------------------------


def test_pushing_again_sends_nothing(there: Hub, adapter: Path) -> None:
    pushed(adapter, REPO)
    there.requests.clear()
    result = adapterkit("push", adapter, REPO)
    assert "up to date, nothing uploaded" in result.out
    assert not there.asked("(POST|PUT) ")


def test_only_what_changed_is_sent(there: Hub, adapter: Path) -> None:
    pushed(adapter, REPO)
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    there.requests.clear()
    facts = pushed(adapter, REPO)
    assert [one["name"] for one in facts["files"] if one["sent"]] == ["README.md"]
    assert not there.asked("PUT ")
    assert card_of(there)[1] == "# Mine\n"


def test_weights_of_before_are_removed_in_the_same_commit(there: Hub, adapter: Path) -> None:
    there.add(REPO, {"adapter_model.bin": b"x", "old.safetensors": b"y", "notes.txt": b"z"})
    result = adapterkit("push", adapter, REPO)
    assert "delete stale weights" in result.out
    assert set(there.repos[REPO].files()) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"
    }  # fmt: skip
    assert len(there.repos[REPO].commits) == 2


def test_an_interrupted_push_sends_what_had_not_arrived(there: Hub, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(tmp_path / "base", merged)
    for shard in merged.glob("*.safetensors"):
        save_file({f"{shard.stem[6:11]}": torch.full((4,), float(shard.stem[6:11]))}, shard)
    names = sorted(file.name for file in merged.glob("*.safetensors"))
    index = {"weight_map": {name[6:11]: name for name in names}}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    real, count = there.fault, 0

    def second_fails(request: str) -> Any:
        nonlocal count
        count += request.startswith("PUT ")
        if count > 1:
            there.fail("PUT ", 400)
        return real(request)

    there.fault = second_fails  # type: ignore[method-assign]
    assert adapterkit("push", merged, REPO).code == 1
    assert len(there.repos[REPO].commits) == 1
    there.fault = real  # type: ignore[method-assign]
    there.faults.clear()
    there.requests.clear()
    assert adapterkit("push", merged, REPO).code == 0
    assert len(there.asked("PUT ")) == 1
    assert {*names} <= set(there.repos[REPO].files())


def test_a_line_that_breaks_and_a_hub_that_is_busy(there: Hub, adapter: Path) -> None:
    there.fail("PUT ", 500)
    there.fail("POST .*/commit/.*", 503)
    there.fail("GET /api/whoami-v2", 429, headers=(("Retry-After", "3"),))
    pushed(adapter, REPO)
    assert 3 in there.slept
    assert "adapter_model.safetensors" in there.repos[REPO].files()


@pytest.mark.parametrize(
    ("request_like", "fault", "code", "expected"),
    [
        ("PUT ", {"status": 413}, 1, "the Hub refused (413)"),
        ("PUT ", {"status": 403}, 4, "permission denied for this token"),
        ("PUT ", {"status": 503}, 5, "out of service (503)"),
        ("PUT ", {"status": 429, "headers": (("Retry-After", "99999"),)}, 5, "asks to retry in 99,999 s"),
        ("POST .*batch", {"after": 0}, 5, "cannot be reached"),
        ("POST .*batch", {"body": b"{}"}, 1, "invalid response ("),
        (
            "POST .*batch",
            {"body": b'{"objects": [{"oid": "0", "size": 1, "error": {"code": 413, "message": "too large"}}]}'},
            1, "the Hub rejected adapter_model.safetensors: `too large",
        ),
        ("POST .*preupload", {"body": b"[]"}, 1, "invalid response ("),
        ("POST .*commit", {"status": 409}, 1, "the Hub refused (409)"),
        ("POST .*commit", {"status": 412}, 1, "the repository has changed in the meantime"),
        ("POST .*commit", {"after": 0}, 5, "connection lost during the commit, which may have been made; push again to check"),
        ("POST .*commit", {"body": b"{}"}, 1, "invalid response ("),
        ("POST .*repos/create", {"status": 403}, 4, "permission denied for this token"),
    ],
)  # fmt: skip
def test_whatever_interrupts_a_push_it_ends_with_one_line_and_goes_on(
    there: Hub, adapter: Path, request_like: str, fault: dict[str, Any], code: int, expected: str
) -> None:
    there.fail(request_like, **fault, times=99)
    assert expected in adapterkit("push", adapter, REPO).message_of_last(code)
    there.faults.clear()
    pushed(adapter, REPO)
    weights = there.repos[REPO].files()["adapter_model.safetensors"].data
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()
    assert len(there.repos[REPO].commits) == 2


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_a_network_that_is_lost_while_xet_uploads(
    there: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """The Hub's own protocol for files raises Python's errors, without a number."""
    lost = "connection reset"
    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "preupload_lfs_files", failing(error(lost)))
        said = adapterkit("push", adapter, REPO).message_of_last(5)
    assert said == f"{REPO}: the Hub cannot be reached ({lost})"
    there.fail("POST .*commit", after=0, times=99)  # is an OfflineError, and so a ConnectionError, already
    said = adapterkit("push", adapter, REPO).message_of_last(5)
    assert said.startswith(f"{REPO}: connection lost during the commit")


@pytest.mark.parametrize(
    "owner, name", [(HfApi, "preupload_lfs_files"), (HfApi, "create_commit"), (download, "run_parallel")]
)
def test_another_signal_keeps_its_exit_code(
    there: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    there.add("me/there", {"config.json": b"{}"})
    monkeypatch.setattr(owner, name, failing(Terminated(signal.SIGTERM)))
    line = ["pull", "me/there"] if owner is download else ["push", adapter, REPO]
    assert "me/" in adapterkit(*line).message_of_last(143)


def test_ctrl_c_ends_a_push_and_the_next_sends_the_rest(there: Hub, adapter: Path) -> None:
    there.fail("PUT ", hang=True)
    main = threading.main_thread().ident
    assert main is not None
    there.hung = lambda: signal.pthread_kill(main, signal.SIGINT)
    message = adapterkit("push", adapter, REPO).message(130)
    assert message == f"interrupted; nothing committed to {REPO}; the next push skips the weights that arrived"
    assert [*there.repos[REPO].files()] == [".gitattributes"]
    there.fail("POST .*/commit/.*", hang=True)
    assert "may have been made; push again to check" in adapterkit("push", adapter, REPO).message(130)
    assert [*there.repos[REPO].files()] == [".gitattributes"]
    there.requests.clear()
    pushed(adapter, REPO)
    assert not there.asked("PUT ")
    assert "adapter_model.safetensors" in there.repos[REPO].files()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b"other"), lambda file: file.unlink()])
def test_a_folder_that_changes_while_it_is_pushed(
    there: Hub, adapter: Path, change: Callable[[Path], Any], name: str
) -> None:
    real = there.fault

    def then(request: str) -> Any:
        if request.startswith("PUT ") and (adapter / name).exists():
            change(adapter / name)
        return real(request)

    there.fault = then  # type: ignore[method-assign]
    message = adapterkit("push", adapter, REPO).message_of_last(1)
    assert message.startswith(f"{adapter / name}: ")
    assert [*there.repos[REPO].files()] == [".gitattributes"]


def test_a_file_that_has_changed_since_the_plan_is_not_sent(there: Hub, adapter: Path) -> None:
    plan = package.plan_push(adapter, REPO)
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterkitError, match="changed during the upload; nothing committed"):
        list(package.run(plan))
    assert not there.asked("PUT ")


def test_a_card_that_the_hub_does_not_take_is_told_before_weights_are_sent(there: Hub, adapter: Path) -> None:
    there.fail("POST /api/validate-yaml", 400, body=b'{"errors": [{"message": "license must be one of"}]}')
    assert "rejected by the Hub: license must be one of" in adapterkit("push", adapter, REPO).message(1)
    assert REPO not in there.repos
    assert not there.asked("PUT ")


def test_what_the_client_prints_is_not_shown(there: Hub, adapter: Path) -> None:
    warning = b'{"errors": [], "warnings": [{"message": "empty metadata"}]}'
    there.fail("POST /api/validate-yaml", 200, body=warning, times=9)
    there.objects[hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()] = b""
    assert adapterkit("push", adapter, REPO).err == ""


def test_what_changed_meanwhile_is_not_overwritten(there: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(adapter, REPO)
    (adapter / "README.md").write_text("new")
    there.fail("POST /api/models/me/lora/preupload/.*", 500)  # asked again after a wait, in which …
    monkeypatch.setattr("time.sleep", lambda _: there.add(REPO, {"theirs.txt": b"x"}))
    assert "has changed in the meantime" in adapterkit("push", adapter, REPO).message_of_last(1)
    assert set(there.repos[REPO].files()) == {"theirs.txt"}


# --- what is refused -------------------------------------------------------------------------------------------------


def config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def nan(folder: Path) -> None:
    tensors = factors()
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def pickled(folder: Path) -> None:
    torch.save(factors(), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "expected"),
    [
        (lambda f: config(f, base_model_name_or_path=HOME), 2, "set --base-id ORG/NAME"),
        (lambda f: config(f, base_model_name_or_path=None), 2, "no base model given"),
        (lambda f: config(f, base_model_name_or_path="lab/typo"), 1, "lab/typo: base not found on the Hub"),
        (nan, 3, "contains NaN or Inf"),
        (pickled, 1, "pickled weights are not uploaded"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 9), 1, "adapter_model.safetensors"),
        (lambda f: config(f, trained_at="/home/somebody/run/3"), 1, "contains a local path, /home/somebody/run/3"),
        (
            lambda f: (f / "README.md").write_text("see /data/secret/x.jsonl for more"),
            1,
            "README.md: contains a local path, /data/secret/x.jsonl",
        ),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), 1, "invalid YAML block"),
        (lambda f: (f / "README.md").write_text("hf_" + "a" * 34), 1, "contains a Hub token"),
        (lambda f: (f / "notes.md").symlink_to("/etc/hostname"), 1, "outside its folder"),
        (lambda f: (f / "run.py").write_text("token = 'hf_" + "a" * 34 + "'"), 1, "contains a Hub token"),
        (lambda f: config(f, a="file:///home/somebody/x"), 1, "contains a local path, /home/somebody/x"),
        (
            lambda f: (f / "a.json").write_text(r'["\/home\u002fsomebody/x"]'),
            1,
            "contains a local path, /home/somebody/x",
        ),
        (lambda f: (f / "adapter_config.json").write_text("[]"), 1, "expected a JSON object, found list"),
        (lambda f: config(f, a="x" * (1 << 20), b="/home/somebody/x"), 1, "contains a local path, /home/somebody/x"),
        (lambda f: (f / "README.md").write_text("---\nlicense: mit\n# It\n"), 1, "YAML block is not closed"),
        (lambda f: (f / "README.md").write_text("---\nmade: 2026-02-31\n---\n"), 1, "invalid YAML block"),
        (lambda f: (f / "README.md").write_text("---\n- a\n---\n"), 1, "YAML block is a list"),
        (lambda f: (f / "README.md").write_bytes(b"\xff"), 1, "not UTF-8"),
        (lambda f: (f / "a\x1b[31m.txt").write_text("x"), 1, "name is not printable or not portable"),
        (lambda f: os.mkfifo(f / "pipe"), 1, "not a regular file"),
        (lambda f: (f / "a.txt").symlink_to("a.txt"), 1, "a.txt"),
    ],
)
def test_what_is_not_sent(there: Hub, adapter: Path, spoil: Callable[[Path], Any], code: int, expected: str) -> None:
    spoil(adapter)
    message = adapterkit("push", adapter, REPO).message(code)
    assert expected in message
    assert not there.asked("(POST|PUT) ")
    assert REPO not in there.repos


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["me/lora@v1"], 2, "expected ORG/NAME"),
        (["me/lora", "--base-id", "/home/x"], 2, "expected ORG/NAME on the Hub"),
        (["me/lora", "--pr"], 2, "no such repository to open a pull request in; omit --pr"),
        (["stranger/lora"], 4, "me can only create repositories for me, an-org"),
        (["lab/base"], 4, "write access"),
    ],
)
def test_where_it_cannot_go(there: Hub, adapter: Path, args: list[str], code: int, expected: str) -> None:
    assert expected in adapterkit("push", adapter, *args).message(code)
    assert not there.asked("(POST|PUT) ")


@pytest.mark.parametrize(
    ("token", "expected"), [("", "a token is required"), ("hf_wrong", "invalid token"), ("hf_reader", "is read-only")]
)
def test_tokens(there: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, token: str, expected: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert expected in adapterkit("push", adapter, REPO).message(4)


def test_a_token_for_other_repositories(there: Hub, adapter: Path) -> None:
    pushed(adapter, REPO)
    there.tokens["hf_writer"] = Token("me", "fineGrained", writes=("me/else",))
    (adapter / "README.md").write_text("new")
    assert "permission denied" in adapterkit("push", adapter, REPO).message(4)


def test_a_folder_that_is_none(there: Hub, tmp_path: Path) -> None:
    assert "expected the folder" in adapterkit("push", tmp_path / "none", REPO).message(2)


# --- what files hold -------------------------------------------------------------------------------------------------

HF = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAA\n" * 3


def zipped(data: bytes, how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        archive.writestr("first.txt", b"x")
        archive.writestr("in/it.txt", data)
    return out.getvalue()


def tarred(data: bytes, mode: Any = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        info = tarfile.TarInfo("in/it")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def encrypted(data: bytes) -> bytes:
    packed = bytearray(zipped(data))
    for at in (6, packed.index(b"PK\x01\x02") + 8):
        packed[at] |= 1
    return bytes(packed)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": zipped, "stored": lambda data: zipped(data, zipfile.ZIP_STORED), "tar": tarred,
    "tar.gz": lambda data: tarred(data, "w:gz"), "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE), "zlib": zlib.compress, "zstd": zstd.compress,
    "gzip in zip": lambda data: zipped(gzip.compress(data)), "zip in xz": lambda data: lzma.compress(zipped(data)),
}  # fmt: skip


def in_metadata(text: str) -> Callable[[Path], Any]:
    return lambda f: save_file(factors(), f / "adapter_model.safetensors", {"ss_comment": text})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (in_metadata(f"trained with {HF}"), "adapter_model.safetensors: contains a Hub token at byte "),
        (in_metadata("from /home/somebody/x"), "adapter_model.safetensors: metadata contains a local path, /home/somebody/x"),
        (lambda f: (f / "notes").write_text(f"token: {HF}"), "notes: contains a Hub token"),
        (lambda f: (f / "a.csv").write_text(f"a,{HF},b"), "a.csv: contains a Hub token"),
        (lambda f: (f / "config.bak").write_text(HF), "config.bak: contains"),
        (lambda f: (f / "a.html").write_text(f"<a>{HF}</a>"), "a.html: contains"),
        (lambda f: (f / "a.jsonl").write_text('{"a": 1}\n' * 200_000 + f'{{"a": "{HF}"}}\n'), "a.jsonl: contains"),
        (lambda f: (f / "a.json").write_text(json.dumps("\\u0068" + HF[1:]).replace("\\\\", "\\")), "a.json: contains"),
        (lambda f: (f / f"{HF}.txt").write_text("x"), "contains a Hub token"),
        (lambda f: (f / "tokenizer.json").write_text(f'{{"vocab": "{HF}"}}'), "tokenizer.json: contains"),
        (lambda f: (f / "x").write_bytes(b"\0HOME=/root\0HF_TOKEN=" + HF.encode() + b"\0"), "x: contains"),
        (lambda f: (f / "x").write_text("for hf_writer"), "x: contains your Hub token"),
        (lambda f: (f / "id").write_text(KEY), "id: contains a private key"),
        (lambda f: (f / "a.parquet").write_bytes(b"PAR1" + bytes(99)), "Parquet files cannot be scanned"),
        (lambda f: (f / "a.zip").write_bytes(zipped(HF.encode())), "a.zip, member in/it.txt: contains"),
    ],
)  # fmt: skip
def test_secrets_are_found_wherever_they_are(
    there: Hub, adapter: Path, spoil: Callable[[Path], Any], expected: str
) -> None:
    spoil(adapter)
    message = adapterkit("push", adapter, REPO).message(1)
    assert expected in message
    assert HF not in message.replace(f"{HF}.txt", "")
    assert not there.asked("(POST|PUT) ")


SECRETS = {
    "a Hub token": [HF, "api_org_" + "Ab1" * 11, "hf_" + "a" * 34, "hf_oauth_eyJhbGciOiJFZERTQSJ9" + ".aB1-_" * 9],
    "a GitHub token": ["ghp_" + "Ab1" * 12, "ghs_" + "Ab1" * 12, "github_pat_" + "11ABCDE_xyz" * 8],
    "a GitLab token": ["glpat-" + "Ab1-_" * 4],
    "a key of OpenAI or Anthropic": [
        "sk-" + "Ab1" * 16, "sk-proj-" + "Ab1-_" * 20, "sk-ant-api03-" + "Ab1-_" * 18, "sk-or-v1-" + "0f" * 32,
    ],
    "an AWS key": ["AKIA" + "ABCD2345" * 2, 'aws_secret_access_key = "' + "aB1/+" * 8, "AWS_SECRET_ACCESS_KEY=" + "a/1b" * 10],
    "a Google key": ["AIza" + "Ab1-_" * 7, "GOCSPX-" + "Ab1-" * 7],
    "a Slack token": ["xoxb-" + "1234567890-" * 3, "xoxp-" + "1234567890-" * 3],
    "a Stripe key": ["sk_live_" + "Ab1" * 8],
    "an npm token": ["npm_" + "Ab1" * 12],
    "a PyPI token": ["pypi-AgEIcHlwaS5vcmc" + "Ab1-_" * 20],
    "a signed web token": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "Ab1-_" * 8],
    "a Weights & Biases key": ["WANDB_API_KEY=" + "0f3a" * 10, 'wandb.login(key="' + "0f3a" * 10 + '")'],
    "a private key": [KEY, KEY.replace("OPENSSH ", ""), KEY.replace("\n", "\\n"), KEY.replace("OPENSSH", "RSA").replace(
        "b3BlbnNzaC1rZXktdjEAAAAA", "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0123456789ABCDEF\n")],
    "a login of .netrc": ["machine api.wandb.ai\n  login user\n  password 123456789"],
}  # fmt: skip


@pytest.mark.parametrize("what", SECRETS)
def test_every_shape_of_a_secret_at_every_place(what: str) -> None:
    rng = random.Random(0)
    for secret in SECRETS[what]:
        raw = secret.encode()
        for before, after in ((b"", b""), (b" ", b"\n"), (b'"', b'"'), (b"\\n", b"\\n"), (b"=", b"&"), (b"\0", b"\0")):
            if what == "a login of .netrc" and b"\0" in before:
                continue
            for at in range(16):
                data = before + raw + after
                assert find_secret(io.BytesIO(b"." * at + data)) in ((what, at + len(before)),), (secret, before, at)
        if what != "a login of .netrc":
            noise, places = rng.randbytes(3 * secrets.CHUNK), (secrets.CHUNK, 2 * secrets.CHUNK - secrets.OVERLAP)
            for place in places:
                for shift in (-len(raw) // 2, -1, 0, 1):
                    data = noise[: place + shift] + b"\0" + raw + b"\0" + noise[place:]
                    assert find_secret(io.BytesIO(data)) == (what, place + shift + 1)
            for form in ("utf-16-le", "utf-16-be", "utf-16"):
                for pad in range(4):
                    data = b"\xff" * pad + secret.encode(form) + b"\xff"
                    assert (find_secret(io.BytesIO(data)) or [None])[0] == what, (secret, form, pad)


@pytest.mark.parametrize("token", [b"hf_writer", b"a token, of a strange shape and with spaces", b"SeventeenLettersA"])
def test_the_token_of_this_machine_is_found_whatever_its_shape(token: bytes) -> None:
    known, what = (b"another token", token), "your Hub token"
    for at in (0, 1, 7, 8, 500, secrets.CHUNK - 3, secrets.CHUNK):
        for around in (b"", b"."):
            data = b"." * at + token + around
            assert find_secret(io.BytesIO(data), known) == (what, at), at
            assert find_secret(io.BytesIO(data)) is None
    assert find_secret(io.BytesIO(token[:-1]), known) is None
    for pad in range(16 * token.isalpha()):  # UTF-16, from where just enough of it is side by side
        for form in ("utf-16-le", "utf-16-be"):
            data = b"\xff" * pad + token.decode().encode(form) + b"\xff" * 20
            assert find_secret(io.BytesIO(data), known) == (what, pad + (form == "utf-16-be"))


def test_a_login_is_looked_for_in_text_alone() -> None:
    """Which has no zeros, and may have other control characters."""
    [login] = SECRETS["a login of .netrc"]
    for first in range(256):
        found = find_secret(io.BytesIO(bytes([first]) + login.encode()))
        assert found == (("a login of .netrc", 1) if first else None)


LONG = "Ab1" * 40
# How a secret of each issuer begins, and how many more characters are the fewest that it has.
SHORTEST: dict[str, list[tuple[str, str, int]]] = {
    "a Hub token": [("hf_", LONG, 30), ("hf_oauth_", "aB1-_." * 9, 30), ("api_org_", LONG, 30)],
    "a GitHub token": [*((f"gh{kind}_", LONG, 36) for kind in "pousr"), ("github_pat_", LONG, 60)],
    "a GitLab token": [("glpat-", "Ab1-_" * 9, 20)],
    "a key of OpenAI or Anthropic": [
        ("sk-", LONG, 32), *((f"sk-{kind}-", "Ab1-_" * 9, 32) for kind in ("proj", "svcacct", "admin", "or-v1", "ant-api03"))
    ],
    "an AWS key": [("AKIA", "ABCD2345" * 2, 16), ("ASIA", "ABCD2345" * 2, 16), ("aws_secret_access_key=", "a/1+" * 10, 40)],
    "a Google key": [("AIza", "Ab1-_" * 7, 35), ("GOCSPX-", "Ab1-" * 7, 28)],
    "a Slack token": [(f"xox{kind}-", "12345-Ab9" * 6, 24) for kind in "abeprs"],
    "a Stripe key": [("sk_live_", LONG, 24), ("rk_live_", LONG, 24)],
    "an npm token": [("npm_", "Ab1" * 12, 36)],
    "a PyPI token": [("pypi-", "Ab1-_" * 20, 64)],
    "a Groq key": [("gsk_", LONG, 50)],
    "an NVIDIA key": [("nvapi-", "Ab1-_" * 20, 60)],
    "a signed web token": [("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.", "Ab1-_" * 9, 20)],
    "a Weights & Biases key": [("wandb_api_key: ", "0f3a" * 10, 40), ("WANDB_API_KEY=", "0f3a" * 10, 40)],
}  # fmt: skip


@pytest.mark.parametrize("what", SHORTEST)
def test_a_secret_is_one_from_its_shortest_on(what: str) -> None:
    for start, more, least in SHORTEST[what]:
        for length in (least - 1, least):
            for end in ("", "\n", '"'):
                text = f"key: {start}{more[:length]}{end}".encode()
                assert find_secret(io.BytesIO(text)) == ((what, 5) if length == least else None), text


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "x" * 34, "hf_" + "X" * 34, "sk-" + "x" * 48, "AKIAIOSFODNN7EXAMPLE", "ghp_" + "0" * 36,
        "-----BEGIN PRIVATE KEY----- and the body follows", "machine learning login password", "disk-" + "Ab1" * 16,
        "hf_hub_download_with_a_long_name_of_a_function", "commit " + "0f3a" * 10, "wandb run of commit " + "0f3a" * 10,
        "chf_" + "a" * 40, "x" * 10_000, "AIza" + "b" * 40, "sk-learn-and-other-words-with-hyphens-in-a-long-name",
    ],
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    assert find_secret(io.BytesIO(text.encode())) is None
    assert find_secret(io.BytesIO(b"_ " + text.encode() + b" _")) is None


def test_no_secrets_in_noise_and_in_real_files() -> None:
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", np.uint8)
    halves = rng.standard_normal(4 << 20).astype(np.float32)
    for data in (
        rng.bytes(16 << 20), (halves.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        halves.astype(np.float16).tobytes(), rng.choice(letters, 1 << 20).tobytes(), bytes(1 << 20),
        rng.integers(-8, 8, 1 << 20, dtype=np.int8).tobytes(),
    ):  # fmt: skip
        assert find_secret(io.BytesIO(data)) is None
    for file in (path for path in FIXTURES.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            assert find_secret(stream) is None, file


def test_no_secrets_in_a_real_model(smollm2: Path) -> None:
    assert [skip_reason(file) for file in smollm2.iterdir() if file.is_file() and not file.name.startswith(".")].count(
        None
    ) == len([file for file in smollm2.iterdir() if file.is_file() and not file.name.startswith(".")])


@pytest.mark.parametrize("name", PACKERS)
def test_archives_are_looked_into(tmp_path: Path, name: str) -> None:
    file, pack = tmp_path / "it.dat", PACKERS[name]
    file.write_bytes(pack(b"nothing of interest" * 99))
    assert skip_reason(file) is None
    file.write_bytes(pack(pickle.dumps(file)))
    assert "a pickle, which could run code" in str(skip_reason(file))
    file.write_bytes(pack(b"\0" * 99 + HF.encode() + b"\0" * 99))
    with pytest.raises(UnsafeFileError, match="contains a Hub token"):
        skip_reason(file)


def array(value: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value)
    return out.getvalue()


def saved(value: Any, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


PICKLES = {
    **{f"protocol {n}": pickle.dumps({"a": Path("x")}, n) for n in range(6)},
    "small": pickle.dumps(None), "by hand": b"cposix\nsystem\n(S'id'\ntR.", "an instance": b"(S'id'\niposix\nsystem\n.",
    "objects": array(np.array([{}], object)), "named objects": array(np.array([(1, {})], [("a", "i4"), ("b", "O")])),
    "torch": saved({"a": torch.ones(3)}), "legacy torch": saved({"a": torch.ones(3)}, zipped=False),
    "npz": zipped(array(np.array([{}], object))), "joblib": zlib.compress(pickle.dumps([1])),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_known_by_their_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / "it.npy").write_bytes(PICKLES[name])
    assert "a pickle, which could run code" in str(skip_reason(tmp_path / "it.npy"))


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"N.", b"Nope.\n", b"cats\ndogs\nbirds.\n", b"Version 1\nV2\n.", b"(x)", array(np.zeros(3)),
        array(np.array(["O'", "O8"])), array(np.zeros(1, [("O", "i4")])), b"x\x9c is no zlib", b"]\0\0 nor LZMA",
        *(packed(b"{" + b" " * (0x100 * major + 0x80 - 2) + b"}") for major in range(2, 6)), b"\x80\x02",
        b"x\x01\0\0\0\0\0\0{" + b" " * 374 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_pickle(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "it.pkl").write_bytes(data)
    assert skip_reason(tmp_path / "it.pkl") is None


@pytest.mark.parametrize("head", [2, 6, 10, 0x28, 0x4B, 0x4A, 0x95])
@pytest.mark.parametrize("low", [b"\x80\x02", b"\x80\x04", b"x\x01", b"x\x9c", b"\x1f\x8b", b"PK"])
def test_the_length_of_a_header_is_no_magic(low: bytes, head: int) -> None:
    data = low + bytes([head, 0, 0, 0, 0, 0]) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * 9999
    assert not is_pickle(data)
    assert contents_of._decompressor(data) is None


# Named, since gzip and zip have the time in them, and every process that runs tests must give them the same names.
HIDING = {
    "encrypted": (encrypted(b"x"), "encrypted"), "cut": (gzip.compress(b"x" * 999)[:-9], "corrupt"),
    "no zip": (b"PK\x03\x04 nothing", "corrupt"),
    "deep": (gzip.compress(gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"x"))))), "nested deeper than 4 levels"),
    "bomb": (gzip.compress(bytes(1 << 16)), "decompresses to more than 9,999 bytes"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "7-Zip files cannot be scanned"), "rar": (b"Rar!\x1a\x07\0", "RAR files cannot be scanned"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HIDING)
def test_archives_that_hide_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data, expected = HIDING[kind]
    monkeypatch.setattr(contents_of, "MAX_UNPACKED", 9999)
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(UnsafeFileError, match=expected):
        skip_reason(tmp_path / "it")


def test_pickles_by_any_name_stay_here(there: Hub, adapter: Path) -> None:
    for name in ("a.npy", "model.pth.tar", "notes.txt", "x.bin"):
        (adapter / name).write_bytes(PICKLES["torch" if name == "model.pth.tar" else "protocol 4"])
    result = adapterkit("push", adapter, REPO)
    assert result.out.count("a pickle, which could run code") == 4
    assert "skip: contains archive/data.pkl, a pickle" in result.out
    assert set(there.repos[REPO].files()) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("data", [KEY.encode(), b"A=1\0HF_TOKEN=" + HF.encode() + b"\0B=2"])
def test_what_a_link_led_a_merge_to_does_not_get_to_the_hub(
    there: Hub, adapter: Path, tmp_path: Path, data: bytes
) -> None:
    assert adapterkit("merge", tmp_path / "base", adapter, "-o", tmp_path / "merged").code == 0
    for place in (tmp_path / "merged", tmp_path / "merged" / "adapterkit_receipt" / "before"):
        (place / "notes.dat").write_bytes(data)
        assert f"{place / 'notes.dat'}: contains" in adapterkit(
            "push", tmp_path / "merged", REPO, "--base-id", BASE
        ).message(1)
        (place / "notes.dat").unlink()
    assert not there.asked("(POST|PUT) ")


# --- what is made of it ----------------------------------------------------------------------------------------------


def test_the_base_id_takes_the_place_of_a_local_path(there: Hub, adapter: Path) -> None:
    config(adapter, base_model_name_or_path=HOME)
    block = f"base_model: {HOME}\ntags: [mine, 'base_model:adapter:{HOME}']\nlanguage: de"
    (adapter / "README.md").write_text(f"---\n{block}\n---\n# Mine\n")
    before = contents(adapter)
    pushed(adapter, REPO, "--base-id", BASE)
    files = there.repos[REPO].files()
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == BASE
    data, body = card_of(there)
    assert (data["base_model"], data["tags"], data["language"], body) == (BASE, ["mine"], "de", "# Mine\n")
    assert not any(b"somebody" in blob.data for blob in files.values())
    assert contents(adapter) == before


def test_what_trained_it_stays_here(there: Hub, adapter: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", ".env"):
        (adapter / name).write_bytes(b"x")
    (adapter / "checkpoint-10").mkdir()
    (adapter / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "tokenizer.json").write_text('{"vocab": {"/home/x/y": 1}}')
    result = adapterkit("push", adapter, REPO)
    assert result.out.count("skip: ") == 7
    assert {*there.repos[REPO].files()} - {".gitattributes"} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_any_other_file_goes_along(there: Hub, adapter: Path) -> None:
    names = ["empty.txt", "a b/ünï ク.txt", "list.json", "broken.json", "my.safetensors.md", "y.bin"]
    (adapter / "a b").mkdir()
    for name in names:
        (adapter / name).write_text("[1]" if name == "list.json" else "" if name == "empty.txt" else "{")
    (adapter / "link").symlink_to(adapter / "a b")
    (adapter / "x.BIN").write_bytes(pickle.dumps({}))
    (adapter / "wandb").mkdir()
    assert adapterkit("push", adapter, REPO).out.count("skip: ") == 3
    files = there.repos[REPO].files()
    assert {name: files[name].data for name in names} == {name: (adapter / name).read_bytes() for name in names}


def test_a_folder_that_cannot_be_read_is_told(there: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter / "closed").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "closed: cannot be read: Permission denied" in adapterkit("push", adapter, REPO).message(1)


def test_a_large_card_stays_as_it_is(there: Hub, adapter: Path) -> None:
    text = "---\nlicense: mit\n---\n" + "# Mine\n" * 200_000
    (adapter / "README.md").write_text(text)
    pushed(adapter, REPO)
    assert card_of(there)[1] == text.split("---\n", 2)[2]


def test_a_large_config_is_made_public_as_well(there: Hub, adapter: Path) -> None:
    config(adapter, base_model_name_or_path=HOME, note="x" * (1 << 20))
    pushed(adapter, REPO, "--base-id", BASE)
    assert b"somebody" not in there.repos[REPO].files()["adapter_config.json"].data


def test_what_adapterkit_noted_goes_along_without_paths(there: Hub, adapter: Path, tmp_path: Path) -> None:
    recipe = f"base: {HOME}\ndata: /home/somebody/data/train.jsonl\nlr: 1e-4\n"
    (adapter / "adapterkit_recipe.yaml").write_text(recipe)
    command = f"adapterkit train {HOME} /home/somebody/data/train.jsonl -o /tmp/out"
    (adapter / "adapterkit_training.json").write_text(json.dumps({"command": command, "steps": 3, "loss": 1.5}))
    (adapter / "README.md").write_text(f"# It\n\n```\n{command}\n```\n")
    pushed(adapter, REPO)
    files = there.repos[REPO].files()
    assert files["adapterkit_recipe.yaml"].data == b"base: base\ndata: train.jsonl\nlr: 1e-4\n"
    assert "adapterkit train base train.jsonl -o out" in card_of(there)[1]
    assert not any(b"somebody" in blob.data for blob in files.values())


def test_a_merged_model_with_its_receipt(there: Hub, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert adapterkit("merge", BASE, adapter, "-o", merged).code == 0
    facts = pushed(merged, "me/merged")
    names = {one["name"] for one in facts["files"]}
    assert {"adapterkit_merge.json", "adapterkit_receipt.json", "config.json", "model.safetensors.index.json"} <= names
    assert any(name.startswith("adapterkit_receipt/") for name in names)
    data, _ = card_of(there, "me/merged")
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "merge")
    back = resolve("me/merged")
    for name in contents(merged):
        if name.endswith(".safetensors"):
            assert (back / name).read_bytes() == (merged / name).read_bytes()


def test_relative_paths_of_a_run_stay_here_as_well(there: Hub, adapter: Path) -> None:
    recipe = "base: .cache/base\ndata: secret/data/train.jsonl\neval_data: secret/test.jsonl\ninit_from: an-org/first\n"
    (adapter / "adapterkit_recipe.yaml").write_text(recipe)
    command = "adapterkit train .cache/base secret/data/train.jsonl -o secret/out/a --init-from an-org/first"
    (adapter / "adapterkit_training.json").write_text(json.dumps({"command": command, "rate": "3 tokens/s"}))
    (adapter / "README.md").write_text(f"# It\n\n```\n{command}\n```\n")
    pushed(adapter, REPO)
    files = there.repos[REPO].files()
    assert not any(b"secret" in blob.data for blob in files.values())
    assert b"init_from: an-org/first\n" in files["adapterkit_recipe.yaml"].data
    assert "adapterkit train base train.jsonl -o a --init-from an-org/first" in card_of(there)[1]
    assert b"3 tokens/s" in files["adapterkit_training.json"].data


def test_what_a_model_is_of_its_base(there: Hub, tmp_path: Path) -> None:
    base = write_base(tmp_path / "trained")
    (base / "README.md").write_text("---\nbase_model: lab/base\n---\n# It\n")
    pushed(base, "me/trained")
    assert card_of(there, "me/trained")[0]["base_model_relation"] == "finetune"
    assert adapterkit("quantize", tmp_path / "base", "-o", tmp_path / "small", "--to", "nf4").code == 0
    pushed(tmp_path / "small", "me/small", "--base-id", BASE)
    assert card_of(there, "me/small")[0]["base_model_relation"] == "quantized"


def test_the_receipt_of_a_merge_is_not_changed(there: Hub, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "config.json").write_text('{"model_type": "llama", "_name_or_path": "../models/x"}')
    assert adapterkit("merge", base, adapter, "-o", tmp_path / "merged").code == 0
    pushed(tmp_path / "merged", "me/merged", "--base-id", BASE)
    back = resolve("me/merged")
    assert json.loads((back / "config.json").read_text())["_name_or_path"] == BASE
    assert adapterkit("unmerge", back, "-o", tmp_path / "again", "--adapter", adapter).code == 0
    for name, data in contents(base).items():
        assert (tmp_path / "again" / name).read_bytes() == data


def test_a_folder_of_the_cache_can_be_pushed(there: Hub, adapter: Path) -> None:
    pushed(adapter, REPO)
    pushed(resolve(REPO), "me/copy")
    one, other = (there.repos[name].files()["adapter_model.safetensors"] for name in (REPO, "me/copy"))
    assert one.data == other.data


# --- cards -----------------------------------------------------------------------------------------------------------

FACTS = CardFacts("me/x", "adapter", BASE, ("lora",), "text-generation", None, "peft", (), {})


@pytest.mark.parametrize("body", ["# Mine\n", "text without a title", "\n\n---\na rule\n"])
@pytest.mark.parametrize("block", ["", "---\n---\n", "---\n# a comment\nlanguage: 'de'  # kept\ntags:\n- mine\n---\n"])
def test_a_card_keeps_every_line(block: str, body: str) -> None:
    done, added = complete_card(block + body, FACTS, [])
    assert done.endswith(f"---\n{body}")
    for line in block.splitlines():
        assert line in done
    assert {"base_model", "library_name"} <= {*added}
    assert base_in_card(done) == BASE
    assert complete_card(done, FACTS, []) == (done, [])


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("---\r\nlicense: mit\r\n---\r\n# It\r\n", "---\r\nlicense: mit\r\nbase_model: lab/base\r\n"),
        ("\ufeff---\nlicense: mit\n---\n# It\n", "---\nlicense: mit\nbase_model: lab/base\n"),
        ("\n\n--- \nlicense: mit\n---", "---\nlicense: mit\nbase_model: lab/base\n"),
        ("---\nnote: |\n  a\n  ---\n  b\n---\n# It\n", "---\nnote: |\n  a\n  ---\n  b\nbase_model: lab/base\n"),
        ("---\nbase_model:\n---\n# It", "---\nbase_model: lab/base\n"),
        ("# It\n\n---\n\nlicense: mit\n\n---\n", "---\nbase_model: lab/base\n"),
    ],
)
def test_cards_as_editors_leave_them(text: str, prefix: str) -> None:
    done, _ = complete_card(text, FACTS, [])
    assert done.startswith(prefix)
    assert "# It" not in text or "# It" in done
    assert complete_card(done, FACTS, []) == (done, [])


def test_a_card_of_adapterkit_gets_the_tags_that_it_lacks() -> None:
    facts = CardFacts("me/x", "adapter", BASE, ("adapterkit", "lora", "dora"), None, None, "peft", (), {})
    assert (
        "tags:\n- adapterkit\n- lora\n- dora\n" in complete_card("---\ntags: [adapterkit, lora]\n---\nx", facts, [])[0]
    )
    assert "tags: [mine]\n" in complete_card("---\ntags: [mine]\n---\nx", facts, [])[0]


def test_only_the_lines_that_are_wrong_are_replaced() -> None:
    block = f"# mine\nlanguage: 'de'  # German\nbase_model:\n- {HOME}\n\nlicense: mit # for now\ntags: [a, 'b']\n"
    done, changed = complete_card(
        f"---\n{block}---\n# It\n", CardFacts("me/x", "adapter", BASE, (), None, "gpl", "peft", (), {}), [HOME]
    )
    lines = "# mine\nlanguage: 'de'  # German\nbase_model: lab/base\nlicense: gpl\ntags: [a, 'b']\n"
    assert done.startswith(f"---\n{lines}base_model_relation: adapter\n")
    assert changed[:2] == ["base_model", "license"]
    flow, _ = complete_card(f"---\n{{base_model: {HOME}, a: 1}}\n---\n# It\n", FACTS, [HOME])
    assert base_in_card(flow) == BASE
    assert "a: 1\n" in flow


@pytest.mark.parametrize("bases", ["[lab/a, lab/b]", "[]", "{a: 1}", "7"])
def test_bases_of_any_kind(bases: str) -> None:
    text = f"---\nbase_model: {bases}\n---\n# It\n"
    assert complete_card(text, FACTS, [])[0].startswith(text.removesuffix("---\n# It\n"))
    assert base_in_card(text) is None


def test_a_card_keeps_what_it_says() -> None:
    text = "---\nbase_model: lab/else\nlibrary_name: transformers\nlicense: mit\n---\nx\n"
    done, added = complete_card(text, FACTS, [])
    assert done.startswith(text.removesuffix("---\nx\n"))
    assert "license" not in added
    assert (
        "license: apache-2.0"
        in complete_card(text, CardFacts("me/x", "adapter", BASE, (), None, "apache-2.0", "peft", (), {}), [])[0]
    )
