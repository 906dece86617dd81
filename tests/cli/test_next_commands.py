"""Commands printed after a result: they parse, and their paths exist, whatever the names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import click
import pytest
from handmade import Outcome, adapterkit, write_adapter, write_base
from tiny import save_tiny_model

from adapterkit.cli.main import group
from adapterkit.text import argument

NAMES = {
    "plain": "{}", "leading dash": "-{}", "spaces and quotes": "it's {} \"x\" $HOME", "weight": "{}:0.5", "hidden": "\x1b{}\n",
}  # fmt: skip


def printed(result: Outcome) -> dict[str, click.Context]:
    """Return the commands after a result, by label, as a shell splits them and click parses them."""
    assert result.code == 0, result
    found = {}
    _, *parts = re.split(r"^(merge|push|undo) +", result.out, flags=re.MULTILINE)
    for label, line in zip(parts[::2], parts[1::2], strict=True):
        script = f"adapterkit() {{ printf '%s\\0' \"$@\"; }}; {line}"
        shell = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True)
        name, *words = map(os.fsdecode, shell.stdout.split(b"\0")[:-1])
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found[label] = command.make_context(name, words)
    return found


@pytest.mark.parametrize("pattern", NAMES.values(), ids=NAMES)
def test_commands_name_the_output(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter, merged, dora = (pattern.format(word) for word in ("base", "adapter", "merged", "dora"))
    write_base(Path(base))
    write_adapter(Path(adapter))
    found = printed(adapterkit("merge", argument(base), argument(adapter), "-o", merged))
    assert list(found) == ["push", "undo"]
    assert Path(found["push"].params["path"]).samefile(merged)
    assert Path(found["undo"].params["merged"]).samefile(merged)
    [undone] = found["undo"].params["adapters"]
    assert undone == argument(adapter)
    found = printed(adapterkit("convert", argument(adapter), "-o", dora, "--to", "dora", "--base", base))
    assert list(found) == ["merge", "push"]
    assert Path(found["merge"].params["base"]).samefile(base)
    assert [Path(path).samefile(dora) for path in found["merge"].params["adapters"]] == [True]
    assert Path(found["push"].params["path"]).samefile(dora)


def test_every_writing_command_prints_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("-base"))
    Path("data.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    train = ["train", "./-base", "data.jsonl", "-o", "-trained", "--max-steps", "1"]
    found = printed(adapterkit(*train))
    assert list(found) == ["merge", "push"] and found["merge"].params["base"] == "./-base"
    assert adapterkit("merge", *found["merge"].args, "./-base", "./-trained", "-o", "-merged").code == 0
    for args, labels in (
        ("combine ./-trained -o -combined", ["push"]),
        ("resize ./-trained -o -resized --rank 2", ["push"]),
        ("extract ./-base ./-merged -o -extracted --energy 0.9", ["merge", "push"]),
        ("quantize ./-base -o -quantized --to int8", ["push"]),
        ("merge ./-base/model.safetensors ./-trained -o one.safetensors", ["undo"]),
        ("unmerge ./-merged -o -restored --adapter ./-trained", []),
        ("train ./-base data.jsonl -o -full --max-steps 1 --method full", ["push"]),
    ):
        found = printed(adapterkit(*args.split()))
        assert list(found) == labels, args
        if "push" in found:
            assert Path(found["push"].params["path"]).samefile(args.split()[args.split().index("-o") + 1])
