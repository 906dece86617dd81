"""Real adapters, each merged into a random base of the true architecture and shapes, and compared with float64.

What an adapter doesn't touch, as the vocabulary and the MLP, is as small as the architecture allows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PretrainedConfig

from .trial import hashes, relative, run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def gpt_neo() -> PretrainedConfig:
    return transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=768, intermediate_size=16, num_layers=12, num_heads=12, max_position_embeddings=64,
        attention_types=[[["global", "local"], 6]],
    )  # fmt: skip


def privacy_filter() -> PretrainedConfig:
    return transformers.OpenAIPrivacyFilterConfig(
        vocab_size=96, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2
    )


@pytest.mark.parametrize(
    "name, model, config",
    [
        ("movies-lora", transformers.GPTNeoForCausalLM, gpt_neo),
        ("sift-opf-zh", transformers.OpenAIPrivacyFilterForTokenClassification, privacy_filter),
    ],
)
def test_a_real_adapter_on_a_base_of_its_architecture(
    name: str,
    model: type[transformers.PreTrainedModel],
    config: Callable[[], PretrainedConfig],
    material: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    adapter, base, merged = material(name), tmp_path / "base", tmp_path / "merged"
    model(config()).save_pretrained(base)
    assert run("merge", base, adapter, "-o", merged) is None
    check(base, merged, oracle.merged(load_file(base / "model.safetensors"), adapter))
    ids = torch.arange(3, 20)[None]
    expected = PeftModel.from_pretrained(model.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        assert relative(model.from_pretrained(merged).eval()(ids).logits, expected(ids).logits) < 1e-5
    assert run("unmerge", merged, "-o", tmp_path / "restored", "--adapter", adapter) is None
    assert hashes(tmp_path / "restored") == hashes(base)


@pytest.mark.slow
def test_a_real_adapter_of_old_peft_on_a_base_of_its_architecture(
    material: Callable[[str], Path], tmp_path: Path
) -> None:
    """BLOOM-560m, whose MLP has no small size: 1.2 GB. Each of 24 modules has factors for q and v, not for k."""
    adapter, base, merged = material("bloom-lora-bin"), tmp_path / "base", tmp_path / "merged"
    config = transformers.BloomConfig(vocab_size=96, hidden_size=1024, n_layer=24, n_head=16)
    transformers.BloomForCausalLM(config).save_pretrained(base)
    assert run("merge", base, adapter, "-o", merged) is None
    state = torch.load(adapter / "adapter_model.bin", map_location="cpu", weights_only=True)
    weights, expected = load_file(base / "model.safetensors"), {}
    for layer in range(24):
        module = f"transformer.h.{layer}.self_attention.query_key_value"
        A, B = (state[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        exact = weights[f"{module}.weight"].double()
        exact[:1024] += 2 * B[:1024, :, 0] @ A[:8]
        exact[2048:] += 2 * B[1024:, :, 0] @ A[8:]
        expected[f"{module}.weight"] = oracle.Expected(exact, oracle.FP32 * exact.abs())
    check(base, merged, expected)
    assert run("unmerge", merged, "-o", tmp_path / "restored", "--adapter", adapter) is None
    assert hashes(tmp_path / "restored") == hashes(base)


def check(base: Path, merged: Path, expected: dict[str, oracle.Expected]) -> None:
    """Check the tensors that change against float64, and that the others are those of the base."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys() and expected.keys() <= after.keys()
    for name, tensor in after.items():
        if name in expected:
            oracle.check(tensor, expected[name])
        else:
            assert torch.equal(tensor, before[name]), name
