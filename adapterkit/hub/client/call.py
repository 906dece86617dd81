"""Calls to the Hub, retried where that helps, with adapterkit's own errors.

The client retries only some calls, and its errors take a dozen lines with URLs in them, so all calls go through
`call_hub`. `session` bounds their time and size.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import AdapterkitError, MissingFileError, NotAllowedError, OfflineError
from adapterkit.hub.client.limits import MAX_RESPONSE_BYTES, RETRY_STATUSES, bounded, retry_after
from adapterkit.hub.client.masking import masked

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds
MAX_SUGGESTIONS = 3


def call_hub(
    repo: str,
    call: Callable[[HfApi], T],
    waits: tuple[float, ...] = RETRY_WAITS,
    max_bytes: int = MAX_RESPONSE_BYTES,
    files: bool = False,
) -> T:
    """Return `call(HfApi())`, retried after `waits` seconds, or when the Hub says so, while the Hub is busy.

    Responses have at most `max_bytes` bytes; with `files` they may be files. Errors name `repo`: FormatError if the
    Hub has no such thing, NotAllowedError, OfflineError, otherwise AdapterkitError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    with hub_errors(repo):
        _check_token(repo)
        for wait in (*waits, None):
            try:
                with checked_response(repo):
                    return bounded(repo, lambda: call(HfApi()), max_bytes, files)
            except HfHubHTTPError as error:
                if wait is None or error.response.status_code not in RETRY_STATUSES:
                    raise
                wait = retry_after(error.response.headers) or wait
                log.warning("the Hub is busy (%d); retrying in %.0f s", error.response.status_code, wait)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                if wait is None:
                    raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


@contextmanager
def checked_response(repo: str) -> Iterator[None]:
    """Raise AdapterkitError where the client cannot parse a response, because it is not from a Hub."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (AdapterkitError, errors.HFValidationError, errors.HfHubHTTPError):
        raise  # all can be ValueErrors, and none is about the response's form
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {one_line(str(error))}"
        raise AdapterkitError(
            f"{repo}: invalid response ({found}); is {masked(constants.ENDPOINT)} a Hugging Face Hub?"
        ) from error


def user() -> str | None:
    """The name of the logged-in user, or None without a token if the Hub can be reached."""
    if _token() is None:
        call_hub("the Hub", lambda api: next(iter(api.list_models(limit=1)), None))
        return None
    return str(call_hub("the Hub", lambda api: api.whoami())["name"])


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the client's errors about `repo` into adapterkit's."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    try:
        yield
    except AdapterkitError:
        raise  # OfflineError is a ConnectionError too
    except errors.HFValidationError as error:
        raise MissingFileError(f"{repo}: no such path, and not a valid repository name") from error
    except errors.LocalTokenNotFoundError as error:
        raise NotAllowedError(f"{repo}: a token is required: run `hf auth login`, or set HF_TOKEN") from error
    except errors.GatedRepoError as error:
        login = "" if _token() else ", then run `hf auth login`"
        raise NotAllowedError(f"{repo}: gated repository: request access at {page_url(repo)}{login}") from error
    except errors.RevisionNotFoundError as error:
        raise MissingFileError(f"{repo}: revision not found{_existing_revisions(repo)}") from error
    except errors.RepositoryNotFoundError as error:
        private = "; if it is private, " + ("this token has no access to it" if _token() else "run `hf auth login`")
        raise MissingFileError(
            f"{repo}: no such path or repository on the Hub{private}.{_suggestions(repo)}"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise OfflineError(f"{repo}: not in the Hub cache, and the Hub cannot be reached") from error
        raise MissingFileError(f"{repo}: file not found in the repository") from error
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(f"{repo}: the Hub is not available (HF_HUB_OFFLINE is set)") from error
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, error) from error
    except httpx.TimeoutException as error:
        raise OfflineError(f"{repo}: the Hub does not respond") from error
    except (httpx.HTTPError, ConnectionError, TimeoutError) as error:  # Xet raises Python's
        raise OfflineError(f"{repo}: the Hub cannot be reached ({_first_line(error)})") from error


def _http_error(repo: str, error: Any) -> AdapterkitError:
    """The error for an HTTP status for which the client has no exception of its own."""
    status, reason = error.response.status_code, error.server_message or _first_line(error)
    if reason.lstrip().startswith("<"):  # an HTML page
        reason = error.response.reason_phrase
    if status == 401:
        return NotAllowedError(f"{repo}: invalid token: run `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return NotAllowedError(f"{repo}: permission denied for this token ({one_line(reason)})")
    if status in RETRY_STATUSES:
        why = "rate limit exceeded" if status == 429 else "the Hub is out of service"
        return OfflineError(f"{repo}: {why} ({status}), also after retries; try again later")
    if status == 412:
        return AdapterkitError(f"{repo}: the repository has changed in the meantime; nothing was committed, try again")
    return AdapterkitError(f"{repo}: the Hub refused ({status}): {one_line(reason)}")


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _check_token(repo: str) -> None:
    """Raise NotAllowedError for a token that is not valid in a header: the client's error would print it."""
    if (token := _token()) and not re.fullmatch(r"[!-~]+", token):
        raise NotAllowedError(
            f"{repo}: invalid token: contains a space, a control character or a non-ASCII letter; set HF_TOKEN, "
            "or run `hf auth login`"
        )


def _first_line(error: BaseException) -> str:
    return (masked(str(error)).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str) -> str:
    """`text` on one line, tokens masked."""
    return " ".join(masked(text).split())[:300]


# --- suggestions -----------------------------------------------------------------------------------------------------


def page_url(repo: str) -> str:
    """The URL of a repository."""
    from huggingface_hub import constants

    return f"{masked(constants.ENDPOINT)}/{repo.partition('@')[0].partition(':')[0]}"


def _suggestions(repo: str) -> str:
    """Similar names, among the owner's repositories and the search results."""
    from huggingface_hub import HfApi

    owner, _, name = repo.partition("@")[0].partition(":")[0].partition("/")

    def candidates() -> list[ModelInfo]:
        return [*HfApi().list_models(author=owner, limit=100), *HfApi().list_models(search=name, limit=20)]

    try:
        found = bounded(repo, candidates)
    except Exception:  # suggestions must not hide the error that they belong to
        return ""
    names = list(dict.fromkeys(info.id for info in found))
    near = difflib.get_close_matches(f"{owner}/{name}", names, MAX_SUGGESTIONS, 0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _existing_revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = bounded(repo, lambda: HfApi().list_repo_refs(repo.partition("@")[0].partition(":")[0]))
    except Exception:  # as above
        return ""
    return f"; expected one of {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:8])}"
