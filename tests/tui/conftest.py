"""What every test of the app has: a quick app, three adapters in a folder, and a Hub that has them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, contents, write_adapter, write_base
from hubserver import Hub
from textual._compositor import Compositor

from adapterkit.inspection import cache
from adapterkit.tui import app as module
from adapterkit.tui import browser
from adapterkit.tui.widgets import adapter_table
from tui.driver import BASE, ROOT


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting for a person's pace, no user, no disk of this machine, and a cache of its own."""
    monkeypatch.setattr(adapter_table, "LOOKING", 0.001)
    monkeypatch.setattr(adapter_table, "TYPING", 0.001)
    monkeypatch.setattr(browser, "CHANGES_EVERY", 3600.0)
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "measured")
    monkeypatch.setattr(module, "machine", lambda: "disk 81G")
    monkeypatch.setattr(module, "who", lambda: ("online @me", ""))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(autouse=True)
def seldom_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pictures are drawn, where one is asked for; to draw each change, unseen, takes half of a test's time."""
    draw = Compositor.render_update

    def render_update(self: Compositor, full: bool = False, **how: Any) -> Any:
        if full:
            return draw(self, full, **how)
        self._dirty_regions.clear()

    monkeypatch.setattr(Compositor, "render_update", render_update)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters of one base, one of which is broken; and the base."""
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"base_model_name_or_path": BASE}
    write_adapter(tmp_path / "mine" / "one", config=config)
    write_adapter(tmp_path / "mine" / "two", config=config | {"lora_alpha": 9})
    (tmp_path / "mine" / "one" / "README.md").write_text("# The first\n")
    (tmp_path / "mine" / "broken").mkdir()
    (tmp_path / "mine" / "broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    write_base(tmp_path / "base")
    return Path("mine")


@pytest.fixture
def there(hub: Hub, folder: Path) -> Hub:
    """The adapters of the folder on the Hub, and the base."""

    def files(path: str) -> dict[str, bytes]:
        return {name: data for name, data in contents(Path(path)).items() if data is not None}

    card = f"---\nbase_model: {BASE}\nlibrary_name: peft\n---\n# It\n".encode()
    for number in range(120):
        hub.add(f"some/lora-{number:03}", files("mine/one") | {"README.md": card}, downloads=number)
    hub.add(BASE, files("base"))
    return hub
