"""Merge an adapter as PEFT's documentation does: `peft_merge.py BASE ADAPTER OUTPUT MAX_SHARD_SIZE [HOW]`.

HOW is for a 4-bit base: `requantize` is what PEFT's merge does, `dequantize` makes the model 16-bit before. There the
tensors are saved by safetensors, since transformers 5.23 cannot save what it loaded in 4 bits (NotImplementedError).
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, adapter, output, max_shard_size, *how = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu" if how else None)
if how == ["dequantize"]:
    model = model.dequantize()
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
if how:
    Path(output).mkdir()
    save_file(merged.state_dict(), Path(output) / "model.safetensors")
else:
    merged.save_pretrained(output, max_shard_size=max_shard_size)
