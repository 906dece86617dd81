"""Signals held back while a step must not be torn apart: none is lost, none comes in between, none changes for good."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from adapterkit.files.staging import defer_signals
from adapterkit.files.system import END_SIGNALS


@pytest.fixture
def came() -> Iterator[list[int]]:
    """Which signals were handled so far, by handlers that were there before."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in END_SIGNALS}
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_comes_at_the_end_to_whom_it_is_for(number: int, came: list[int]) -> None:
    handlers = [signal.getsignal(one) for one in END_SIGNALS]
    with defer_signals():
        with defer_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)
        assert came == []
    assert came == [number, number]
    assert [signal.getsignal(one) for one in END_SIGNALS] == handlers
    signal.raise_signal(number)
    assert came == [number] * 3


def test_signals_of_several_kinds_come_in_their_order(came: list[int]) -> None:
    order = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    with defer_signals():
        for number in order:
            signal.raise_signal(number)
    assert came == order


def test_ctrl_c_after_an_error_hides_it_not(came: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as raised, defer_signals():
        signal.raise_signal(signal.SIGINT)
        raise OSError("the disk is full")
    assert isinstance(raised.value.__context__, OSError)
    with pytest.raises(OSError, match="full"), defer_signals():
        raise OSError("the disk is full")


def test_what_is_ignored_stays_ignored(came: list[int]) -> None:
    """As ctrl-C is in the background of a shell, and SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with defer_signals():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert came == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_changes_no_handlers(came: list[int]) -> None:
    """Python handles signals in the main thread alone, and lets no other change how."""
    handlers, done = [signal.getsignal(one) for one in END_SIGNALS], []

    def work() -> None:
        with defer_signals():
            done.append([signal.getsignal(one) for one in END_SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [handlers]
