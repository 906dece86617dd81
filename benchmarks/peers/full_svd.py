"""Extract an adapter by the full SVD of every difference: `full_svd.py BASE TUNED OUTPUT RANK`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

base, tuned, output, rank = sys.argv[1:]
before = {k: v for file in sorted(Path(base).glob("*.safetensors")) for k, v in load_file(file).items()}
after = {k: v for file in sorted(Path(tuned).glob("*.safetensors")) for k, v in load_file(file).items()}
factors = {}
for name, weight in before.items():
    if name.endswith("_proj.weight"):
        U, S, Vh = torch.linalg.svd(after[name].float() - weight.float(), full_matrices=False)
        factors[f"{name}.A"] = Vh[: int(rank)].contiguous()
        factors[f"{name}.B"] = (U[:, : int(rank)] * S[: int(rank)]).contiguous()
save_file(factors, output)
