"""One question to the Hub: with an end to waiting, asked again where that helps, and its errors in our words.

The client has no limit of time in most of its calls, retries some of them and not others, and says what went wrong in
a dozen lines with addresses in them; here all calls go through `ask` or `asking`.
"""

from __future__ import annotations

import difflib
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import AdapterkitError, FormatError, NotAllowedError, OfflineError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
log = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0)  # seconds before a question is asked again
BUSY = (408, 429, 500, 502, 503, 504)
SENDING = 60.0  # seconds that the Hub may take over what was sent to it
LONGEST = 300.0  # seconds that are waited where the Hub asks for it: its limits count by five minutes
UNANSWERED = 3  # requests, which the client repeats for half a minute
SILENCE = 2.0  # times the limit of one request, after which it is taken to be away
NEAR = 3  # names that are suggested


def ask(repo: str, question: Callable[[HfApi], T], waits: tuple[float, ...] = WAITS) -> T:
    """What the Hub answers about `repo`; asked again after `waits` where it is busy, or later where it says when.

    Raises FormatError for what it does not have, NotAllowedError, OfflineError, and AdapterkitError for the rest.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    with asking(repo):
        for wait in waits:
            try:
                with _patience.with_end(), understood(repo):
                    return question(HfApi())
            except HfHubHTTPError as error:
                if error.response.status_code not in BUSY:
                    raise
                wait = _told(error.response.headers) or wait
                if wait > LONGEST:
                    raise OfflineError(f"{repo}: the Hub asks to come back in {wait:,.0f} s") from error
                log.warning("the Hub is busy (%d); asking again in %.0f s", error.response.status_code, wait)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                pass  # it hung up: at once is as good as later, but not better
            time.sleep(wait)
        with _patience.with_end(), understood(repo):
            return question(HfApi())


@contextmanager
def understood(repo: str) -> Iterator[None]:
    """Turn what the client stumbles over in an answer that is none of the Hub's into an error of ours."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HFValidationError, errors.HfHubHTTPError):
        raise  # the former is of the name; of the latter some are ValueErrors, too
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {_clean(str(error))}"
        raise AdapterkitError(
            f"{repo}: the answer is none of a Hub's ({said}). Is {constants.ENDPOINT} one?"
        ) from error


def user() -> str | None:
    """The name of the user whose token is used, or None where the Hub is there and no token is."""
    if _token() is None:
        ask("the Hub", lambda api: next(iter(api.list_models(limit=1)), None))
        return None
    return str(ask("the Hub", lambda api: api.whoami())["name"])


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """Turn what the client raises while it is asked about `repo` into our errors."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    _prepare_client()
    try:
        yield
    except errors.HFValidationError as error:
        raise FormatError(f"{repo}: neither a local path nor a name that the Hub allows") from error
    except errors.LocalTokenNotFoundError as error:
        raise NotAllowedError(f"{repo}: this needs a token: `hf auth login`, or set HF_TOKEN") from error
    except errors.GatedRepoError as error:
        raise NotAllowedError(
            f"{repo}: is gated: ask for access at {_page(repo)}{'' if _token() else ', then `hf auth login`'}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FormatError(f"{repo}: the repository has no such revision{_revisions(repo)}") from error
    except errors.RepositoryNotFoundError as error:
        private = "private, and this token may not see it" if _token() else "private: `hf auth login`"
        raise FormatError(
            f"{repo}: neither a local path nor a repository on the Hub, or it is {private}.{_near(repo)}"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise OfflineError(f"{repo}: is not in the Hub cache, and the Hub is out of reach") from error
        raise FormatError(f"{repo}: the repository has no such file") from error
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(f"{repo}: HF_HUB_OFFLINE is set, so that the Hub is not asked") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except httpx.TimeoutException as error:
        raise OfflineError(f"{repo}: the Hub does not answer") from error
    except httpx.HTTPError as error:
        raise OfflineError(f"{repo}: the Hub cannot be reached ({_first_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within this the client shows no bars and prints no warnings of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    decided = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if not decided:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not decided:
            enable_progress_bars()


def _refused(repo: str, error: Any) -> AdapterkitError:
    """An answer that is an error of no kind of its own."""
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if said.lstrip().startswith("<"):  # a page for a browser
        said = error.response.reason_phrase
    if status == 401:
        return NotAllowedError(f"{repo}: the Hub does not accept the token: `hf auth login`, or mend HF_TOKEN")
    if status == 403:
        return NotAllowedError(f"{repo}: this token may not do that ({_clean(said)})")
    if status in BUSY:
        why = "asks to come back later" if status == 429 else "is out of order"
        return OfflineError(f"{repo}: the Hub {why} ({status}), also when it is asked again; try later")
    if status == 412:
        return AdapterkitError(f"{repo}: has changed since it was looked at; nothing was changed, do it again")
    return AdapterkitError(f"{repo}: the Hub refused ({status}): {_clean(said)}")


# --- the client ------------------------------------------------------------------------------------------------------


class _Notes(logging.Handler):
    """Of what the client logs, which has addresses in it, only that it waits; and when it begins with a new session."""

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("Rate limited"):
            log.warning("the Hub asks to wait: %s", _clean(text.partition(". ")[2]))
        elif text.startswith("Retrying"):
            _prepare_client()  # where it could not connect, it makes itself a new session, without our hooks


class _Patience(threading.local):
    """Ends requests that are never answered, and questions whose requests are; a thread has its own."""

    heard: float | None = None  # when a question began, or last had an answer
    unanswered = 0  # requests since then

    @contextmanager
    def with_end(self) -> Iterator[None]:
        """Within this the Hub must be heard of now and then."""
        self.heard, self.unanswered = time.monotonic(), 0
        try:
            yield
        finally:
            self.heard = None

    def before(self, request: Any) -> None:
        """Give a request the limits that it lacks; raises OfflineError where nothing has been heard for too long."""
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as LIMIT

        if self.heard is not None:
            if self.unanswered == UNANSWERED or time.monotonic() - self.heard > SILENCE * LIMIT:
                raise OfflineError("the Hub cannot be reached, or does not answer")
            self.unanswered += 1
        limit = LIMIT if request.method in ("GET", "HEAD") else SENDING
        given = request.extensions.setdefault("timeout", {})
        for what in ("connect", "read", "write", "pool"):
            if given.get(what) is None:
                given[what] = limit

    def after(self, response: Any) -> None:
        """Note that there was an answer."""
        if self.heard is not None:
            self.heard, self.unanswered = time.monotonic(), 0


_patience, _notes = _Patience(), _Notes()


def _prepare_client() -> None:
    """Hook into the session that is there now."""
    from huggingface_hub.utils import get_session

    theirs = logging.getLogger("huggingface_hub")
    if _notes not in theirs.handlers:
        theirs.handlers = [_notes]
    session = get_session()
    hooks = session.event_hooks
    if _patience.before not in hooks["request"]:
        session.event_hooks = {
            "request": [*hooks["request"], _patience.before],
            "response": [*hooks["response"], _patience.after],
        }


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _told(headers: Any) -> float | None:
    """The seconds to wait, where the answer says so."""
    match = re.search(r"t=(\d+)", headers.get("ratelimit", "")) or re.fullmatch(
        r"(\d+)", headers.get("retry-after", "")
    )
    return float(match[1]) if match else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _clean(text: str) -> str:
    """One line, without the token, whoever put it there."""
    line = " ".join(text.split())[:300]
    return line.replace(token, "hf_…") if (token := _token()) else line


# --- what to do instead ----------------------------------------------------------------------------------------------


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo.partition('@')[0].partition(':')[0]}"


def _near(repo: str) -> str:
    """Names like this one: those of its owner, and those that are called alike."""
    from huggingface_hub import HfApi

    owner, _, name = repo.partition("@")[0].partition(":")[0].partition("/")
    try:
        found = [*HfApi().list_models(author=owner, limit=100), *HfApi().list_models(search=name, limit=20)]
    except Exception:  # it is an extra: what failed first is what is told
        return ""
    names = list(dict.fromkeys(one.id for one in found))
    near = difflib.get_close_matches(f"{owner}/{name}", names, NEAR, 0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo.partition("@")[0].partition(":")[0])
    except Exception:  # as above
        return ""
    return f"; it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:8])}"
