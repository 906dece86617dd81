"""Train as TRL's documentation does, by SFTTrainer with a `peft_config`, on records that are tokens already.

What its defaults would decide is set to what the others do: no gradient checkpointing, no autocast, a constant rate,
records in the order they come. Without flash attention it packs too, with a warning: transformers then makes a mask of
1024 × 1024 that ends where a sequence does, and attends by SDPA.
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
    """SFTTrainer that keeps the loss of its last step, as it would log it, its tokens, and its places with padding."""

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
    """Tells `begin` that the first step is about to start, and `step` of each that has ended."""

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
    """One pass over `records`, `batch` at a time, or packed into rows with `room` for so many tokens."""
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
