"""Combine two adapters by `svd` as in PEFT's documentation: `peft_combine.py BASE ONE OTHER OUTPUT RANK`."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, one, other, output, rank = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
model = PeftModel.from_pretrained(model, one, "one")
model.load_adapter(other, "other")
model.add_weighted_adapter(["one", "other"], [0.7, 0.3], "both", combination_type="svd", svd_rank=int(rank))
model.save_pretrained(output, selected_adapters=["both"])
