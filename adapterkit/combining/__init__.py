"""Make adapters from adapters or models, and compare them."""
