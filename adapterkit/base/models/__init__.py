"""Load checkpoints as transformers models and tokenizers, from checked files only and without running their code."""
