"""`adapterkit inspect` on real files: its output, its numbers, the files it reads, and its plots."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import FIXTURES, factors
from safetensors.torch import load_file

import adapterkit
from adapterkit.cli.commands.inspect import inspect_command
from adapterkit.errors import AdapterkitError, OutputExistsError, UsageError
from adapterkit.inspection.report import AdapterReport

Make = Callable[..., Path]


def inspect(*words: str | Path) -> Result:
    result = CliRunner().invoke(inspect_command, [str(word) for word in words])
    if isinstance(result.exception, AdapterkitError):
        raise result.exception
    return result


def facts(*words: str | Path) -> dict[str, Any]:
    """Return the JSON, strictly parsed: without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON")

    return json.loads(inspect(*words, "--json").stdout, parse_constant=refuse)


def test_the_summary_of_a_real_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)  # a path of its own length, wherever the tests lie
    output = inspect("smollm2-wikisql").stdout
    assert "format      peft, LoRA\n" in output and "layers      12–29 (18)\n" in output
    assert "parameters  1,465,344\n" in output and "base        HuggingFaceTB/SmolLM2-135M-Instruct\n" in output
    assert all(target in output for target in ("q_proj", "v_proj", "down_proj"))
    assert max(map(len, output.splitlines())) <= 80 and "\x1b" not in output


@pytest.mark.parametrize(
    "name", ["tiny-rslora", "tiny-patterns", "tiny-dora", "tiny-conv1d", "tiny-conv", "smollm2-wikisql"]
)
def test_the_numbers_of_every_module(name: str) -> None:
    found = facts(FIXTURES / name)["modules"]
    tensors = load_file(FIXTURES / name / "adapter_model.safetensors")
    config = json.loads((FIXTURES / name / "adapter_config.json").read_text())
    assert len(found) == sum(".lora_A" in key for key in tensors)
    for row in found[:: 1 + len(found) // 20]:  # of many, some: the dense matrix takes its time
        A, B = (tensors[f"base_model.model.{row['name']}.lora_{x}.weight"].double().flatten(1) for x in "AB")
        scaling = oracle.scaling_of(config, row["name"], A.shape[0])
        sigma = torch.linalg.svdvals(scaling * B @ A)
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        assert row["rank"] == A.shape[0] and row["scaling"] == pytest.approx(scaling)
        assert row["frobenius"] == pytest.approx(float(sigma.norm()), rel=1e-4)
        assert row["spectral"] == pytest.approx(float(sigma[0]), rel=1e-4)
        assert row["stable_rank"] == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=1e-4)
        assert row["rank_90"] == int((energy < 0.90).sum()) + 1
        assert row["rank_99"] == int((energy < 0.99).sum()) + 1
        assert row["zero_B"] is False and row["non_finite"] == 0


def test_the_kind_of_an_adapter() -> None:
    kinds = {name: facts(FIXTURES / name, "--header-only")["summary"]["kind"] for name in ("tiny-dora", "tiny-rslora")}
    assert kinds == {"tiny-dora": "DoRA", "tiny-rslora": "rsLoRA"}


def test_reading_headers_does_not_import_torch() -> None:
    code = (
        "import sys; from adapterkit.cli.commands.inspect import inspect_command\n"
        f"inspect_command([{str(FIXTURES / 'smollm2-wikisql')!r}, '--header-only'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "rank        8" in result.stdout


def test_modules_lists_every_one() -> None:
    output = inspect(FIXTURES / "tiny-patterns", "--modules").stdout
    listed = [line.split()[:4] for line in output.splitlines() if "×" in line and "proj" in line]
    assert len(listed) == 14 and ["1.self_attn.q_proj", "48×48", "3", "2.333"] in listed
    rows = facts(FIXTURES / "tiny-patterns", "--modules")["modules"]
    assert [len(row["sigma"]) for row in rows] == [row["rank"] for row in rows]


def unwrapped(text: str) -> str:
    """Return the output with line breaks removed, since they depend on the length of paths."""
    return " ".join(text.split())


def test_the_relative_size_against_a_base() -> None:
    base = FIXTURES / "bases" / "tiny-llama"
    found = facts(FIXTURES / "tiny-rslora", "--against", base)
    assert (found["against"]["found"], found["against"]["total"]) == (6, 6)
    W = load_file(base / "model.safetensors")
    for row in found["modules"]:
        norm = float(W[f"{row['name']}.weight"].double().norm())
        assert row["relative"] == pytest.approx(row["frobenius"] / norm, rel=1e-6)
    assert "6 of 6 modules found" in unwrapped(inspect(FIXTURES / "tiny-rslora", "--against", base).stdout)


def test_another_base_exits_with_3_and_the_reason() -> None:
    result = inspect(FIXTURES / "smollm2-wikisql", "--against", FIXTURES / "bases" / "tiny-llama")
    assert result.exit_code == 3 and "0 of 126 modules found" in unwrapped(result.stdout)


def test_problems_are_reported(make_adapter: Make) -> None:
    tensors = factors("m.q_proj", 6, 10) | factors("m.v_proj", 6, 10) | {"stray": torch.ones(2)}
    tensors["m.q_proj.lora_B.weight"].zero_()
    tensors["m.v_proj.lora_A.weight"][0, 0] = torch.nan
    adapter = make_adapter(tensors, target_modules=["q_proj", "v_proj", "o_proj"])
    found = facts(adapter)
    rows = {row["name"]: row for row in found["modules"]}
    assert rows["m.q_proj"]["zero_B"] is True and rows["m.q_proj"]["frobenius"] == 0
    assert rows["m.v_proj"]["non_finite"] == 1 and rows["m.v_proj"]["frobenius"] is None
    assert found["summary"]["unread"] == ["base_model.model.stray"]
    assert [problem["what"] for problem in found["summary"]["problems"]] == ["'o_proj' has no tensors"]
    output = inspect(adapter).stdout
    assert "o_proj" in output and "stray" in output and output.count("⚠") >= 3


def test_inspect_in_python_equals_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)  # the command wraps lines with long paths
    adapter, base = Path("tiny-dora"), Path("bases/tiny-llama")
    for options, words in (
        ({}, []),
        ({"against": base}, ["--against", base]),
        ({"header_only": True}, ["--header-only"]),
    ):
        report = adapterkit.inspect(adapter, **options)
        printed = facts(adapter, "--modules", *words)
        assert json.loads(json.dumps(report.facts())).items() <= printed.items()
        assert inspect(adapter, *words).stdout.startswith(str(report)) and len(repr(report).splitlines()) == 1
    opened = adapterkit.inspect(adapterkit.load(adapter))
    assert isinstance(opened, AdapterReport) and opened.summary == report.summary and opened.measured
    of_base = adapterkit.inspect(base)
    assert f"{of_base}\n" == inspect(base).stdout and of_base.facts().items() <= facts(base).items()
    for options, said in (
        ({"alpha": 2.0}, "`alpha` is about adapters"),
        ({"full": True, "header_only": True}, "one of them"),
    ):
        with pytest.raises(UsageError, match=said):
            adapterkit.inspect(base, **options)


def test_a_rank_that_contradicts_the_tensors_is_reported(make_adapter: Make) -> None:
    assert "rank 3" in inspect(make_adapter(factors("m", 6, 10, rank=3))).stdout


def test_without_a_config_the_strength_is_unknown_until_given(make_adapter: Make) -> None:
    adapter = make_adapter(factors("m", 6, 10))
    (adapter / "adapter_config.json").unlink()
    unknown, known = facts(adapter), facts(adapter, "--alpha", "6")
    assert unknown["modules"][0]["scaling"] is None and "give --alpha" in inspect(adapter).stdout
    assert known["modules"][0]["scaling"] == 1.5
    assert known["modules"][0]["frobenius"] == pytest.approx(1.5 * unknown["modules"][0]["frobenius"])


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_drawn(suffix: str, start: bytes, tmp_path: Path) -> None:
    plot = tmp_path / f"plot{suffix}"
    assert inspect(FIXTURES / "smollm2-wikisql", "--plot", plot).exit_code == 0
    assert plot.read_bytes().startswith(start) and [file.name for file in tmp_path.iterdir()] == [plot.name]
    if suffix == ".svg":
        assert plot.stat().st_size > 20_000  # 126 spectra are paths


def test_invalid_plots_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="header-only"):
        inspect(FIXTURES / "tiny-dora", "--header-only", "--plot", tmp_path / "a.png")
    with pytest.raises(UsageError, match="jpg"):
        inspect(FIXTURES / "tiny-dora", "--plot", tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_replaces_plots_only(suffix: str, tmp_path: Path) -> None:
    """For every file type and the longest names."""
    plot, thesis, link = (tmp_path / f"{name}{suffix}" for name in ("x" * 251, "thesis", "link"))
    for adapter in ("tiny-dora", "tiny-rslora"):
        assert inspect(FIXTURES / adapter, "--plot", plot).exit_code == 0
    thesis.write_text("years of work, of which adapterkit 1.0 drew a picture")
    link.symlink_to(plot)
    for path in (thesis, link):
        with pytest.raises(OutputExistsError):
            inspect(FIXTURES / "tiny-dora", "--plot", path)
    assert thesis.read_text().startswith("years") and link.is_symlink() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["movies-lora", "sift-opf-zh", "bloom-lora-bin"])
def test_real_adapters(name: str, material: Callable[[str], Path]) -> None:
    found = facts(material(name))
    assert found["summary"]["modules"] == len(found["modules"]) > 0 and not found["summary"]["unread"]
    assert all(row["frobenius"] > 0 for row in found["modules"])
