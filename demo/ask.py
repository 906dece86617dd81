"""Complete a raw prompt greedily with a model directory, optionally with a LoRA adapter applied by peft."""

import argparse
import logging
import os
import warnings
from pathlib import Path

# The answer is all this prints: must be set before the libraries below are imported.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


def complete(model_dir: Path, prompt: str, max_tokens: int, adapter: Path | None = None) -> str:
    """Return the greedy continuation of `prompt`, up to the end token or `max_tokens` tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", trust_remote_code=False)
    if adapter:
        from peft import PeftModel  # slow to import, so only where it is needed

        model = PeftModel.from_pretrained(model, adapter)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Read the command line and print the completion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter directory, applied with peft")
    parser.add_argument("--line", action="store_true", help="stop at the end of the first line")
    args = parser.parse_args()
    text = complete(args.model_dir, args.prompt, args.max_tokens, args.adapter).strip()
    print(text.split("\n", 1)[0] if args.line else text)


if __name__ == "__main__":
    main()
