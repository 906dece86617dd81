"""Training data: records from files, tokenized, in the order of the steps."""
