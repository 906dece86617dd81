"""Merge an adapter as in PEFT's documentation: `peft_merge.py BASE ADAPTER OUTPUT MAX_SHARD_SIZE [HOW]`.

HOW is a device for a 16-bit base. For a 4-bit one it is `requantize`, which is PEFT's merge, or `dequantize`, which
makes the model 16-bit first; tensors are saved with safetensors then, since transformers 5.23 cannot save a model that
it loaded in 4 bits (NotImplementedError).

"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, adapter, output, max_shard_size, *more = sys.argv[1:]
how = more[0] if more else None
quantized = how in ("requantize", "dequantize")
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.bfloat16, device_map="cpu" if quantized else how, trust_remote_code=False
)
if how == "dequantize":
    model = model.dequantize()
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
if quantized:
    Path(output).mkdir()
    save_file(merged.state_dict(), Path(output) / "model.safetensors")
else:
    merged.save_pretrained(output, max_shard_size=max_shard_size)
