"""The app in a real terminal, which is tmux, with a real model: keys in, screen text out."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import contents

pytestmark = [
    pytest.mark.base,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]
ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds


class Terminal:
    """A terminal that runs a command; its screen is read whenever the command writes."""

    def __init__(self, folder: Path, command: list[str], size: tuple[int, int]) -> None:
        self._tmux = ["tmux", "-L", f"adapterkit-{os.getpid()}-{folder.name}", "-f", "/dev/null"]
        pipe = folder / "written"
        os.mkfifo(pipe)
        self._written = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self.run("new-session", "-d", "-s", "t", "-x", str(size[0]), "-y", str(size[1]), "-c", str(folder), "sh")
        self.run("pipe-pane", "-t", "t", f"cat > {pipe}")
        self.press(f"{' '.join(command)}; echo en''ded", "Enter")

    def run(self, *args: str) -> str:
        """Run a tmux command."""
        return subprocess.run([*self._tmux, *args], capture_output=True, text=True, check=True).stdout

    def press(self, *keys: str) -> None:
        """Type keys, by tmux's names."""
        self.run("send-keys", "-t", "t", *keys)

    def screen(self) -> str:
        """Return the text on the screen."""
        return self.run("capture-pane", "-p", "-t", "t")

    def see(self, *texts: str) -> str:
        """Wait until all `texts` are on the screen, checking whenever something was written."""
        end = time.monotonic() + PATIENCE
        while not all(text in (screen := self.screen()) for text in texts):
            left = end - time.monotonic()
            assert left > 0, f"{texts} not seen:\n{screen}"
            if select.select([self._written], [], [], left)[0]:
                os.read(self._written, 1 << 16)
        return screen

    def close(self) -> None:
        """Terminate the command."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)
        os.close(self._written)


@pytest.fixture
def terminal(tmp_path: Path, smollm2: Path) -> Iterator[Terminal]:
    """The app in a folder with SmolLM2 and a fixture adapter, twice."""
    (tmp_path / "base").symlink_to(smollm2)
    for name in ("one", "two"):
        shutil.copytree(ROOT / "fixtures" / "smollm2-wikisql", tmp_path / "mine" / name)
    env = f"env -u COLUMNS -u LINES HF_HUB_OFFLINE=1 XDG_CACHE_HOME={tmp_path / 'cache'} PYTHONPATH={ROOT} TERM=tmux-256color"
    found = Terminal(
        tmp_path, [env, sys.executable, "-m", "adapterkit", "tui", "mine", "--base", "base"], size=(130, 40)
    )
    yield found
    found.close()


def test_browse_inspect_compare_merge_unmerge_quit(terminal: Terminal, tmp_path: Path, smollm2: Path) -> None:
    terminal.see("●  one", "●  two", "126 of 126 targets found")
    terminal.press("2")
    terminal.see("down_proj", "99% rank", "layer")
    terminal.press("3")
    terminal.see("90% of ‖ΔW‖²")
    terminal.press("1", "Space", "Space")
    terminal.see("2 selected")
    terminal.press("c")
    terminal.see("126 modules in both; cosine +1.000")
    terminal.press("Escape")
    terminal.see("sources")
    terminal.press("Space", "m")
    terminal.see("Merge into the base")
    terminal.press("C-s")
    terminal.see("all 126 modules match the base", "Run")
    terminal.press("C-s")
    terminal.see("✓ merge done")
    assert (tmp_path / "one-merged" / "model.safetensors").is_file()
    terminal.press("u")
    terminal.see("Undo a merge")
    terminal.press(*"one-merged", "Tab", "C-u")
    terminal.see("adapterkit unmerge one-merged --adapter")
    terminal.press(*"again")
    terminal.see("adapterkit unmerge one-merged -o again")
    terminal.press("C-s")
    terminal.see("restores  126 of 272 tensors, changed by one", "Run")
    terminal.press("C-s")
    terminal.see("✓ unmerge done")
    terminal.press("J")
    terminal.see("exact     every file has the SHA-256 that the base had")
    terminal.press("Escape")
    terminal.see("sources")
    terminal.press("q")
    terminal.see("ended")
    before, after = contents(smollm2), contents(tmp_path / "again")
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("colour", ["NO_COLOR=1", "TERM=vt100"])
def test_without_colour(tmp_path: Path, colour: str) -> None:
    shutil.copytree(ROOT / "fixtures" / "tiny-dora", tmp_path / "mine" / "one")
    env = f"env -u COLUMNS -u LINES HF_HUB_OFFLINE=1 XDG_CACHE_HOME={tmp_path / 'cache'} PYTHONPATH={ROOT} {colour}"
    terminal = Terminal(tmp_path, [env, sys.executable, "-m", "adapterkit", "tui", "mine"], size=(80, 24))
    try:
        terminal.see("●  one", "DoRA")
        terminal.press("2", "Enter")
        terminal.see("▐x▌ q", "down_proj")
        terminal.press("Q")
        terminal.see("▐ ▌ q")
        terminal.press("Escape")
        terminal.see("sources")
        terminal.press("q")
        terminal.see("ended")
    finally:
        terminal.close()
