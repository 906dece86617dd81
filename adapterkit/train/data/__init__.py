"""What is trained on: records out of files, as tokens, in the order of the steps."""
