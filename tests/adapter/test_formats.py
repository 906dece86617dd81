"""A format is one module: `toyformat.py`, added to the table only, works in every command."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toyformat
from handmade import CONFIG, adapterkit, contents, factors, write_adapter, write_base
from hubserver import Hub
from safetensors.torch import save_file

import adapterkit as kit
from adapterkit.adapter.formats import table
from adapterkit.errors import AdapterkitError, FitError, OutputExistsError, UsageError
from adapterkit.hub.adapter_listing import list_folders, list_hub
from adapterkit.hub.local_removal import plan_removal, remove
from adapterkit.tui.details import changes, details_of

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = "lab/base"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the format; commands that already made their choices from the table are imported again."""
    monkeypatch.setattr(table, "FORMATS", (*table.FORMATS, toyformat))
    for name in ("combine", "convert"):
        monkeypatch.delitem(sys.modules, f"adapterkit.cli.commands.{name}", raising=False)


def write_toy(folder: Path, **config: Any) -> Path:
    """Write the adapter of `handmade.factors`, alpha 6 and rank 4, in the toy format: 150%."""
    folder.mkdir(parents=True)
    names = {".lora_A.weight": "/in", ".lora_B.weight": "/out"}
    tensors = {}
    for key, tensor in factors().items():
        module, dot, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
        tensors[module + names[dot + leaf]] = tensor.T.contiguous()
    save_file(tensors, folder / "twigs.safetensors")
    (folder / "twigs.json").write_text(json.dumps({"percent": 150, "on": BASE} | config))
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """The same adapter in PEFT's format."""
    return write_adapter(tmp_path / "twin", config=CONFIG | {"base_model_name_or_path": BASE})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def done(*args: str | Path) -> Any:
    """Return the JSON output of a command."""
    result = adapterkit(*args, "--json")
    assert result.code == 0, result
    return json.loads(result.out)


def test_it_is_loaded_and_saved_in_either_format(toy: Path, twin: Path, tmp_path: Path) -> None:
    one, other = kit.load(toy), kit.load(twin)
    assert one.format == "toy" and list(one.modules) == sorted(other.modules) and one.base_model == other.base_model
    for name in other.modules:
        assert torch.equal(one[name].A, other[name].A) and torch.equal(one[name].B, other[name].B)
        assert one.modules[name].scaling == other.modules[name].scaling == 1.5
    kit.save(one, tmp_path / "peft")
    kit.save(kit.load(tmp_path / "peft"), tmp_path / "again", format="toy")
    assert (tmp_path / "again/twigs.safetensors").read_bytes() == (toy / "twigs.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"^unsupported adapter format 'kohya'; expected one of peft, toy$"):
        kit.save(one, tmp_path / "none", format="kohya")
    with pytest.raises(OutputExistsError, match="is not empty"):
        kit.save(one, tmp_path / "peft", format="toy")
    with pytest.raises(FitError, match="a toy holds"):
        kit.save(replace(one, modules={}), tmp_path / "none", format="toy")
    assert not (tmp_path / "none").exists()


def test_it_is_merged_verified_and_undone(toy: Path, twin: Path, base: Path, tmp_path: Path) -> None:
    before = contents(base)
    for name, adapter in (("a", toy), ("b", twin)):
        assert adapterkit("merge", base, adapter, "-o", tmp_path / name).code == 0
    weights = [
        {file: data for file, data in contents(tmp_path / name).items() if file.startswith("model-")} for name in "ab"
    ]
    assert weights[0] == weights[1] and len(weights[0]) >= 2
    assert adapterkit("verify", tmp_path / "a", "--base", base, "--adapter", toy).code == 0
    assert adapterkit("unmerge", tmp_path / "a", "-o", tmp_path / "undone").code == 0
    undone = contents(tmp_path / "undone")
    assert all(undone[name] == data for name, data in before.items() if name.endswith(".safetensors"))
    assert adapterkit("merge", toy, toy, "-o", tmp_path / "c").message(2).startswith(f"{toy}: is an adapter")
    assert adapterkit("merge", base, base, "-o", tmp_path / "c").message(2).startswith(f"{base}: is a model")


def test_it_is_inspected(toy: Path, twin: Path, base: Path) -> None:
    one, other = (done("inspect", path, "--against", base) for path in (toy, twin))
    assert one["summary"].pop("format") == "toy" and other["summary"].pop("format") == "peft"
    assert sorted(one["modules"], key=str) == sorted(other["modules"], key=str)
    assert one["summary"] == other["summary"] | {"targets": one["summary"]["targets"]}
    (toy / "twigs.json").write_text("{}")
    assert "unknown: no percent in twigs.json; give --alpha" in adapterkit("inspect", toy).out
    assert adapterkit("inspect", toy, "--scaling", "2").code == 0
    assert done("inspect", toy, "--alpha", "6")["summary"]["scalings"] == [1.5]


@pytest.mark.parametrize(
    ("command", "options"),
    [("combine", ["--rank", "2"]), ("resize", ["--energy", "0.9"]), ("convert", ["--to", "rslora"])],
)
def test_it_is_combined_resized_and_converted(
    command: str, options: list[str], toy: Path, twin: Path, tmp_path: Path
) -> None:
    for name, adapter in (("a", toy), ("b", twin)):
        assert adapterkit(command, adapter, "-o", tmp_path / name, *options).code == 0
    one, other = (kit.load(tmp_path / name) for name in "ab")
    assert one.format == "peft" and one.base_model == BASE and one.config == other.config
    for name in one.modules:
        assert torch.equal(one[name].A, other[name].A) and torch.equal(one[name].B, other[name].B)


def test_it_is_written_where_it_is_asked_for(twin: Path, tmp_path: Path) -> None:
    done("combine", twin, "-o", tmp_path / "sum", "--format", "toy")
    done("convert", twin, "-o", tmp_path / "scaled", "--to", "lora", "--format", "toy")
    kit.resize(twin, tmp_path / "same", rank=4, format="toy")
    for name in ("sum", "scaled", "same"):
        made = {path.name for path in (tmp_path / name).iterdir()}
        assert made == {"twigs.safetensors", "twigs.json", "README.md", "adapterkit_adapter.json"}
        assert kit.compare([tmp_path / name, twin])[0].total.distance < 1e-6
        assert "library_name: toylib" in (tmp_path / name / "README.md").read_text()
    assert "did you mean toy" in adapterkit("combine", twin, "-o", "x", "--format", "toyy").message(2)
    with pytest.raises(UsageError, match="format 'toyy': expected one of peft, toy"):
        kit.resize(twin, "x", rank=4, format="toyy")


def test_it_is_compared_and_given_magnitudes(toy: Path, twin: Path, base: Path, tmp_path: Path) -> None:
    [pair] = kit.compare([toy, twin])
    assert pair.total.cosine == pytest.approx(1)
    for name, adapter in (("a", toy), ("b", twin)):
        kit.convert(adapter, tmp_path / name, to="dora", base=base)
    one, other = (kit.load(tmp_path / name) for name in "ab")
    assert all(torch.equal(one[name].magnitude, other[name].magnitude) for name in other.modules)


def test_it_is_listed_and_shown_in_the_app_and_deleted(toy: Path, twin: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half/twigs.json").write_text('{"size": 7, "on": "lab/base"}')
    write_toy(tmp_path / "pickled", size=4)
    (tmp_path / "pickled/twigs.safetensors").rename(tmp_path / "pickled/twigs.pickle")
    rows = {Path(row.name).name: row for row in list_folders([tmp_path])}
    assert rows.keys() == {"toy", "twin", "half", "pickled"}
    shown = [(row.kind, row.ranks, row.alphas, row.base_model, row.problem) for row in (rows["toy"], rows["twin"])]
    assert shown[0] == shown[1] == ("LoRA", (4,), (6.0,), BASE, None)
    half, pickled = rows["half"], rows["pickled"]
    assert (half.state, half.kind, half.ranks, half.problem) == ("partial", "Toy", (7,), "weights are missing")
    assert (pickled.state, pickled.kind, pickled.ranks, pickled.problem) == ("here", "Toy", (4,), None)
    details = details_of(rows["toy"], str(base))
    assert details.facts["kind"] == "toy, LoRA" and details.facts["scaling"] == "1.5" and not details.warnings
    assert "4 of 4" in details.fit and details.config == {"percent": 150, "on": BASE}
    new, gone = changes(tmp_path, {row.name: row.modified for row in rows.values() if row is not rows["toy"]})
    assert [Path(row.name).name for row in new] == ["toy"] and not gone
    assert [Path(row["path"]).name for row in done("list", tmp_path)["adapters"]] == [*rows]
    (toy / "notes.txt").write_text("mine")
    plan = plan_removal(rows["toy"])
    assert [file.name for file, _ in plan.files] == ["twigs.safetensors", "twigs.json"] and plan.remaining == (
        "notes.txt",
    )
    remove(plan)
    assert list(contents(toy)) == ["notes.txt"]


def test_files_of_two_formats_in_one_folder_do_not_mix(toy: Path, twin: Path, tmp_path: Path) -> None:
    """A format that uses the weights' name reads them, with its own config, whatever the other config says."""
    for name, data in contents(toy).items():
        (twin / name).write_bytes(data or b"")
    (twin / "twigs.json").write_text("{")
    adapter = kit.load(twin)
    assert adapter.format == "peft" and [file.name for file in adapter.files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    assert set(adapter.stamps) == set(adapter.files)
    [row] = list_folders([twin])
    assert (row.kind, row.ranks, row.problem) == ("LoRA", (4,), None) and details_of(row, "").config == CONFIG | {
        "base_model_name_or_path": BASE
    }
    (twin / "twigs.json").write_text('{"percent": 150}')
    assert kit.load(twin / "twigs.safetensors").format == "toy"
    (twin / "adapter_model.safetensors").unlink()
    assert kit.load(twin).format == "toy" and set(kit.load(twin).stamps) == {
        twin / "twigs.safetensors",
        twin / "twigs.json",
    }
    assert [file.name for file, _ in plan_removal(row).files] == [
        "twigs.safetensors",
        "adapter_config.json",
        "twigs.json",
    ]


def test_it_is_on_the_hub(hub: Hub, toy: Path, twin: Path, base: Path, tmp_path: Path) -> None:
    hub.add(BASE, {name: data for name, data in contents(base).items() if data is not None})
    (toy / "twigs.json").write_text(json.dumps({"percent": 150, "on": "/home/somebody/base"}))
    for path, downloads in ((toy, 7), (twin, 9)):
        assert adapterkit("push", path, f"me/{path.name}", "--base-id", BASE).code == 0
        hub.repos[f"me/{path.name}"].downloads = downloads
    sent = hub.repos["me/toy"].files()
    assert sent.keys() == {"README.md", "twigs.json", "twigs.safetensors", ".gitattributes"}
    assert json.loads(sent["twigs.json"].data) == {"percent": 150, "on": BASE}
    card = sent["README.md"].data.decode()
    assert "library_name: toylib\n" in card and '```python\nimport toylib\ntoylib.grow("me/toy")\n```' in card
    assert [row.name for row in list_hub(None, "", "downloads")] == ["me/twin", "me/toy"]
    assert [row.name for row in list_hub(BASE, "toy", "trending")] == ["me/toy"]
    seen = done("inspect", "me/toy")
    assert seen["summary"]["format"] == "toy" and seen["fetched"] == sum(
        len(sent[name].data) for name in table.names_of_format(toyformat) if name in sent
    )
    hub.repos["me/toy"].commit(dict(sent) | {"twigs.pickle": sent["README.md"]}, "an older one beside it")
    assert adapterkit("pull", "me/toy").code == 0
    assert not hub.asked("GET .*twigs.pickle")
    assert adapterkit("merge", base, "me/toy", "-o", tmp_path / "merged").code == 0
    hub.add("me/none", {"notes.json": b"{}"})
    assert (
        adapterkit("pull", "me/none").message(1).endswith("expected adapter_config.json or twigs.json or config.json")
    )


def test_help_and_errors_name_it(tmp_path: Path) -> None:
    shown = adapterkit("inspect", "--help").out
    assert "toy" in shown and "twigs.safetensors" in shown
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterkitError, match=r"supported formats: peft, toy$"):
        kit.load(tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterkitError, match=r"Expected adapter_model\.safetensors or twigs\.safetensors\.$"):
        kit.load(tmp_path / "empty")


# --- and nothing outside names one -----------------------------------------------------------------------------------

# Names that only formats may use: of files, and of config keys (except those that recipes have too).
NAMES = {
    *table.file_names(), "peft", "peft_type", "task_type", "lora_alpha", "use_rslora", "use_dora", "lora_dropout",
    "target_parameters", "trainable_token_indices", "ensure_weight_tying", "lora_A", "lora_B",
}  # fmt: skip
PACKAGE = Path(kit.__file__).parent


def leaks(source: str) -> list[str]:
    """Return constants that only formats may use, and reads of adapter configs by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            found.append(f"{node.lineno}: {node.value!r}")
        if isinstance(node, ast.Attribute) and node.attr == "config" and "adapter" in ast.unparse(node.value).lower():
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_code_outside_the_formats_depends_on_one() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE / "adapter" / "formats"]
    found = {str(file.relative_to(PACKAGE)): leaks(file.read_text()) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line", ['a = "adapter_config.json"', 'one.adapter.config["r"]', "adapters[0].config", '{"lora_alpha": 1}']
)
def test_the_check_sees_leaks(line: str) -> None:
    assert leaks(line)
