"""Paths of the benchmarks: the checkout, its cache, the model and the texts."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("ADAPTERKIT_CACHE", ROOT / ".cache")).resolve() / "bench"
BASE = CACHE.parent / "SmolLM2-135M-Instruct"  # from `make base`
TEXTS = ROOT.parent / "shared" / "material" / "text"
