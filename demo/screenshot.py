"""The picture of the app in the README, from a real run: SmolLM2, the fixtures, a merge that was watched to its end."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}
from adapterkit.tui.app import AdapterkitApp  # after what the client reads when it is imported

ROOT = Path(__file__).resolve().parents[1]
BASE = ".cache/SmolLM2-135M-Instruct"
PICTURE = ROOT / "docs" / "app.svg"


async def main() -> None:
    """Drive the app by its keys, and save what it shows."""
    os.chdir(ROOT)
    app = AdapterkitApp([Path("fixtures")], BASE)
    with tempfile.TemporaryDirectory() as out:
        async with app.run_test(size=(132, 34)) as pilot:
            await pilot.pause(1.0)
            app.run_job(["merge", BASE, "fixtures/smollm2-wikisql", "-o", f"{out}/merged"])
            await app.workers.wait_for_complete([worker for worker in app.workers if worker.group == "jobs"])
            await pilot.press("2", "space")
            await app.workers.wait_for_complete()
            await pilot.press("k")
            app.clear_notifications()
            await pilot.pause(1.0)
            svg = app.export_screenshot(title="adapterkit tui fixtures")
    PICTURE.write_text(re.sub(r"terminal-\d+", "terminal", svg))  # the same picture is the same file


asyncio.run(main())
