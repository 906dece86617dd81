"""The trainer: LoRA layers, the loss, the model wrapper and the training loop.

Works on any torch model:

>>> from adapterkit import train
>>> train.inject(model, train.Lora(targets="all-linear", rank=16))
>>> ...  # train the parameters that require a gradient, in any loop
>>> adapterkit.save(train.adapter_of(model), "adapter")

`products` holds the arithmetic, `layers` the LoRA layers, `injection` puts them into a model, `initial` initializes
them, `loss` is chunked cross entropy, `causal_lm` handles batches without padding, `loop` the steps; `data/` reads
records, `runs/` does complete runs and writes their files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.train.injection import (
        Lora,
        adapter_of,
        disabled,
        inject,
        inject_from,
        lora_layers,
        use_fast_products,
    )
    from adapterkit.train.loss import chunked_cross_entropy

__all__ = [
    "Lora",
    "adapter_of",
    "chunked_cross_entropy",
    "disabled",
    "inject",
    "inject_from",
    "lora_layers",
    "use_fast_products",
]


def __getattr__(name: str) -> Any:
    """Import torch on first use, so that `adapterkit train --help` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'adapterkit.train' has no attribute {name!r}")
    from adapterkit.train import injection, loss

    return getattr(loss if name == "chunked_cross_entropy" else injection, name)
