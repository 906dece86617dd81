"""Requests side by side, on threads that need not be waited for: a silent socket would hold up ctrl-C.

`concurrent.futures` waits for its threads, when its executor closes or at the latest when Python ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """What `work` makes of each of `items`, in their order; see `in_parallel`."""
    results = dict(filter(None, in_parallel(work, items, threads)))
    return [results[at] for at in range(len(items))]


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], threads: int, every: float | None = None
) -> Iterator[tuple[int, R] | None]:
    """What `work` makes of each of `items`, with its place, as it is done; None where that takes `every` seconds.

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
    left = len(items)
    try:
        while left:
            try:
                at, result, error = done.get(timeout=every)
            except queue.Empty:
                yield None
                continue
            if error is not None:
                raise error
            left -= 1
            yield at, result  # type: ignore[misc]
    except BaseException as error:
        ended.set()
        if isinstance(error, Exception):
            for worker in workers:
                worker.join()
        raise
