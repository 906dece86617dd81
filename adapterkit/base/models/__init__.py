"""A checkpoint as a model and a tokenizer of transformers, from checked files alone and without code of theirs."""
