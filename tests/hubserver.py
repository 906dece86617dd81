"""A local Hugging Face Hub over HTTP, with the endpoints that the real huggingface_hub client uses, and faults.

It has repositories with commits, branches, tags and pull requests, LFS objects by SHA-256, tokens with scopes, gated
repositories, byte ranges and pagination; and it records every request. The protocol is that of client 1.31 to 2.x.

"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

LFS = (".safetensors", ".bin", ".pt", ".parquet", ".gguf")
WHEN = "2026-01-02T03:04:05.000Z"


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The file's git object id; for an LFS file, that of its pointer."""
        data = self.data if not self.lfs else f"oid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


Files = dict[str, Blob]


@dataclass
class Repo:
    """A model repository; all commits of a branch are stored, the newest last."""

    name: str
    private: bool = False
    gated: bool = False
    downloads: int = 0
    likes: int = 0
    commits: dict[str, tuple[Files, str]] = field(default_factory=dict)  # id -> files, message
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, message: str, branch: str = "main") -> str:
        """Make `files` the newest commit of a branch."""
        told = "".join(f"{name}{blob.oid}" for name, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{self.name}{len(self.commits)}{told}".encode()).hexdigest()
        self.commits[oid] = (dict(files), message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit id."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> Files:
        """Return the files at a revision."""
        return self.commits[self.resolve(revision) or ""][0]

    def card(self) -> dict[str, Any]:
        """The YAML front matter of the model card."""
        text = self.files()["README.md"].data.decode() if "README.md" in self.files() else ""
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        return (yaml.safe_load(match[1]) or {}) if match else {}

    def described(self) -> list[str]:
        """The tags for searches."""
        card = self.card()
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        relation = card.get("base_model_relation", "adapter")
        tags = [*card.get("tags", []), *filter(None, [card.get("library_name"), card.get("pipeline_tag")])]
        return [*tags, *(f"base_model:{base}" for base in bases), *(f"base_model:{relation}:{base}" for base in bases)]


@dataclass(frozen=True)
class Token:
    """A user with permissions: `role` is read, write or fineGrained, which writes to `writes` only."""

    user: str
    role: str = "write"
    writes: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()  # gated repositories that this user can access

    def may_write(self, repo: str) -> bool:
        if self.role == "fineGrained":
            return repo in self.writes
        return self.role == "write" and repo.split("/")[0] in (self.user, "an-org")


@dataclass
class Fault:
    """A fault for `times` requests like `GET /api/…`: a status, or a body that is different, truncated, slow, endless or empty."""

    pattern: str
    status: int = 0
    after: int | None = None  # bytes of the body, then the connection is closed
    body: bytes | None = None  # instead of the response
    hang: bool = False  # nothing more until the server ends
    garble: bool = False  # different bytes of the same length
    piece: int = 0  # bytes to send at a time
    tick: bool = False  # a chunk on each reading of the test's clock
    endless: bool = False  # repeats the body until the client disconnects
    slow_headers: bool = False  # a header that never ends, a byte every hundredth of a second
    reason: str | None = None  # in the status line
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Request:
    """A recorded request."""

    method: str
    path: str
    span: str | None  # the Range header
    token: str | None
    body: int  # bytes


class Hub:
    """The state of the server, for tests to set up and inspect."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, Token] = {"hf_writer": Token("me"), "hf_reader": Token("me", "read")}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.page = 20  # rows of a listing
        self.ranges = True  # whether it supports them
        self.slept: list[float] = []  # the seconds that the client waited
        self.now = 0.0  # the time for tests
        self.read = threading.Semaphore(0)  # the number of readings
        self.ended = threading.Event()
        self.hung: Callable[[], object] = lambda: None  # called when a request hangs
        self.lock = threading.RLock()
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], **facts: Any) -> Repo:
        """Add a repository."""
        repo = self.repos.setdefault(name, Repo(name, **facts))
        repo.commit({file: Blob(data, file.endswith(LFS)) for file, data in files.items()}, "first")
        self.objects |= {blob.sha256: blob.data for blob in repo.files().values() if blob.lfs}
        return repo

    def fail(self, pattern: str, status: int = 0, **how: Any) -> None:
        """Make requests that match `pattern` ("PUT .*/lfs/") fail."""
        self.faults.append(Fault(pattern, status, **how))

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests that match `pattern`."""
        return [one for one in self.requests if re.match(pattern, f"{one.method} {one.path}")]

    def clock(self) -> float:
        """Return the time, which advances by a second on each call."""
        self.now += 1
        self.read.release()
        return self.now

    def fault(self, request: str) -> Fault | None:
        """Return the fault to apply, and count it."""
        with self.lock:
            found = next((one for one in self.faults if one.times and re.match(one.pattern, request)), None)
            if found is not None:
                found.times -= 1
            return found


class RefusedError(Exception):
    """An error response."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@contextmanager
def serving() -> Iterator[Hub]:
    """Yield a Hub that is served at `hub.url`."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are none of its faults
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()


# --- HTTP ------------------------------------------------------------------------------------------------------------

Answer = Callable[["_Handler", re.Match[str]], None]
ROUTES: list[tuple[re.Pattern[str], Answer]] = []
ID = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


def route(pattern: str) -> Callable[[Answer], Answer]:
    """Register the handler of requests like `pattern`, which starts with the method."""

    def note(answer: Answer) -> Answer:
        ROUTES.append((re.compile(pattern), answer))
        return answer

    return note


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the second write, of the body, waits for 40 ms

    def do_GET(self) -> None:
        self.reply: tuple[bytes, int, dict[str, str]] | None = None
        self.answer()
        if self.reply is not None:  # outside the lock, since it can take long
            self.write(*self.reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        """Read and record the request, and answer by the first matching route, or by a fault."""
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = f"{self.command} {unquote(self.path)}"
        self.state.requests.append(
            Request(self.command, unquote(self.path), self.headers.get("Range"), bearer, len(self.body))
        )
        self.fault = self.state.fault(request)
        if self.fault is not None and self.fault.hang and self.fault.after is None:
            self.hang()
            return
        if self.fault is not None and self.fault.slow_headers:
            self.trickle()
            return
        if self.fault is not None and self.fault.body is not None:
            self.send_bytes(self.fault.body, self.fault.status or 200, {})
            return
        try:
            if self.fault is not None and self.fault.status:
                raise RefusedError(self.fault.status, message="injected")
            if bearer is not None and bearer not in self.state.tokens:
                raise RefusedError(401, message="Invalid credentials in Authorization header")
            self.token = self.state.tokens.get(bearer or "")
            for pattern, answer in ROUTES:
                if match := pattern.fullmatch(request):
                    with self.state.lock:
                        answer(self, match)
                    return
            raise RefusedError(404, message=f"no route for {request}")
        except RefusedError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Error-Message": error.message}
            self.send({"error": error.message}, error.status, headers)

    def hang(self) -> None:
        """Send nothing until the server stops."""
        self.close_connection = True
        self.state.hung()
        self.state.ended.wait()

    def trickle(self) -> None:
        """Send a header byte by byte until the client disconnects or the server stops."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.state.ended.wait(0.01):
            self.wfile.write(b"x")

    def send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON."""
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        """Answer with bytes."""
        self.reply = data, status, headers | dict(self.fault.headers if self.fault else ())

    def write(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        """Send a response with the fault's changes: truncated, different, slow, or endless."""
        self.send_response(status, self.fault.reason if self.fault else None)
        for name, value in headers.items():
            if name != "Content-Length":
                self.send_header(name, value)
        if not (self.fault and self.fault.endless):
            self.send_header("Content-Length", headers.get("Content-Length", str(len(data))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.garble:
            data = bytes(byte ^ 1 for byte in data)
        if self.fault is not None and self.fault.after is not None:
            self.wfile.write(data[: self.fault.after])
            self.wfile.flush()
            if self.fault.hang:
                self.hang()
                return
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        piece = (self.fault and self.fault.piece) or len(data) or 1
        while True:
            for at in range(0, len(data), piece):
                if self.fault and self.fault.tick:
                    self.state.read.acquire(timeout=10)  # the client has disconnected
                self.wfile.write(data[at : at + piece])
                self.wfile.flush()
            if not (self.fault and self.fault.endless):
                return

    def repo(self, match: re.Match[str], write: bool = False, content: bool = False) -> Repo:
        """Return the repository if this token may see it; with `write`, change it; with `content`, read its files."""
        repo = self.state.repos.get(match["repo"])
        owner = self.token is not None and match["repo"].split("/")[0] in (self.token.user, "an-org")
        if repo is None or (repo.private and not owner):
            raise RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if write and (self.token is None or not self.token.may_write(repo.name)):
            raise RefusedError(403, message="you need write access to do this")
        if content and repo.gated and not owner and (self.token is None or repo.name not in self.token.gates):
            raise RefusedError(403 if self.token else 401, "GatedRepo", f"Access to model {repo.name} is restricted")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        """Return the commit at a revision."""
        if (found := repo.resolve(unquote(revision))) is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


# --- who, and what there is ------------------------------------------------------------------------------------------


@route("GET /api/whoami-v2")
def _whoami(handler: _Handler, match: re.Match[str]) -> None:
    if handler.token is None:
        raise RefusedError(401, message="Invalid username or password.")
    auth = {"accessToken": {"role": handler.token.role, "displayName": "a token"}, "type": "access_token"}
    handler.send({"type": "user", "name": handler.token.user, "orgs": [{"name": "an-org"}], "auth": auth})


@route(rf"GET /api/models/{ID}/auth-check(?P<write>/write)?")
def _auth_check(handler: _Handler, match: re.Match[str]) -> None:
    handler.repo(match, write=bool(match["write"]), content=True)
    handler.send({})


@route("POST /api/repos/create")
def _create(handler: _Handler, match: re.Match[str]) -> None:
    asked = json.loads(handler.body)
    if handler.token is None:
        raise RefusedError(401, message="Invalid username or password.")
    name = f"{asked.get('organization') or handler.token.user}/{asked['name']}"
    if not handler.token.may_write(name):
        raise RefusedError(403, message="You don't have the rights to create a model under this namespace")
    if name in handler.state.repos:
        raise RefusedError(409, message="You already created this model repo")
    repo = handler.state.repos[name] = Repo(name, private=asked.get("visibility") == "private")
    repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
    handler.send({"url": f"{handler.state.url}/{name}", "name": name})


@route("DELETE /api/repos/delete")
def _delete(handler: _Handler, match: re.Match[str]) -> None:
    asked = json.loads(handler.body)
    name = f"{asked.get('organization') or (handler.token and handler.token.user)}/{asked['name']}"
    if handler.token is None or not handler.token.may_write(name):
        raise RefusedError(403, message="you need write access to do this")
    handler.state.repos.pop(name, None)
    handler.send({})


@route("POST /api/validate-yaml")
def _validate(handler: _Handler, match: re.Match[str]) -> None:
    handler.send({"errors": [], "warnings": []})


@route("GET /api/models")
def _list(handler: _Handler, match: re.Match[str]) -> None:
    asked = handler.query
    wanted, words = set(asked.get("filter", [])), asked.get("search", [""])[0].lower().split()
    author = asked.get("author", [""])[0]
    rows = [
        repo
        for repo in handler.state.repos.values()
        if wanted <= set(repo.described())
        and all(word in repo.name.lower() for word in words)
        and (not author or repo.name.split("/")[0] == author)
        and (not repo.private or (handler.token and repo.name.split("/")[0] == handler.token.user))
    ]
    key = asked.get("sort", [""])[0]
    if key in ("downloads", "likes"):
        rows.sort(key=lambda repo: -int(getattr(repo, key)))
    first = int(asked.get("cursor", ["0"])[0])
    size = min(handler.state.page, int(asked.get("limit", [str(handler.state.page)])[0]))
    headers = {}
    if first + size < len(rows):
        rest = [(name, value) for name, values in asked.items() if name != "cursor" for value in values]
        query = "&".join(f"{name}={quote(value)}" for name, value in [*rest, ("cursor", str(first + size))])
        headers["Link"] = f'<{handler.state.url}/api/models?{query}>; rel="next"'
    handler.send([_info(repo, "main", False) for repo in rows[first : first + size]], headers=headers)


def _info(repo: Repo, revision: str, blobs: bool) -> dict[str, Any]:
    files = []
    for name, blob in repo.files(revision).items():
        row: dict[str, Any] = {"rfilename": name}
        if blobs:
            row |= {"size": len(blob.data), "blobId": blob.oid}
            row |= {"lfs": {"size": len(blob.data), "sha256": blob.sha256, "pointerSize": 130}} if blob.lfs else {}
        files.append(row)
    return {
        "_id": "0", "id": repo.name, "modelId": repo.name, "sha": repo.resolve(revision), "private": repo.private,
        "gated": "manual" if repo.gated else False, "disabled": False, "downloads": repo.downloads,
        "likes": repo.likes, "tags": repo.described(), "lastModified": WHEN, "createdAt": WHEN, "trendingScore": 1,
        "library_name": repo.card().get("library_name"), "cardData": repo.card(), "siblings": files,
    }  # fmt: skip


@route(rf"GET /api/models/{ID}(?:/revision/{REVISION})?")
def _model(handler: _Handler, match: re.Match[str]) -> None:
    repo = handler.repo(match)
    handler.send(_info(repo, handler.at(repo, match["revision"] or "main"), "blobs" in handler.query))


@route(rf"GET /api/models/{ID}/refs")
def _refs(handler: _Handler, match: re.Match[str]) -> None:
    repo = handler.repo(match)

    def rows(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]

    handler.send(
        {"branches": rows("heads", repo.branches), "tags": rows("tags", repo.tags), "converts": [], "pullRequests": []}
    )


@route(rf"GET /api/models/{ID}/tree/{REVISION}(?:/(?P<folder>.*))?")
def _tree(handler: _Handler, match: re.Match[str]) -> None:
    repo = handler.repo(match)
    rows = []
    for name, blob in repo.files(handler.at(repo, match["revision"])).items():
        if name.startswith(match["folder"] or ""):
            lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
            row = {"type": "file", "path": name, "size": len(blob.data), "oid": blob.oid}
            rows.append(row | ({"lfs": lfs} if blob.lfs else {}))
    handler.send(rows)


# --- down ------------------------------------------------------------------------------------------------------------


@route(rf"(?:GET|HEAD) /{ID}/resolve/{REVISION}/(?P<file>.+)")
def _resolve(handler: _Handler, match: re.Match[str]) -> None:
    repo = handler.repo(match, content=True)
    commit = handler.at(repo, match["revision"])
    blob = repo.files(commit).get(match["file"])
    if blob is None:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if span is None or not handler.state.ranges:
        handler.send_bytes(blob.data, 200, headers)
        return
    first, last = int(span[1]), min(int(span[2] or len(blob.data) - 1), len(blob.data) - 1)
    if first >= len(blob.data):
        handler.send_bytes(b"", 416, headers | {"Content-Range": f"bytes */{len(blob.data)}"})
        return
    headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
    handler.send_bytes(blob.data[first : last + 1], 206, headers)


# --- up --------------------------------------------------------------------------------------------------------------


@route(rf"POST /api/models/{ID}/preupload/{REVISION}")
def _preupload(handler: _Handler, match: re.Match[str]) -> None:
    repo = handler.repo(match, write="create_pr" not in handler.query)
    there = repo.files(handler.at(repo, match["revision"]))
    rows = []
    for file in json.loads(handler.body)["files"]:
        mode, blob = "lfs" if file["path"].endswith(LFS) else "regular", there.get(file["path"])
        oid = None if blob is None else blob.etag
        rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    handler.send({"files": rows})


@route(rf"POST /{ID}\.git/info/lfs/objects/batch")
def _batch(handler: _Handler, match: re.Match[str]) -> None:
    handler.repo(match)
    rows = []
    for one in json.loads(handler.body)["objects"]:
        href = f"{handler.state.url}/lfs/{one['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        rows.append(one | ({} if one["oid"] in handler.state.objects else {"actions": actions}))
    handler.send({"transfer": "basic", "objects": rows})


@route(r"PUT /lfs/(?P<oid>\w+)")
def _put(handler: _Handler, match: re.Match[str]) -> None:
    if hashlib.sha256(handler.body).hexdigest() != match["oid"]:
        raise RefusedError(400, message="the bytes have another SHA-256")
    handler.state.objects[match["oid"]] = handler.body
    handler.send_bytes(b"", 200, {})


@route(r"POST /lfs/(?P<oid>\w+)/verify")
def _verify(handler: _Handler, match: re.Match[str]) -> None:
    if match["oid"] not in handler.state.objects:
        raise RefusedError(404, message="no such object")
    handler.send({})


@route(rf"POST /api/models/{ID}/commit/{REVISION}")
def _commit(handler: _Handler, match: re.Match[str]) -> None:
    pull = "create_pr" in handler.query
    repo = handler.repo(match, write=not pull)
    head = handler.at(repo, match["revision"])
    files, message = dict(repo.files(head)), ""
    for line in handler.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, head):
                raise RefusedError(412, message="A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in handler.state.objects:
                raise RefusedError(400, message=f"LFS pointer to what is not there: {value['path']}")
            files[value["path"]] = Blob(handler.state.objects[value["oid"]], True)
        elif key == "deletedFile":
            files.pop(value["path"])
        elif key == "deletedFolder":
            files = {name: blob for name, blob in files.items() if not name.startswith(value["path"])}
    number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
    oid = repo.commit(files, message, f"refs/pr/{number}" if pull else unquote(match["revision"]))
    found = {"commitUrl": f"{handler.state.url}/{repo.name}/commit/{oid}", "commitOid": oid, "success": True}
    if pull:
        found["pullRequestUrl"] = f"{handler.state.url}/{repo.name}/discussions/{number}"
    handler.send(found)
