"""A sample of the matrix, of the most various architectures; `make matrix` runs all of it."""

from pathlib import Path

import pytest

from .models import Model
from .trial import trials

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    "task, name, tied, recipe",
    [
        ("causal", "llama", True, "saved"),
        ("causal", "gemma2", True, "tokens"),
        ("causal", "gpt2", True, "linear"),  # Conv1D, fused q, k, v
        ("causal", "phi3", False, "patterns"),  # fused gate and up
        ("causal", "falcon_mamba", True, "linear"),  # no attention
        ("causal", "gpt_oss", False, "moe"),  # experts stored in × out, with biases
        ("seq2seq", "bart", True, "dora"),
        ("classification", "roberta", None, "embeddings"),
        ("classification", "gemma2", None, "embeddings"),  # a tied head that a classifier lacks
        ("vision", "qwen2_5_vl", False, "linear"),
        ("vision", "llava", False, "embeddings"),
    ],
)
def test_the_merged_model_computes_what_peft_computes(
    task: str, name: str, tied: bool | None, recipe: str, tmp_path: Path
) -> None:
    assert trials(Model(task, name, tied), [recipe], tmp_path) == {recipe: "ok"}
