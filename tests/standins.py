"""Simulated conditions: a full disk, a kill at a given moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def nth_call(function: Callable[..., Any], n: int, act: Callable[[], None]) -> Callable[..., Any]:
    """Return `function` with `act` called before its n-th call."""
    calls = 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            act()
        return function(*args, **kwargs)

    return hooked


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail
