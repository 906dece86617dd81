"""Deferred signals: none is lost, none interrupts the block, and handlers are restored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from adapterkit.files.os_calls import END_SIGNALS
from adapterkit.files.staging import defer_signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals handled so far, by handlers installed before."""
    handled: list[int] = []
    before = {number: signal.signal(number, lambda which, _: handled.append(which)) for number in END_SIGNALS}
    yield handled
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_their_handlers_after_the_block(number: int, handled: list[int]) -> None:
    handlers = [signal.getsignal(one) for one in END_SIGNALS]
    with defer_signals():
        with defer_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)
        assert handled == []
    assert handled == [number, number]
    assert [signal.getsignal(one) for one in END_SIGNALS] == handlers
    signal.raise_signal(number)
    assert handled == [number] * 3


def test_signals_of_several_kinds_keep_their_order(handled: list[int]) -> None:
    order = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    with defer_signals():
        for number in order:
            signal.raise_signal(number)
    assert handled == order


def test_ctrl_c_keeps_an_error_as_its_context(handled: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as raised, defer_signals():
        signal.raise_signal(signal.SIGINT)
        raise OSError("the disk is full")
    assert isinstance(raised.value.__context__, OSError)
    with pytest.raises(OSError, match="full"), defer_signals():
        raise OSError("the disk is full")


def test_ignored_signals_stay_ignored(handled: list[int]) -> None:
    """As ctrl-C in the background of a shell, and SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with defer_signals():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert handled == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_changes_no_handlers(handled: list[int]) -> None:
    """Python handles signals in the main thread only, and allows handlers to be set only there."""
    handlers, done = [signal.getsignal(one) for one in END_SIGNALS], []

    def work() -> None:
        with defer_signals():
            done.append([signal.getsignal(one) for one in END_SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [handlers]
