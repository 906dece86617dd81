"""The Python calls for the Hub: download and upload models and adapters.

>>> adapterkit.pull("HuggingFaceTB/SmolLM2-135M-Instruct", "base").path  # every byte checked against its hash
>>> plan = adapterkit.plan_push("adapter", "me/lora")  # everything checked; nothing is sent
>>> for event in adapterkit.run(plan): ...  # BytesDone …, then Pushed
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.api.options.hub import PullCall, PullOptions, PushCall, PushOptions
from adapterkit.api.run import in_one_call
from adapterkit.hub.events import Pulled, Pushed
from adapterkit.options import takes

if TYPE_CHECKING:
    from adapterkit.hub.pull import PullPlan
    from adapterkit.hub.upload.push import PushPlan


@takes(PullOptions)
def plan_pull(o: PullOptions) -> PullPlan:
    """Plan a download of the files that the Hub cache lacks; nothing is downloaded.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        FormatError: invalid id, or neither an adapter nor a base in the repository.
        OfflineError, NotAllowedError: the Hub cannot be reached, or denies access.
        OutputExistsError: `out` exists.
    """
    from adapterkit.hub.pull import plan_pull as make_plan

    ids = [o.ids] if isinstance(o.ids, str) else list(o.ids)
    return make_plan(ids, None if o.out is None else Path(o.out).expanduser())


@takes(PullCall)
def pull(o: PullCall) -> Pulled:
    """Download in one call: `plan_pull`, then `run` to its end.

    Returns:
        The local folders, one per id; `path` is the first.

    Raises:
        NoSpaceError: the disk is too small.
        AdapterkitError: a file does not match its hash on the Hub; and the errors of `plan_pull`.
    """
    return in_one_call(plan_pull.of, o, Pulled)


@takes(PushOptions)
def plan_push(o: PushOptions) -> PushPlan:
    """Plan an upload: check the folder, its base, the token and the repository; nothing is sent.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        FormatError, FitError: the folder does not load, contains NaN or Inf, or its base is not on the Hub.
        UnsafeFileError: a file contains a secret or a local path.
        NotAllowedError: the token has no write access.
    """
    from adapterkit.hub.upload.push import plan_push as make_plan

    return make_plan(
        Path(o.path).expanduser(), o.repo, private=o.private, pull_request=o.pr, base_id=o.base_id, license=o.license,
        message=o.message,
    )  # fmt: skip


@takes(PushCall)
def push(o: PushCall) -> Pushed:
    """Upload in one call: `plan_push`, then `run` to its end, in one commit.

    Returns:
        The `url` of the repository or pull request, and the `commit`, None if nothing had changed.

    Raises:
        AdapterkitError: the repository changed in the meantime; and the errors of `plan_push`.
    """
    return in_one_call(plan_push.of, o, Pushed)
