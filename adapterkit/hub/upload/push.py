"""An adapter or a model sent to the Hub: everything checked first, then the weights, then one commit."""

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
from adapterkit.hub.client.ask import ask, clean, page
from adapterkit.hub.events import BytesDone, Pushed
from adapterkit.hub.names import HubId, parsed
from adapterkit.hub.upload.parcel import README, Parcel, Upload, check_unchanged, pack
from adapterkit.text import size, visible

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo


@dataclass(frozen=True)
class PushPlan:
    """What would be sent where: plain data, made and checked before a byte of it is."""

    repo: str
    parcel: Parcel
    exists: bool
    private: bool
    parent: str | None  # the commit that it was compared with
    changed: tuple[Upload, ...]
    removed: tuple[str, ...]  # weights that are there and belong to nothing here
    pull_request: bool = False
    message: str | None = None  # of the commit
    unit: ClassVar[str] = "B"

    @property
    def size(self) -> int:
        """Bytes to send, at most."""
        return sum(upload.size for upload in self.changed)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        """The plan for programs."""
        changed = {upload.name for upload in self.changed}
        return {
            "repo": self.repo, "base": self.parcel.base, "private": self.private, "bytes": self.size,
            "files": [
                {"name": one.name, "bytes": one.size, "sent": one.name in changed, "change": one.change}
                for one in self.parcel.uploads
            ],
            "removed": list(self.removed), "left_out": self.parcel.left_out,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The plan for people: what goes where, and how each file does."""
        state = f"{'private' if self.private else 'public'}{'' if self.exists else ', new'}"
        changed = {upload.name for upload in self.changed}
        files = [
            (one.name, size(one.size), one.change if one.name in changed else "unchanged")
            for one in self.parcel.uploads
        ]
        files += [(name, "", "removed: weights of before") for name in self.removed]
        files += [(name, "", f"left out: {why}") for name, why in self.parcel.left_out.items()]
        wide = max(len(visible(name)) for name, _, _ in files)
        return [
            f"sends     {self.parcel.what}",
            f"to        {self.repo} ({state}{', as a pull request' if self.pull_request else ''})",
            *(f"  {visible(name):{wide}}  {bytes_:>8}  {how}".rstrip() for name, bytes_, how in files),
        ]

    def __str__(self) -> str:
        return "\n".join(map(visible, self.lines()))

    def steps(self) -> Generator[BytesDone | Pushed, None, None]:
        """Send everything; see `send`."""
        return send(self)


def plan_push(
    path: Path, repo: str, *, private: bool = False, pull_request: bool = False, base_id: str | None = None,
    license: str | None = None, message: str | None = None,
) -> PushPlan:  # fmt: skip
    """Check everything that can be: the folder, the token, the repository, the base, and what has changed.

    `repo` is ORG/NAME, or NAME of the user's own. Raises what `pack` does, NotAllowedError where the token may not
    write there, FormatError where the base is not on the Hub, UsageError for options that do not go together.
    """
    me = ask(repo, _account)
    repo = repo if "/" in repo else f"{me.name}/{repo}"
    if (id := parsed(repo)) is None or id != HubId(id.repo):
        raise UsageError(f"{repo}: expected ORG/NAME, without revision and folder")
    parcel = pack(path, repo, base_id, license)
    info = _found(repo)
    _check_allowed(repo, me, info, pull_request)
    if private and info is not None and not info.private:
        raise UsageError(f"{repo}: exists and is public; `private=True` is for new repositories")
    if parcel.base is not None and parcel.base != repo and _found(parcel.base) is None:
        raise FormatError(f"{parcel.base}: the base is not on the Hub, or it is private", hint="give another `base_id`")
    there = {str(one.rfilename): one for one in (info.siblings if info else None) or []}
    changed = tuple(upload for upload in parcel.uploads if not _same(upload, there.get(upload.name)))
    check_unchanged(parcel.uploads)
    kept = {upload.name for upload in parcel.uploads}
    removed = tuple(
        name for name in there if "/" not in name and name not in kept
        and name.endswith((*weights_suffixes(), INDEX_SUFFIX, ".bin.index.json"))
    )  # fmt: skip
    is_private = bool(info.private) if info else private
    parent = info.sha if info else None
    return PushPlan(repo, parcel, info is not None, is_private, parent, changed, removed, pull_request, message)


def send(plan: PushPlan) -> Generator[BytesDone | Pushed, None, None]:
    """Send what `plan` says: weights one after the other, of which those that arrived need not be sent again, then all
    in one commit; yield the bytes that are there, the result last.

    Raises AdapterkitError where the repository changed since the plan was made, and OfflineError.
    """
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.utils import httpx

    url = page(plan.repo)
    if plan.exists and not plan.changed and not plan.removed:
        yield Pushed(url, None)
        return
    _check_card(plan)
    if not plan.exists:
        ask(plan.repo, lambda api: api.create_repo(plan.repo, private=plan.private, exist_ok=True))
    try:
        adds = yield from _upload(plan)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"{plan.repo} has nothing new; weights that arrived are not sent again by the next push"
        ) from error
    operations: list[Any] = [*adds, *(CommitOperationDelete(name) for name in plan.removed)]
    subject = plan.message or f"{'Update' if plan.exists else 'Add'} {plan.parcel.what.partition(':')[2].strip()}"

    def question(api: HfApi) -> tuple[str | None, str]:
        try:
            made = api.create_commit(
                plan.repo, operations, commit_message=subject, create_pr=plan.pull_request, parent_commit=plan.parent
            )
        except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError) as error:  # not to be sent twice
            raise OfflineError(
                f"{plan.repo}: the Hub hung up; the commit was made or not: push again to know"
            ) from error
        return made.pr_url, made.oid

    try:
        request, commit = ask(plan.repo, question)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the commit to {plan.repo} was made or not; pushing again tells") from error
    yield Pushed(request or url, commit)


def _check_card(plan: PushPlan) -> None:
    """Raise FormatError for a card that the Hub does not take, before any weights are sent."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def question(_: HfApi) -> list[str]:
        url, body = f"{constants.ENDPOINT}/api/validate-yaml", {"content": text, "repoType": "model"}
        response = get_session().post(url, json=body, headers=build_hf_headers())
        if response.status_code == 400:
            return [str(error["message"]) for error in response.json()["errors"]]
        hf_raise_for_status(response)
        return []

    for card in (one for one in plan.changed if one.name == README):
        text = (card.content or b"").decode()
        if wrong := ask(plan.repo, question):
            raise FormatError(f"README.md: the Hub does not take it: {' '.join(' '.join(wrong).split())[:300]}")


def _upload(plan: PushPlan) -> Generator[BytesDone, None, list[CommitOperationAdd]]:
    """Send the bytes that are kept by their SHA-256, where the Hub lacks them; what is left to do is the commit."""
    from huggingface_hub import CommitOperationAdd

    done, adds = 0, []
    for one in plan.changed:
        check_unchanged([one])
        add = CommitOperationAdd(one.name, str(one.source) if one.content is None else one.content)
        if one.content is None:
            ask(plan.repo, partial(_upload_lfs, plan, add), waits=())
        adds.append(add)
        done += one.size
        yield BytesDone(done, plan.size, f"sending {plan.repo}")
    check_unchanged(plan.changed)
    return adds


def _upload_lfs(plan: PushPlan, add: CommitOperationAdd, api: HfApi) -> None:
    try:
        api.preupload_lfs_files(plan.repo, [add], create_pr=plan.pull_request, free_memory=False, num_threads=1)
    except RuntimeError as error:  # the client's wrapping of what happened
        raise error.__cause__ or error from error
    except ValueError as error:
        if "LFS batch" not in str(error):
            raise
        said = clean(str(error)).rpartition(": ")[2]
        raise AdapterkitError(f"{plan.repo}: the Hub does not take {add.path_in_repo}: {said}") from error


def _found(repo: str) -> ModelInfo | None:
    """What is known of a repository, or None where there is none that this token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def question(api: HfApi) -> ModelInfo | None:
        try:
            return api.model_info(repo, files_metadata=True)
        except GatedRepoError:
            return api.model_info(repo)
        except RepositoryNotFoundError:
            return None

    return ask(repo, question)


@dataclass(frozen=True)
class _Account:
    """Whose token it is, and what it may."""

    name: str
    owners: tuple[str, ...]  # who they can make repositories for
    token: str  # its name
    role: str | None


def _account(api: HfApi) -> _Account:
    me = api.whoami()
    token = (me.get("auth") or {}).get("accessToken") or {}
    owners = (me["name"], *(org["name"] for org in me.get("orgs") or []))
    return _Account(me["name"], owners, token.get("displayName", ""), token.get("role"))


def _check_allowed(repo: str, me: _Account, info: ModelInfo | None, pull_request: bool) -> None:
    """Raise NotAllowedError where the token may not write there, before anything is sent."""
    if me.role == "read":
        raise NotAllowedError(
            f"{repo}: the token {me.token!r} may only read; make one that writes at "
            "https://huggingface.co/settings/tokens"
        )
    if info is not None:
        if not pull_request:
            ask(repo, lambda api: api.auth_check(repo, write=True))
        return
    if pull_request:
        raise UsageError(f"{repo}: does not exist, so no pull request can be opened", hint="omit `pr=True`")
    if repo.partition("/")[0] not in me.owners:
        raise NotAllowedError(
            f"{repo}: is not there, and {me.name} can make repositories for {', '.join(me.owners)} only"
        )


def _same(upload: Upload, there: Any) -> bool:
    """Whether the Hub has just these bytes under this name."""
    if there is None or there.size != upload.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == _digest(upload, hashlib.sha256()))
    return bool(there.blob_id == _digest(upload, hashlib.sha1(b"blob %d\0" % upload.size)))


def _digest(upload: Upload, hashed: Any) -> str:
    if upload.content is not None:
        hashed.update(upload.content)
        return str(hashed.hexdigest())
    assert upload.source is not None
    with open_regular(upload.source) as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return str(hashed.hexdigest())
