"""One question to the Hub: asked again where that helps, and its errors in our words.

The client retries some of its calls and not others, and says what went wrong in a dozen lines with addresses in them;
here all calls go through `ask`. How long they take and how much comes is bounded in `session`.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import AdapterkitError, FormatError, NotAllowedError, OfflineError
from adapterkit.hub.client.masking import masked
from adapterkit.hub.client.session import BUSY, MOST_BYTES, in_time, told_to_wait

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

T = TypeVar("T")
log = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0)  # seconds before a question is asked again
NEAR = 3  # names that are suggested


def ask(
    repo: str,
    question: Callable[[HfApi], T],
    waits: tuple[float, ...] = WAITS,
    most: int = MOST_BYTES,
    files: bool = False,
) -> T:
    """What the Hub answers about `repo`, in at most `most` bytes, which with `files` may be those of files; asked again
    after `waits` where it is busy, or later where it says when.

    Raises FormatError for what it does not have, NotAllowedError, OfflineError, and AdapterkitError for the rest.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    with asking(repo):
        _check_token(repo)
        for wait in (*waits, None):
            try:
                with understood(repo):
                    return in_time(repo, lambda: question(HfApi()), most, files)
            except HfHubHTTPError as error:
                if wait is None or error.response.status_code not in BUSY:
                    raise
                wait = told_to_wait(error.response.headers) or wait
                log.warning("the Hub is busy (%d); asking again in %.0f s", error.response.status_code, wait)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                if wait is None:
                    raise  # it hung up: at once is as good as later, but not better
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


@contextmanager
def understood(repo: str) -> Iterator[None]:
    """Turn what the client stumbles over in an answer that is none of the Hub's into an error of ours."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HFValidationError, errors.HfHubHTTPError):
        raise  # the former is of the name; of the latter some are ValueErrors, too
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {clean(str(error))}"
        raise AdapterkitError(
            f"{repo}: the answer is none of a Hub's ({said}). Is {masked(constants.ENDPOINT)} one?"
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

    try:
        yield
    except errors.HFValidationError as error:
        raise FormatError(f"{repo}: neither a local path nor a name that the Hub allows") from error
    except errors.LocalTokenNotFoundError as error:
        raise NotAllowedError(f"{repo}: this needs a token: `hf auth login`, or set HF_TOKEN") from error
    except errors.GatedRepoError as error:
        raise NotAllowedError(
            f"{repo}: is gated: ask for access at {page(repo)}{'' if _token() else ', then `hf auth login`'}"
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


def _refused(repo: str, error: Any) -> AdapterkitError:
    """An answer that is an error of no kind of its own."""
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if said.lstrip().startswith("<"):  # a page for a browser
        said = error.response.reason_phrase
    if status == 401:
        return NotAllowedError(f"{repo}: the Hub does not accept the token: `hf auth login`, or mend HF_TOKEN")
    if status == 403:
        return NotAllowedError(f"{repo}: this token may not do that ({clean(said)})")
    if status in BUSY:
        why = "asks to come back later" if status == 429 else "is out of order"
        return OfflineError(f"{repo}: the Hub {why} ({status}), also when it is asked again; try later")
    if status == 412:
        return AdapterkitError(f"{repo}: has changed since it was looked at; nothing was changed, do it again")
    return AdapterkitError(f"{repo}: the Hub refused ({status}): {clean(said)}")


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _check_token(repo: str) -> None:
    """Raise NotAllowedError for a token that no header can hold: the client would print it."""
    if (token := _token()) and not re.fullmatch(r"[!-~]+", token):
        raise NotAllowedError(
            f"{repo}: the token holds a space, a control character or a letter that is not ASCII; set HF_TOKEN again, "
            "or `hf auth login`"
        )


def _first_line(error: BaseException) -> str:
    return (masked(str(error)).strip() or type(error).__name__).splitlines()[0]


def clean(text: str) -> str:
    """One line, without any token, whoever put it there."""
    return " ".join(masked(text).split())[:300]


# --- what to do instead ----------------------------------------------------------------------------------------------


def page(repo: str) -> str:
    """The address of a repository's page."""
    from huggingface_hub import constants

    return f"{masked(constants.ENDPOINT)}/{repo.partition('@')[0].partition(':')[0]}"


def _near(repo: str) -> str:
    """Names like this one: those of its owner, and those that are called alike."""
    from huggingface_hub import HfApi

    owner, _, name = repo.partition("@")[0].partition(":")[0].partition("/")

    def question() -> list[ModelInfo]:
        return [*HfApi().list_models(author=owner, limit=100), *HfApi().list_models(search=name, limit=20)]

    try:
        found = in_time(repo, question)
    except Exception:  # it is an extra: what failed first is what is told
        return ""
    names = list(dict.fromkeys(one.id for one in found))
    near = difflib.get_close_matches(f"{owner}/{name}", names, NEAR, 0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _revisions(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = in_time(repo, lambda: HfApi().list_repo_refs(repo.partition("@")[0].partition(":")[0]))
    except Exception:  # as above
        return ""
    return f"; it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:8])}"
