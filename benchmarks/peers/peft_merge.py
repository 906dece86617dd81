"""Merge an adapter as PEFT's documentation does: `peft_merge.py BASE ADAPTER OUTPUT MAX_SHARD_SIZE`."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, output, max_shard_size = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(output, max_shard_size=max_shard_size)
