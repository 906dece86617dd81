"""The trainer's core: layers with factors, the loss, the model as the loop sees it, and the loop.

On any model of torch:

>>> from adapterkit import train
>>> train.inject(model, train.Lora(targets="all-linear", rank=16))
>>> ...  # any loop and optimizer over the parameters that require a gradient
>>> adapterkit.save(train.adapter_of(model), "adapter")

`products` has the arithmetic, `layers` what is put into a model by `injection`, `initial` how it starts, `loss` cross
entropy in chunks, `causal` batches without padding, `loop` the steps; `runs/` whole runs, with their files.
"""

from adapterkit.train.injection import Lora, adapter_of, disabled, inject, inject_from, lora_layers, quicken
from adapterkit.train.loss import chunked_cross_entropy

__all__ = ["Lora", "adapter_of", "chunked_cross_entropy", "disabled", "inject", "inject_from", "lora_layers", "quicken"]
