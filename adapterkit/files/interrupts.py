"""Hold back ctrl-C and its like while a step must not be torn apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the handlers of signals that arrive meanwhile run at the end, in the main thread, where Python runs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in NUMBERS if callable(handler := signal.getsignal(number))}
    arrived: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda which, _: arrived.append(which))
        yield
    finally:
        for number, handler in handlers.items():  # SIGINT last: until then it is still noted
            signal.signal(number, handler)
        for which in arrived:
            signal.raise_signal(which)
