"""Limit calls to the Hub in time, response size, redirects and log output.

The whole process shares one client session, which may be the user's own, and one logger. During a call, hooks are
installed on both; they ignore other threads, and are removed after the last call.
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
clock = time.monotonic  # replaced in tests

MAX_RESPONSE_BYTES = 16 << 20  # except for files; metadata of the largest repositories takes a few MB
SEND_TIMEOUT = 60.0  # seconds for the Hub to respond to an upload
MAX_RETRY_AFTER = 300.0  # seconds: the Hub's rate limits apply to periods of five minutes
MAX_UNANSWERED = 3  # requests; the client itself would retry for half a minute
SILENCE_TIMEOUTS = 2.0  # request timeouts without a response, after which the Hub counts as unreachable
RESPONSE_TIMEOUTS = 6.0  # request timeouts for a complete response, and between measurements of a download's speed
MIN_SPEED = 1000  # bytes per second
MAX_REQUESTS = 100  # per call, including the client's retries
STREAMED = "adapterkit.file"  # request extension: the response is a file, passed on in chunks
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)


def bounded(subject: str, call: Callable[[], T], max_bytes: int = MAX_RESPONSE_BYTES, files: bool = False) -> T:
    """Return `call()`, limiting the time of its requests and the size of each response to `max_bytes` bytes.

    With `files`, and for requests marked as STREAMED, responses are passed on in chunks. The call runs in a thread of
    its own, which is abandoned if response headers never end. Raises OfflineError, and AdapterkitError for responses
    that no Hub sends.
    """
    limits = _Call(subject, max_bytes, files)
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            with _hooks.installed(), limits.active():
                result = call()
        except BaseException as error:
            done.put((None, error))
        else:
            done.put((result, None))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            with suppress(queue.Empty):
                result, error = done.get(timeout=RESPONSE_TIMEOUTS * _timeout())
                break
            limits.check()
    finally:
        limits.ended = True
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def retry_after(headers: Any) -> float | None:
    """The seconds to wait that a response asks for."""
    match = re.search(r"t=(\d+)", headers.get("ratelimit", "")) or re.fullmatch(
        r"(\d+)", headers.get("retry-after", "")
    )
    return float(match[1]) if match else None


def _timeout() -> float:
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    return float(HF_HUB_ETAG_TIMEOUT)


class _Call:
    """The limits of one call, and its requests so far; used by one thread."""

    def __init__(self, subject: str, max_bytes: int, files: bool) -> None:
        self.subject, self.max_bytes, self.files, self.ended = subject, max_bytes, files, False
        self._requests = self._unanswered = 0
        self._silent_since = 0.0
        self._deadline: float | None = None  # of the response under way

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply the hooks to this thread's requests."""
        _this_thread.call = self
        try:
            yield
        finally:
            _this_thread.call = None

    def check(self) -> None:
        """Raise OfflineError after the deadline, and once the caller has stopped waiting."""
        if self.ended or (self._deadline is not None and clock() > self._deadline):
            raise OfflineError(f"{self.subject}: the Hub does not respond in time; try again later")

    def on_request(self, request: Any) -> None:
        """Set a request's timeouts and check its address; raises OfflineError if the Hub has stopped responding."""
        self.check()
        now, limit = clock(), _timeout()
        if not self._unanswered:
            self._silent_since = now
        if self._unanswered == MAX_UNANSWERED or now - self._silent_since > SILENCE_TIMEOUTS * limit:
            raise OfflineError(f"{self.subject}: the Hub cannot be reached, or does not respond")
        self._unanswered += 1
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            raise AdapterkitError(f"{self.subject}: the Hub's response does not end within {MAX_REQUESTS} requests")
        _check_address(self.subject, request)
        timeout = limit if request.method in ("GET", "HEAD") else SEND_TIMEOUT
        timeouts = request.extensions.setdefault("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            if timeouts.get(phase) is None:
                timeouts[phase] = timeout
        if not request.extensions.get(STREAMED):
            request.headers["Accept-Encoding"] = "identity"
        self._deadline = now + RESPONSE_TIMEOUTS * timeout + int(request.headers.get("Content-Length", 0)) / MIN_SPEED
        if "Transfer-Encoding" in request.headers:  # of unknown length
            self._deadline = None

    def on_response(self, response: Any) -> None:
        """Mask and limit a response before its body is read."""
        self.check()
        self._unanswered = 0
        request, status = response.request, response.status_code
        wait = retry_after(response.headers) if status in RETRY_STATUSES else None
        if wait is not None and wait > MAX_RETRY_AFTER:
            raise OfflineError(f"{self.subject}: rate limit exceeded: the Hub asks to retry in {wait:,.0f} s")
        sent = request.headers.get("Authorization")
        headers = response.headers
        response.headers = type(headers)([(name, masked_bytes(value, sent)) for name, value in headers.raw])
        response.extensions["reason_phrase"] = masked_bytes(response.extensions.get("reason_phrase", b""), sent)
        is_file = (request.extensions.get(STREAMED) or self.files) and status in (200, 206)
        if request.method != "HEAD" and (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise AdapterkitError(f"{self.subject}: unexpected Content-Encoding in the Hub's response: {coding[:20]}")
        response.stream = _stream_class()(
            response.stream, self._stream_file if is_file else lambda s: self._read_all(s, sent)
        )

    def _stream_file(self, stream: Any) -> Iterator[bytes]:
        """Yield the chunks of a file as they arrive; raises OfflineError below MIN_SPEED."""
        span, self._deadline = RESPONSE_TIMEOUTS * _timeout(), None
        since, count, total = clock(), 0, 0
        for chunk in stream:
            yield chunk
            count, total = count + len(chunk), total + len(chunk)
            if self.files and total > self.max_bytes:
                raise AdapterkitError(f"{self.subject}: the Hub sent more than {self.max_bytes:,} bytes")
            now = clock()
            if now - since > span:
                if count < MIN_SPEED * span:
                    speed = f"{count:,} bytes in {now - since:,.0f} s"
                    raise OfflineError(f"{self.subject}: the Hub sent only {speed}; try again later to resume")
                since, count = now, 0

    def _read_all(self, stream: Any, sent: str | None) -> Iterator[bytes]:
        """Yield a complete response, tokens masked."""
        data = bytearray()
        for chunk in stream:
            data += chunk
            self.check()
            if len(data) > self.max_bytes:
                raise AdapterkitError(f"{self.subject}: the Hub's response has more than {self.max_bytes:,} bytes")
        self._deadline = None
        yield masked_json(bytes(data), sent)


class _ThisThread(threading.local):
    call: _Call | None = None


_this_thread = _ThisThread()


@cache
def _stream_class() -> Any:
    """The class of response bodies that pass through a function; a subclass of the lazily imported httpx's."""
    from huggingface_hub.utils import httpx

    class ResponseStream(httpx.SyncByteStream):
        def __init__(self, stream: Any, through: Callable[[Any], Iterator[bytes]]) -> None:
            self._stream, self._through = stream, through

        def __iter__(self) -> Iterator[bytes]:
            return self._through(self._stream)

        def close(self) -> None:
            self._stream.close()

    return ResponseStream


# --- addresses -------------------------------------------------------------------------------------------------------


def _check_address(subject: str, request: Any) -> None:
    """Remove the token from a request to a server other than the Hub.

    Raises UnsafeFileError if the Hub redirects to a private address, or to one without encryption.
    """
    from huggingface_hub import constants

    origins = [urlsplit(hub) for hub in (constants.ENDPOINT, "https://huggingface.co", "https://hf.co")]
    url = urlsplit(str(request.url))
    if _origin(url) in map(_origin, origins):
        return
    request.headers.pop("Authorization", None)
    if url.scheme != "https" and origins[0].scheme == "https":
        raise UnsafeFileError(f"{subject}: the Hub redirects to {_display(url)}, which is not encrypted")
    if _is_private_host(url.hostname or "") and not _is_private_host(origins[0].hostname or ""):
        raise UnsafeFileError(f"{subject}: the Hub redirects to {_display(url)}, a private address")


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, (url.hostname or "").lower(), url.port or {"http": 80, "https": 443}.get(url.scheme)


def _display(url: Any) -> str:
    return masked(f"{url.scheme}://{url.hostname or ''}")[:100]


def _is_private_host(host: str) -> bool:
    """Whether a host is this machine or in its network, judged by its name."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host.rstrip(".").lower().endswith(("localhost", ".local", ".internal")) or "." not in host


# --- process-wide hooks ----------------------------------------------------------------------------------------------


class _Hooks(logging.Handler):
    """The hooks on the client's sessions and logger, installed while a call is running."""

    def __init__(self) -> None:
        super().__init__()
        self._count_lock = threading.RLock()
        self._count = 0
        self._sessions: list[Any] = []
        self._handlers: list[logging.Handler] = []
        self._progress_bars: bool | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the hooks with the first call, remove them after the last."""
        with self._count_lock:
            self._count += 1
            if self._count == 1:
                self._install()
            self._hook_session()
        try:
            yield
        finally:
            with self._count_lock:
                self._count -= 1
                if not self._count:
                    self._uninstall()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on only that the client waits: its log messages contain URLs."""
        if _this_thread.call is None:
            return
        if (text := record.getMessage()).startswith("Rate limited"):
            log.warning("rate limit exceeded: %s", masked(text.partition(". ")[2]))
        elif text.startswith("Retrying"):  # after a failed connection the client creates a new session
            with self._count_lock:
                self._hook_session()

    def _install(self) -> None:
        from huggingface_hub.utils.tqdm import progress_bar_states

        client_logger = logging.getLogger("huggingface_hub")
        self._handlers = list(client_logger.handlers)
        for handler in self._handlers:
            handler.addFilter(_is_foreign)
        client_logger.addHandler(self)
        self._progress_bars = progress_bar_states.get("_global")
        progress_bar_states["_global"] = False
        warnings.filterwarnings("ignore", module=r"huggingface_hub\b(?#adapterkit)")
        self._ignored = warnings.filters[0]

    def _hook_session(self) -> None:
        from huggingface_hub.utils import get_session

        session = get_session()
        if session not in self._sessions:
            self._sessions.append(session)
            hooks = session.event_hooks
            hooks["request"], hooks["response"] = [*hooks["request"], _on_request], [*hooks["response"], _on_response]

    def _uninstall(self) -> None:
        from huggingface_hub.utils.tqdm import progress_bar_states

        for session in self._sessions:
            hooks = session.event_hooks
            hooks["request"] = [hook for hook in hooks["request"] if hook is not _on_request]
            hooks["response"] = [hook for hook in hooks["response"] if hook is not _on_response]
        self._sessions.clear()
        logging.getLogger("huggingface_hub").removeHandler(self)
        for handler in self._handlers:
            handler.removeFilter(_is_foreign)
        if self._progress_bars is None:
            progress_bar_states.pop("_global", None)
        else:
            progress_bar_states["_global"] = self._progress_bars
        with suppress(ValueError):
            warnings.filters.remove(self._ignored)  # type: ignore[attr-defined]


def _is_foreign(record: logging.LogRecord) -> bool:
    """Whether a record was logged outside adapterkit's calls."""
    return _this_thread.call is None


def _on_request(request: Any) -> None:
    if (call := _this_thread.call) is not None:
        call.on_request(request)


def _on_response(response: Any) -> None:
    if (call := _this_thread.call) is not None:
        call.on_response(response)


_hooks = _Hooks()
