"""Fixtures shared by the tests: small bases and adapters, the real base model, real adapters, and a Hub."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hubserver import Hub, serving
from hypothesis import settings
from safetensors.torch import save_file

# Set before any import: no test reaches the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run its kernels on the CPU

# In the background of a shell ctrl-C is ignored, which processes started by tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Collecting garbage among the objects of torch and transformers takes time, and finds nothing.
gc.set_threshold(50_000, 20, 50)

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
MATERIAL = ROOT.parent / "shared" / "material"

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests, unless `-m slow` or a name selects them."""
    asked = config.getoption("markexpr") or config.getoption("keyword") or any("::" in arg for arg in config.args)
    for item in items if not asked else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes long: `make slow` runs it"))


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products don't gain from threads, and test processes would compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, from `make base`."""
    path = Path(os.environ.get("ADAPTERKIT_CACHE", ROOT / ".cache")) / "SmolLM2-135M-Instruct"
    if not (path / "config.json").is_file():
        pytest.skip("SmolLM2-135M-Instruct is not there: run `make base`")
    return path


@pytest.fixture
def material() -> Callable[[str], Path]:
    """Return the path of a real adapter, by its folder."""

    def find(name: str) -> Path:
        if not (MATERIAL / name).exists():
            pytest.skip(f"no ../shared/material/{name} here")
        return MATERIAL / name

    return find


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Write a base checkpoint from tensors: a directory with a config, in one file or in several shards."""

    def make(tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, shards: int = 1) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {}))
        names = list(tensors)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = names[index::shards]
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a PEFT adapter from tensors named without the prefix, with `config` over the defaults (r 4, alpha 6)."""

    def make(tensors: dict[str, torch.Tensor], name: str = "adapter", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        defaults = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}
        (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
        return folder

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A local Hub for this test, with a token that can write for `me`; the client's waits take no time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        for name, value in {  # for processes that a test starts
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub-home"), "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        hub.slept = []
        monkeypatch.setattr(time, "sleep", hub.slept.append)
        close_session()
        yield hub
        close_session()


def factors(module: str, out: int, inner: int, rank: int = 4, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Return random A (rank, in) and B (out, rank) of `module`, by PEFT's names."""
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inner) * size,
        f"{module}.lora_B.weight": torch.randn(out, rank) * size,
    }
