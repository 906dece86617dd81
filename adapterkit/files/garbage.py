"""Python's collector of cyclic garbage kept away from millions of objects that are no garbage.

It looks at all objects again whenever there are a quarter more of them: where a plan is made of a model of many small
tensors, that takes as long as everything else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect nothing meanwhile, while many objects and no cycles are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
