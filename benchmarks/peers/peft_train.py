"""Train as in PEFT's documentation: load a model, add factors, and run a plain loop.

QLoRA is without `prepare_model_for_kbit_training`, which casts norms and the output layer to fp32 and so costs more.

"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(base: Path, dtype: torch.dtype, device: str, nf4: bool) -> Any:
    """Load the model, with its linear layers in NF4 with nested scales on request."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": torch.device(device)}, "attn_implementation": "sdpa"}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options)
    model.config.use_cache = False
    return model


def lora(rank: int, alpha: float, dora: bool) -> LoraConfig:
    """Add factors to all linear layers but the output layer."""
    return LoraConfig(r=rank, lora_alpha=int(alpha), target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")


def train(
    model: Any, config: LoraConfig, batches: Iterable[Sequence[list[int]]], lr: float,
    begin: Callable[[Any], None], step: Callable[[float, int, int], None],
) -> None:  # fmt: skip
    """Run a step for each of `batches`, padded to its longest; calls `step` with the loss, tokens and positions."""
    device = model.device
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    begin(model)
    for records in batches:
        ids = pad_sequence([torch.tensor(record) for record in records], batch_first=True).to(device)
        lengths = torch.tensor([len(record) for record in records], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step(loss.item(), sum(map(len, records)), ids.numel())
