"""Parallel requests on daemon threads, so that ctrl-C doesn't wait for a silent socket.

`concurrent.futures` joins its threads when the executor closes, and at exit.
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
    """Return `work(item)` for each of `items`, in order; see `run_parallel`."""
    results = dict(filter(None, run_parallel(work, items, threads)))
    return [results[at] for at in range(len(items))]


def run_parallel(
    work: Callable[[T], R], items: Sequence[T], threads: int, interval: float | None = None
) -> Iterator[tuple[int, R] | None]:
    """Yield the index and `work(item)` for each of `items` as they finish, and None every `interval` seconds between.

    The first exception is raised once the running calls are done, KeyboardInterrupt at once.
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
                at, result, error = done.get(timeout=interval)
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
