"""Train as in TRL's documentation, by SFTTrainer with a `peft_config`, on tokenized records.

Settings follow the other tools: no gradient checkpointing, no autocast, a constant learning rate, records in the given
order. It also packs without flash attention, with a warning: transformers then makes a block-diagonal mask of
1024 × 1024 and uses SDPA.

"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Metered(SFTTrainer):
    """An SFTTrainer that records the loss of its last step, its tokens, and its positions with padding."""

    loss: torch.Tensor
    tokens: int
    places: int

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.places = inputs["input_ids"].numel()
        self.tokens = self.places if mask is None else int(mask.sum())
        self.loss = super().training_step(model, inputs, *args, **kwargs)
        return self.loss


class Ends(TrainerCallback):
    """Calls `begin` before the first step, and `step` after each."""

    trainer: Metered

    def __init__(self, begin: Callable[[Any], None], step: Callable[[float, int, int], None]) -> None:
        self.begin, self.step = begin, step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin(self.trainer.model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step(self.trainer.loss.item(), self.trainer.tokens, self.trainer.places)


def train(
    model: Any, records: Sequence[list[int]], config: LoraConfig, batch: int, room: int | None, lr: float,
    begin: Callable[[Any], None], step: Callable[[float, int, int], None],
) -> None:  # fmt: skip
    """Run one pass over `records`, `batch` at a time, or packed into rows of `room` tokens."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0})), eos_token="<end>")
    ends = Ends(begin, step)
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=lr,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
            gradient_checkpointing=False, bf16=False, fp16=False, packing=room is not None, max_length=room,
            train_sampling_strategy="sequential", report_to="none", logging_strategy="no", save_strategy="no",
            eval_strategy="no", disable_tqdm=True, use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        trainer = Metered(
            model, options, train_dataset=Dataset.from_dict({"input_ids": list(records)}), processing_class=words,
            peft_config=config, callbacks=[ends],
        )  # fmt: skip
        ends.trainer = trainer
        trainer.train()
