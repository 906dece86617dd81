"""Upload an adapter or a model to the Hub: check everything, then send weights, then make one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.adapter.formats.table import weights_suffixes
from adapterkit.base.checkpoint import INDEX_SUFFIX
from adapterkit.errors import AdapterkitError, FormatError, NotAllowedError, OfflineError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.hub.client.call import call_hub, one_line, page_url
from adapterkit.hub.events import BytesDone, Pushed
from adapterkit.hub.names import HubId, parse_hub_id
from adapterkit.hub.upload.prepare import README, PreparedFolder, UploadFile, check_unchanged, prepare
from adapterkit.reprs import Displayed
from adapterkit.text import size, visible

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo


@dataclass(frozen=True, repr=False)
class PushPlan(Displayed):
    """A checked upload to a repository, compared with its latest commit."""

    repo: str
    prepared: PreparedFolder
    exists: bool
    private: bool
    parent: str | None  # the latest commit
    changed: tuple[UploadFile, ...]
    removed: tuple[str, ...]  # stale weights in the repository
    pull_request: bool = False
    message: str | None = None  # of the commit
    unit: ClassVar[str] = "B"

    @property
    def size(self) -> int:
        """Bytes to upload, at most: the Hub may have some of them already."""
        return sum(upload.size for upload in self.changed)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        """The plan as JSON data."""
        changed = {upload.name for upload in self.changed}
        return {
            "repo": self.repo, "base": self.prepared.base, "private": self.private, "bytes": self.size,
            "files": [
                {"name": file.name, "bytes": file.size, "sent": file.name in changed, "change": file.change}
                for file in self.prepared.files
            ],
            "removed": list(self.removed), "left_out": self.prepared.skipped,
        }  # fmt: skip

    def brief(self) -> str:
        return f"{self.prepared.description} → {self.repo}, {size(self.size)} to upload"

    def lines(self) -> list[str]:
        """The plan as text: the destination, and a line for each file."""
        state = f"{'private' if self.private else 'public'}{'' if self.exists else ', new'}"
        changed = {upload.name for upload in self.changed}
        files = [
            (file.name, size(file.size), file.change if file.name in changed else "unchanged")
            for file in self.prepared.files
        ]
        files += [(name, "", "delete stale weights") for name in self.removed]
        files += [(name, "", f"skip: {why}") for name, why in self.prepared.skipped.items()]
        wide = max(len(visible(name)) for name, _, _ in files)
        return [
            f"upload    {self.prepared.description}",
            f"to        {self.repo} ({state}{', as a pull request' if self.pull_request else ''})",
            *(f"  {visible(name):{wide}}  {bytes_:>8}  {status}".rstrip() for name, bytes_, status in files),
        ]

    def steps(self) -> Generator[BytesDone | Pushed, None, None]:
        """Upload everything; see `send`."""
        return send(self)


def plan_push(
    path: Path, repo: str, *, private: bool = False, pull_request: bool = False, base_id: str | None = None,
    license: str | None = None, message: str | None = None,
) -> PushPlan:  # fmt: skip
    """Check the folder, the token, the repository and the base, and find the files that changed.

    `repo` is ORG/NAME, or NAME for the user's own. Raises the errors of `prepare`, NotAllowedError without write
    access, FormatError if the base is not on the Hub, UsageError for conflicting options.
    """
    me = call_hub(repo, _account)
    repo = repo if "/" in repo else f"{me.name}/{repo}"
    if (id := parse_hub_id(repo)) is None or id != HubId(id.repo):
        raise UsageError(f"{repo}: expected ORG/NAME, without a revision or folder")
    prepared = prepare(path, repo, base_id, license)
    info = _model_info(repo)
    _check_permission(repo, me, info, pull_request)
    if private and info is not None and not info.private:
        raise UsageError(f"{repo}: repository exists and is public; `private=True` is for new repositories")
    if prepared.base is not None and prepared.base != repo and _model_info(prepared.base) is None:
        raise FormatError(f"{prepared.base}: base not found on the Hub, or private", hint="set another `base_id`")
    remote_files = {str(file.rfilename): file for file in (info.siblings if info else None) or []}
    changed = tuple(upload for upload in prepared.files if not _is_unchanged(upload, remote_files.get(upload.name)))
    check_unchanged(prepared.files)
    uploaded = {upload.name for upload in prepared.files}
    removed = tuple(
        name for name in remote_files if "/" not in name and name not in uploaded
        and name.endswith((*weights_suffixes(), INDEX_SUFFIX, ".bin.index.json"))
    )  # fmt: skip
    is_private = bool(info.private) if info else private
    parent = info.sha if info else None
    return PushPlan(repo, prepared, info is not None, is_private, parent, changed, removed, pull_request, message)


def send(plan: PushPlan) -> Generator[BytesDone | Pushed, None, None]:
    """Upload the files of `plan` in one commit; yields progress, then the result.

    Weights go first, one file at a time: an interrupted push does not repeat those that arrived. Raises AdapterkitError
    if the repository has changed since the plan was made, and OfflineError.
    """
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.utils import httpx

    url = page_url(plan.repo)
    if plan.exists and not plan.changed and not plan.removed:
        yield Pushed(url, None)
        return
    _check_card(plan)
    if not plan.exists:
        call_hub(plan.repo, lambda api: api.create_repo(plan.repo, private=plan.private, exist_ok=True))
    try:
        adds = yield from _upload(plan)
    except KeyboardInterrupt as error:
        error.add_note(f"nothing committed to {plan.repo}; the next push skips the weights that arrived")
        raise
    operations: list[Any] = [*adds, *(CommitOperationDelete(name) for name in plan.removed)]
    description = plan.prepared.description.partition(":")[2].strip()
    subject = plan.message or f"{'Update' if plan.exists else 'Add'} {description}"

    def create_commit(api: HfApi) -> tuple[str | None, str]:
        try:
            made = api.create_commit(
                plan.repo, operations, commit_message=subject, create_pr=plan.pull_request, parent_commit=plan.parent
            )
        except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError) as error:  # a retry could commit twice
            raise OfflineError(
                f"{plan.repo}: connection lost during the commit, which may have been made; push again to check"
            ) from error
        return made.pr_url, made.oid

    try:
        pull_request_url, commit = call_hub(plan.repo, create_commit)
    except KeyboardInterrupt as error:
        error.add_note(f"the commit to {plan.repo} may have been made; push again to check")
        raise
    yield Pushed(pull_request_url or url, commit)


def _check_card(plan: PushPlan) -> None:
    """Raise FormatError for a card that the Hub rejects, before any weights are uploaded."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def validate(_: HfApi) -> list[str]:
        url, body = f"{constants.ENDPOINT}/api/validate-yaml", {"content": text, "repoType": "model"}
        response = get_session().post(url, json=body, headers=build_hf_headers())
        if response.status_code == 400:
            return [str(error["message"]) for error in response.json()["errors"]]
        hf_raise_for_status(response)
        return []

    for card in (upload for upload in plan.changed if upload.name == README):
        text = (card.content or b"").decode()
        if problems := call_hub(plan.repo, validate):
            raise FormatError(f"README.md: rejected by the Hub: {' '.join(' '.join(problems).split())[:300]}")


def _upload(plan: PushPlan) -> Generator[BytesDone, None, list[CommitOperationAdd]]:
    """Upload the LFS files that the Hub lacks; yields progress, and returns the operations for the commit."""
    from huggingface_hub import CommitOperationAdd

    done, adds = 0, []
    for upload in plan.changed:
        check_unchanged([upload])
        add = CommitOperationAdd(upload.name, str(upload.source) if upload.content is None else upload.content)
        if upload.content is None:
            call_hub(plan.repo, partial(_upload_lfs, plan, add), waits=())
        adds.append(add)
        done += upload.size
        yield BytesDone(done, plan.size, f"uploading {plan.repo}")
    check_unchanged(plan.changed)
    return adds


def _upload_lfs(plan: PushPlan, add: CommitOperationAdd, api: HfApi) -> None:
    try:
        api.preupload_lfs_files(plan.repo, [add], create_pr=plan.pull_request, free_memory=False, num_threads=1)
    except RuntimeError as error:  # the client wraps the original exception
        raise error.__cause__ or error from error
    except ValueError as error:
        if "LFS batch" not in str(error):
            raise
        reason = one_line(str(error)).rpartition(": ")[2]
        raise AdapterkitError(f"{plan.repo}: the Hub rejected {add.path_in_repo}: {reason}") from error


def _model_info(repo: str) -> ModelInfo | None:
    """The metadata of a repository, or None if there is none, or none that this token can access."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def info(api: HfApi) -> ModelInfo | None:
        try:
            return api.model_info(repo, files_metadata=True)
        except GatedRepoError:
            return api.model_info(repo)
        except RepositoryNotFoundError:
            return None

    return call_hub(repo, info)


@dataclass(frozen=True)
class _Account:
    """The user, and the name and role of their token."""

    name: str
    owners: tuple[str, ...]  # the user and their organizations
    token: str
    role: str | None


def _account(api: HfApi) -> _Account:
    me = api.whoami()
    token = (me.get("auth") or {}).get("accessToken") or {}
    owners = (me["name"], *(org["name"] for org in me.get("orgs") or []))
    return _Account(me["name"], owners, token.get("displayName", ""), token.get("role"))


def _check_permission(repo: str, me: _Account, info: ModelInfo | None, pull_request: bool) -> None:
    """Raise NotAllowedError without write access, before anything is uploaded."""
    if me.role == "read":
        raise NotAllowedError(
            f"{repo}: token {me.token!r} is read-only; create one with write access at "
            "https://huggingface.co/settings/tokens"
        )
    if info is not None:
        if not pull_request:
            call_hub(repo, lambda api: api.auth_check(repo, write=True))
        return
    if pull_request:
        raise UsageError(f"{repo}: no such repository to open a pull request in", hint="omit `pr=True`")
    if repo.partition("/")[0] not in me.owners:
        raise NotAllowedError(
            f"{repo}: no such repository, and {me.name} can only create repositories for {', '.join(me.owners)}"
        )


def _is_unchanged(upload: UploadFile, remote_file: Any) -> bool:
    """Whether the file on the Hub has the same bytes."""
    if remote_file is None or remote_file.size != upload.size:
        return False
    if remote_file.lfs is not None:
        return bool(remote_file.lfs.sha256 == _digest(upload, hashlib.sha256()))
    return bool(remote_file.blob_id == _digest(upload, hashlib.sha1(b"blob %d\0" % upload.size)))


def _digest(upload: UploadFile, hashed: Any) -> str:
    if upload.content is not None:
        hashed.update(upload.content)
        return str(hashed.hexdigest())
    assert upload.source is not None
    with open_regular(upload.source) as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return str(hashed.hexdigest())
