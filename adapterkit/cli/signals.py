"""Handle Ctrl-C and SIGTERM from the start: unfinished output is removed, and the exit code is 128 plus the signal."""

from __future__ import annotations

import os
import signal

from adapterkit.files import os_calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"
AGAIN = 0.002  # seconds until a signal that arrived during an import is raised again


class Terminated(KeyboardInterrupt):
    """Ends the command like ctrl-C, for another signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def end_at_once() -> None:
    """Exit on signals at once, while there is no output to remove."""
    _handle(lambda number, _: _exit(number))


def end_cleanly() -> None:
    """Raise an exception on signals, but after imports: those swallow it, or remain half done."""
    _handle(_interrupt)
    if os_calls.HAS_TIMER:
        signal.signal(signal.SIGALRM, _interrupt_again)
        signal.siginterrupt(signal.SIGALRM, False)


def ignore() -> None:
    """Ignore further signals at the end."""
    for number in os_calls.END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if os_calls.HAS_TIMER:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _handle(handler: signal._HANDLER) -> None:
    for number in os_calls.END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background, or under nohup
            signal.signal(number, handler)


_waiting: list[int] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    if frame is None or not os_calls.HAS_TIMER:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
    _waiting.append(number)
    signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _interrupt_again(*_: object) -> None:
    if _waiting:  # for whichever handler it has by now, as where it is held back
        signal.raise_signal(_waiting.pop())


def _exit(number: int) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)
