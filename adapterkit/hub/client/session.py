"""Questions to the Hub that end: what may be waited for, taken in, followed and shown while one is asked.

All of the process shares one client session, which may be the user's own, and one logger. While something is asked
here, hooks are on both; they do nothing for other threads, and are off again when the last question has its answer.
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from adapterkit.errors import AdapterkitError, OfflineError, UnsafeFileError
from adapterkit.hub.client.masking import masked, masked_bytes, masked_json

T = TypeVar("T")
log = logging.getLogger("adapterkit.hub")
clock = time.monotonic  # which tests set

MOST_BYTES = 16 << 20  # of an answer that is no file: listings and facts of the largest repositories have some MB
SENDING = 60.0  # seconds that the Hub may be silent about what was sent to it
LONGEST = 300.0  # seconds that are waited where the Hub asks for it: its limits count by five minutes
UNANSWERED = 3  # requests, which the client repeats for half a minute
SILENCE = 2.0  # times the limit of one request, after which the Hub is taken to be away
WHOLE = 6.0  # times that limit in which a whole answer must be here, and over which the speed of files is measured
SLOWEST = 1000  # bytes a second, of files
REQUESTS = 100  # for one question, with the client's repetitions
FILE = "adapterkit.file"  # marks a request whose answer is a file, taken in piece by piece
BUSY = (408, 429, 500, 502, 503, 504)


def in_time(about: str, question: Callable[[], T], most: int = MOST_BYTES, files: bool = False) -> T:
    """What `question` returns, whose requests take neither too long nor more than `most` bytes each; with `files` those
    of files are taken in piece by piece, as are those of requests that are marked with FILE.

    It is asked on a thread of its own, which is left alone where even its headers never end. Raises OfflineError, and
    AdapterkitError for answers that are no Hub's.
    """
    asked = _Question(about, most, files)
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            with _hooks.held(), asked.on_this_thread():
                result = question()
        except BaseException as error:
            done.put((None, error))
        else:
            done.put((result, None))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            with suppress(queue.Empty):
                result, error = done.get(timeout=WHOLE * _limit())
                break
            asked.check()
    finally:
        asked.ended = True
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def told_to_wait(headers: Any) -> float | None:
    """The seconds to wait, where an answer says so."""
    match = re.search(r"t=(\d+)", headers.get("ratelimit", "")) or re.fullmatch(
        r"(\d+)", headers.get("retry-after", "")
    )
    return float(match[1]) if match else None


def _limit() -> float:
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    return float(HF_HUB_ETAG_TIMEOUT)


class _Question:
    """What was asked and heard so far; of one thread."""

    def __init__(self, about: str, most: int, files: bool) -> None:
        self.about, self.most, self.files, self.ended = about, most, files, False
        self._requests = self._unanswered = 0
        self._silent_since = 0.0
        self._until: float | None = None  # when the answer that is under way must be here

    @contextmanager
    def on_this_thread(self) -> Iterator[None]:
        """Be what the hooks know of this thread's requests."""
        _this_thread.question = self
        try:
            yield
        finally:
            _this_thread.question = None

    def check(self) -> None:
        """Raise OfflineError where it has taken too long, or where nobody waits for it any more."""
        if self.ended or (self._until is not None and clock() > self._until):
            raise OfflineError(f"{self.about}: the Hub does not answer in time; try again later")

    def before(self, request: Any) -> None:
        """Give a request limits, and let it go where it may; raises OfflineError where nothing is heard any more."""
        self.check()
        now, limit = clock(), _limit()
        if not self._unanswered:
            self._silent_since = now
        if self._unanswered == UNANSWERED or now - self._silent_since > SILENCE * limit:
            raise OfflineError(f"{self.about}: the Hub cannot be reached, or does not answer")
        self._unanswered += 1
        self._requests += 1
        if self._requests > REQUESTS:
            raise AdapterkitError(f"{self.about}: the Hub's answer has no end: {REQUESTS} requests, and more to ask")
        _check_address(self.about, request)
        silent = limit if request.method in ("GET", "HEAD") else SENDING
        given = request.extensions.setdefault("timeout", {})
        for what in ("connect", "read", "write", "pool"):
            if given.get(what) is None:
                given[what] = silent
        if not request.extensions.get(FILE):
            request.headers["Accept-Encoding"] = "identity"
        self._until = now + WHOLE * silent + int(request.headers.get("Content-Length", 0)) / SLOWEST
        if "Transfer-Encoding" in request.headers:  # nobody knows how much is sent
            self._until = None

    def after(self, response: Any) -> None:
        """Mask and bound an answer, before anyone has seen more of it than its headers."""
        self.check()
        self._unanswered = 0
        request, status = response.request, response.status_code
        wait = told_to_wait(response.headers) if status in BUSY else None
        if wait is not None and wait > LONGEST:
            raise OfflineError(f"{self.about}: the Hub asks to come back in {wait:,.0f} s")
        sent = request.headers.get("Authorization")
        headers = response.headers
        response.headers = type(headers)([(name, masked_bytes(value, sent)) for name, value in headers.raw])
        response.extensions["reason_phrase"] = masked_bytes(response.extensions.get("reason_phrase", b""), sent)
        is_file = (request.extensions.get(FILE) or self.files) and status in (200, 206)
        if request.method != "HEAD" and (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise AdapterkitError(
                f"{self.about}: the Hub's answer is compressed ({coding[:20]}), which was not asked for"
            )
        response.stream = _answer()(response.stream, self._file if is_file else lambda s: self._whole(s, sent))

    def _file(self, stream: Any) -> Iterator[bytes]:
        """The bytes of a file as they come, if they come fast enough."""
        span, self._until = WHOLE * _limit(), None
        since, count, total = clock(), 0, 0
        for piece in stream:
            yield piece
            count, total = count + len(piece), total + len(piece)
            if self.files and total > self.most:
                raise AdapterkitError(f"{self.about}: the Hub sent more than {self.most:,} bytes")
            now = clock()
            if now - since > span:
                if count < SLOWEST * span:
                    raise OfflineError(
                        f"{self.about}: the Hub sent {count:,} bytes in {now - since:,.0f} s; try again later to go on"
                    )
                since, count = now, 0

    def _whole(self, stream: Any, sent: str | None) -> Iterator[bytes]:
        """The bytes of an answer at once, none of them a token's."""
        data = bytearray()
        for piece in stream:
            data += piece
            self.check()
            if len(data) > self.most:
                raise AdapterkitError(f"{self.about}: the Hub's answer has more than {self.most:,} bytes")
        self._until = None
        yield masked_json(bytes(data), sent)


class _ThisThread(threading.local):
    question: _Question | None = None


_this_thread = _ThisThread()


@cache
def _answer() -> Any:
    """The class of bodies that come through a function of ours; made when the client is there."""
    from huggingface_hub.utils import httpx

    class Answer(httpx.SyncByteStream):
        def __init__(self, stream: Any, through: Callable[[Any], Iterator[bytes]]) -> None:
            self._stream, self._through = stream, through

        def __iter__(self) -> Iterator[bytes]:
            return self._through(self._stream)

        def close(self) -> None:
            self._stream.close()

    return Answer


# --- where requests may go -------------------------------------------------------------------------------------------


def _check_address(about: str, request: Any) -> None:
    """Take the token from a request to another server than the Hub.

    Raises UnsafeFileError where a Hub leads to a server of this machine or its network, or to one without encryption.
    """
    from huggingface_hub import constants

    hubs = [urlsplit(one) for one in (constants.ENDPOINT, "https://huggingface.co", "https://hf.co")]
    url = urlsplit(str(request.url))
    if _origin(url) in map(_origin, hubs):
        return
    request.headers.pop("Authorization", None)
    if url.scheme != "https" and hubs[0].scheme == "https":
        raise UnsafeFileError(f"{about}: the Hub leads to {_shown(url)}, which is not encrypted")
    if _is_near(url.hostname or "") and not _is_near(hubs[0].hostname or ""):
        raise UnsafeFileError(f"{about}: the Hub leads to {_shown(url)}, a server of this machine or its network")


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, (url.hostname or "").lower(), url.port or {"http": 80, "https": 443}.get(url.scheme)


def _shown(url: Any) -> str:
    return masked(f"{url.scheme}://{url.hostname or ''}")[:100]


def _is_near(host: str) -> bool:
    """Whether a server's name says that it is in this machine or its network."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host.rstrip(".").lower().endswith(("localhost", ".local", ".internal")) or "." not in host


# --- what the process shares -----------------------------------------------------------------------------------------


class _Hooks(logging.Handler):
    """What is on the client's session and logger while something is asked, and off again when nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self._lock_of_count = threading.RLock()
        self._count = 0
        self._sessions: list[Any] = []
        self._handlers: list[logging.Handler] = []
        self._bars: bool | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have them on."""
        with self._lock_of_count:
            self._count += 1
            if self._count == 1:
                self._put_on()
            self._hook_session()
        try:
            yield
        finally:
            with self._lock_of_count:
                self._count -= 1
                if not self._count:
                    self._take_off()

    def emit(self, record: logging.LogRecord) -> None:
        """Tell of what the client logs, which has addresses in it, only that it waits."""
        if _this_thread.question is None:
            return
        if (text := record.getMessage()).startswith("Rate limited"):
            log.warning("the Hub asks to wait: %s", masked(text.partition(". ")[2]))
        elif text.startswith("Retrying"):  # where it could not connect, it makes itself a new session
            with self._lock_of_count:
                self._hook_session()

    def _put_on(self) -> None:
        from huggingface_hub.utils.tqdm import progress_bar_states

        theirs = logging.getLogger("huggingface_hub")
        self._handlers = list(theirs.handlers)
        for handler in self._handlers:
            handler.addFilter(_of_others)
        theirs.addHandler(self)
        self._bars = progress_bar_states.get("_global")
        progress_bar_states["_global"] = False
        warnings.filterwarnings("ignore", module=r"huggingface_hub\b(?#adapterkit)")
        self._ignored = warnings.filters[0]

    def _hook_session(self) -> None:
        from huggingface_hub.utils import get_session

        session = get_session()
        if session not in self._sessions:
            self._sessions.append(session)
            hooks = session.event_hooks
            hooks["request"], hooks["response"] = [*hooks["request"], _before], [*hooks["response"], _after]

    def _take_off(self) -> None:
        from huggingface_hub.utils.tqdm import progress_bar_states

        for session in self._sessions:
            hooks = session.event_hooks
            hooks["request"] = [one for one in hooks["request"] if one is not _before]
            hooks["response"] = [one for one in hooks["response"] if one is not _after]
        self._sessions.clear()
        logging.getLogger("huggingface_hub").removeHandler(self)
        for handler in self._handlers:
            handler.removeFilter(_of_others)
        if self._bars is None:
            progress_bar_states.pop("_global", None)
        else:
            progress_bar_states["_global"] = self._bars
        with suppress(ValueError):
            warnings.filters.remove(self._ignored)  # type: ignore[attr-defined]


def _of_others(record: logging.LogRecord) -> bool:
    """Tell whether a record was logged outside of our questions."""
    return _this_thread.question is None


def _before(request: Any) -> None:
    if (question := _this_thread.question) is not None:
        question.before(request)


def _after(response: Any) -> None:
    if (question := _this_thread.question) is not None:
        question.after(response)


_hooks = _Hooks()
