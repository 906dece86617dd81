"""Requests side by side, on threads that need not be waited for: a silent socket would hold up ctrl-C.

`concurrent.futures` waits for its threads, when its executor closes or at the latest when Python ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """What `work` makes of each of `items`, in their order.

    The first failure is raised once the others that had begun are done; ctrl-C at once.
    """
    todo: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()
    for numbered in enumerate(items):
        todo.put(numbered)
    ended = threading.Event()

    def take() -> None:
        with suppress(queue.Empty):
            while not ended.is_set():
                at, item = todo.get_nowait()
                try:
                    done.put((at, work(item), None))
                except BaseException as error:
                    ended.set()
                    done.put((at, None, error))

    workers = [threading.Thread(target=take, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    results: dict[int, R] = {}
    try:
        for _ in items:
            at, result, error = done.get()
            if error is not None:
                raise error
            results[at] = result  # type: ignore[assignment]
    except BaseException as error:
        ended.set()
        if isinstance(error, Exception):
            for worker in workers:
                worker.join()
        raise
    return [results[at] for at in range(len(items))]
