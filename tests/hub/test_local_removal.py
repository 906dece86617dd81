"""An adapter deleted: what it says before is what goes, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from handmade import adapterkit, contents, write_adapter, write_base
from hubserver import Hub

from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.hub.adapter_listing import AdapterEntry, list_cache
from adapterkit.hub.local_removal import Removal, owned_names, plan_removal, remove
from adapterkit.train.runs.run import METRICS, RECIPE


def row_of(path: Path) -> AdapterEntry:
    return AdapterEntry(str(path), path, "here")


def weights(name: str = "adapter_model.safetensors") -> dict[str, bytes]:
    return {name: b"weights of it", "adapter_config.json": b"{}"}


def test_a_folder_of_an_adapter_alone_goes(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    (folder / "README.md").write_text("# One")
    plan = plan_removal(row_of(folder))
    assert {file.name: size for file, size in plan.files} == {
        file.name: file.stat().st_size for file in folder.iterdir()
    }
    assert plan.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert "The folder is deleted too: it contains nothing else." in list(plan.lines)
    assert remove(plan) == plan
    assert contents(tmp_path) == {}
    assert {RECIPE, METRICS} <= set(owned_names())


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-1/optimizer.pt", ".hidden", "data/train.jsonl"])
def test_what_else_is_there_stays(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "one")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    plan = plan_removal(row_of(folder))
    assert plan.remaining == (name.split("/")[0],)
    assert any("The folder stays" in line and plan.remaining[0] in line for line in plan.lines)
    remove(plan)
    assert {name for name, data in contents(folder).items() if data is not None} == {name}


def test_a_folder_among_two_called_snapshots(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "snapshots" / "models--a--b" / "snapshots" / "c0ffee")
    other = write_adapter(tmp_path / "snapshots" / "models--a--b" / "snapshots" / "other")
    remove(plan_removal(row_of(folder)))
    assert not folder.exists()
    assert other.is_dir()


def test_what_would_reach_further_is_refused(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain")
    linked = tmp_path / "linked"
    linked.symlink_to(plain)
    inner = write_adapter(tmp_path / "inner")
    (inner / "adapter_model.safetensors").unlink()
    (inner / "adapter_model.safetensors").symlink_to(plain / "adapter_model.safetensors")
    model = write_base(tmp_path / "model")
    write_adapter(tmp_path / "given")
    shutil.copytree(tmp_path / "given", model, dirs_exist_ok=True)
    shards = write_adapter(tmp_path / "shards")
    (shards / "model-00001-of-00002.safetensors").write_bytes(b"")
    above = write_adapter(tmp_path / "above")
    write_adapter(above / "checkpoint-1")
    git = write_adapter(tmp_path / "git")
    (git / ".git").mkdir()
    before = contents(tmp_path)
    for folder, why in {
        linked: "a link to", inner: "a link, or not", model: "contains a model as well", shards: "contains a model",
        above: "contains other adapters", git: "a git repository", tmp_path: "not an adapter", tmp_path / "x": "not an adapter",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=why):
            plan_removal(row_of(folder))
    with pytest.raises(UsageError, match="not an adapter on this disk"):
        plan_removal(AdapterEntry("some/lora", None, "remote"))
    assert contents(tmp_path) == before


def test_what_changed_since_it_was_shown_stays(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    plan = plan_removal(row_of(folder))
    (folder / "notes.txt").write_text("come since")
    before = contents(folder)
    with pytest.raises(AdapterkitError, match="changed since the deletion was planned"):
        remove(plan)
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "one")
    before, plan = contents(folder), plan_removal(row_of(folder))

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)  # the modes of folders do not hold root off
    with pytest.raises(AdapterkitError, match=r"cannot be deleted \(Permission denied\); 0 of 2 files deleted"):
        remove(plan)
    assert contents(folder) == before
    monkeypatch.undo()
    monkeypatch.setattr(Path, "rmdir", refuse)
    assert remove(plan).remaining == ("the folder (Permission denied)",)


# --- the Hub cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pulled(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, AdapterEntry]:
    """A cache below another folder called snapshots, with two revisions of one repository and one of another."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "models--x" / "snapshots" / "cache"))
    files = {name: data for name, data in contents(write_adapter(tmp_path / "one")).items() if data is not None}
    repo = hub.add("some/lora", files | {"old.md": b"only in the first"})
    first = repo.resolve("main")
    assert adapterkit("pull", f"some/lora@{first}").code == 0
    hub.add("some/lora", files | {"README.md": b"x"})
    hub.add("some/other", files)
    hub.add("some/several", {f"{name}/{file}": data for name in "ab" for file, data in files.items()})
    for id in ("some/lora", "some/other", "some/several:a", "some/several:b"):
        assert adapterkit("pull", id).code == 0
    return {row.name: row for row in list_cache()}


def cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def removed(row: AdapterEntry) -> tuple[Removal, set[str]]:
    """A removal, done, and the files that went with it."""
    before, plan = {*contents(cache())}, plan_removal(row)
    remove(plan)
    gone = before - {*contents(cache())}
    assert {str(file.relative_to(cache().resolve())) for file, _ in plan.files} <= gone
    return plan, gone


def test_a_revision_goes_with_what_it_alone_has(pulled: dict[str, AdapterEntry]) -> None:
    old = next(row for name, row in pulled.items() if name.startswith("some/lora@"))
    plan, gone = removed(old)
    assert (len(plan.files), plan.whole_repo) == (1, False)  # old.md
    assert not any("some--other" in name for name in gone)
    assert adapterkit("inspect", pulled["some/lora"].path or "").code == 0


def test_the_last_revision_takes_its_repository_along(pulled: dict[str, AdapterEntry]) -> None:
    plan, gone = removed(pulled["some/other"])
    assert plan.whole_repo
    assert any("whole repository in the Hub cache" in line for line in plan.lines)
    assert not (cache() / "models--some--other").exists()
    assert all("some--other" in name for name in gone)
    assert plan.bytes >= sum(len(data) for data in (b"{}",))


def test_a_revision_with_other_adapters_is_not_removed(pulled: dict[str, AdapterEntry]) -> None:
    before = contents(cache())
    with pytest.raises(UsageError, match=r"its revision contains several adapters \(a, b\)"):
        plan_removal(pulled["some/several:a"])
    assert contents(cache()) == before


def test_what_the_client_could_not_remove_is_told(
    pulled: dict[str, AdapterEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import DeleteCacheStrategy

    plan = plan_removal(pulled["some/other"])
    monkeypatch.setattr(DeleteCacheStrategy, "execute", lambda self: None)
    with pytest.raises(AdapterkitError, match="could not be deleted"):
        remove(plan)


def test_the_same_commit_in_another_repository_stays(pulled: dict[str, AdapterEntry]) -> None:
    path = pulled["some/other"].path
    assert path is not None
    mirror = cache() / "models--a--mirror"
    shutil.copytree(path.parents[1], mirror, symlinks=True)
    before = contents(mirror)
    remove(plan_removal(pulled["some/other"]))
    assert contents(mirror) == before
    assert os.path.lexists(mirror / "snapshots" / path.name / "adapter_config.json")
