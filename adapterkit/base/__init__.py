"""Base checkpoints: their tensors, the targets of adapter modules in them, and quantized weights."""
